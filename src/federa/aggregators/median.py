"""The coordinate-wise median (Yin et al. 2018): robust while fewer than half of the clients are wrong."""

from __future__ import annotations

from typing import Literal

from federa.aggregators.base import AGGREGATORS, Aggregator
from federa.aggregators.trimmed import middle_mean
from federa.types import State, Update


@AGGREGATORS.register
class Median(Aggregator):
    """Median of each coordinate, the mean of the middle two for an even number of clients.

    Clients count alike, whatever their weights. Memory: holds every update of the round until the end.
    """

    name: Literal["median"] = "median"

    def init(self, params: State) -> list[State]:  # noqa: D102
        return []

    def accumulate(self, accumulator: list[State], update: Update) -> list[State]:  # noqa: D102
        accumulator.append(update.delta)
        return accumulator

    def finish(self, accumulator: list[State]) -> State:  # noqa: D102
        return middle_mean(accumulator, max(0, len(accumulator) - 1) // 2)
