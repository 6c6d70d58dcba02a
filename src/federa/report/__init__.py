"""Run directories, one or a grid, as a web page that opens from disk; and the picture of a partition."""
