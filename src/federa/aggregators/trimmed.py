"""The coordinate-wise trimmed mean (Yin et al. 2018): robust to a share of wrong clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from federa.aggregators.base import AGGREGATORS, Aggregator
from federa.types import State, Update


def middle_mean(deltas: Sequence[State], cut: int) -> State:
    """Return, for each coordinate, the mean of its values without the `cut` least and `cut` greatest.

    Args:
        deltas: the updates, with the same keys and shapes.
        cut: how many values to leave out at each end; less than half of them.

    Raises:
        ValueError: no delta.
    """
    if not deltas:
        raise ValueError("no update was accumulated")
    kept = slice(cut, len(deltas) - cut)
    return {
        name: torch.stack([delta[name] for delta in deltas])
        .sort(dim=0)
        .values[kept]
        .double()
        .mean(dim=0)
        .float()
        for name in deltas[0]
    }


@AGGREGATORS.register
class TrimmedMean(Aggregator):
    """Mean of each coordinate without its extremes; clients count alike, whatever their weights.

    A positive `trim` cuts at least one value at each end of three or more: rounding down to none would
    quietly give the plain mean, which a single wrong client can move anywhere.

    Memory: holds every update of the round until the end.

    Attributes:
        trim: the share cut at each end; `floor(trim * clients)` values, where that is not none.
    """

    name: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def init(self, params: State) -> list[State]:  # noqa: D102
        return []

    def accumulate(self, accumulator: list[State], update: Update) -> list[State]:  # noqa: D102
        accumulator.append(update.delta)
        return accumulator

    def finish(self, accumulator: list[State]) -> State:  # noqa: D102
        return middle_mean(accumulator, self._cut(len(accumulator)))

    def _cut(self, clients: int) -> int:
        """Return how many values to cut at each end; always leaves one or more."""
        if self.trim == 0:
            return 0
        # 0.29 * 100 is 28.999...: a little is added so that binary fractions do not cost a client.
        cut = max(1, math.floor(self.trim * clients + 1e-9))
        return min(cut, max(0, clients - 1) // 2)
