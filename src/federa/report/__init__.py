"""A run directory as one web page that opens from disk, and the picture of a partition."""

from federa.report.page import write_report
from federa.report.partition import partition_figure
from federa.report.svg import save_figure

__all__ = ["partition_figure", "save_figure", "write_report"]
