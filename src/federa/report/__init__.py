"""Run directories, one or a grid, as a web page that opens from disk; and the picture of a partition."""

from federa.report.grid import GridCell, Pair, Reached, write_grid_report
from federa.report.page import write_report
from federa.report.partition import partition_figure
from federa.report.svg import save_figure

__all__ = [
    "GridCell",
    "Pair",
    "Reached",
    "partition_figure",
    "save_figure",
    "write_grid_report",
    "write_report",
]
