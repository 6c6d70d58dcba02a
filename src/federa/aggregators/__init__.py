"""Aggregators: how the updates of a round become one."""

from federa.aggregators.base import AGGREGATORS, Aggregator
from federa.aggregators.clipped import ClippedMean
from federa.aggregators.mean import Mean
from federa.aggregators.median import Median
from federa.aggregators.trimmed import TrimmedMean

__all__ = ["AGGREGATORS", "Aggregator", "ClippedMean", "Mean", "Median", "TrimmedMean"]
