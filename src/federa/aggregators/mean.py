"""The weighted mean of federated averaging (McMahan et al. 2017, Algorithm 1), streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from federa.aggregators.base import AGGREGATORS, Aggregator
from federa.state import pieces
from federa.types import State, Update


@dataclass(slots=True)
class RunningMean:
    """A weighted sum so far: float64 tensors by name, and the total weight."""

    total: dict[str, Tensor]
    weight: float = 0.0

    def add_(self, delta: State, weight: float) -> None:
        """Add `weight * delta`; the update can be freed afterwards."""
        for name, total in self.total.items():
            for piece, step in zip(pieces(total), pieces(delta[name].contiguous()), strict=True):
                piece.add_(step.double(), alpha=weight)
        self.weight += weight

    def mean(self) -> State:
        """Return sum / weight in float32."""
        if not self.weight > 0:
            raise ValueError("no update was accumulated: the weights add up to zero")
        return {name: (total / self.weight).float() for name, total in self.total.items()}


def empty_mean(params: State) -> RunningMean:
    """Return a running mean of nothing, for states like `params`."""
    return RunningMean({name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()})


@AGGREGATORS.register
class Mean(Aggregator):
    """Mean of the updates, each weighed by its number of examples. Memory: one state in float64."""

    name: Literal["mean"] = "mean"
    weighted: bool = True

    def init(self, params: State) -> RunningMean:  # noqa: D102
        return empty_mean(params)

    def accumulate(self, accumulator: RunningMean, update: Update) -> RunningMean:  # noqa: D102
        accumulator.add_(update.delta, update.weight if self.weighted else 1.0)
        return accumulator

    def finish(self, accumulator: RunningMean) -> State:  # noqa: D102
        return accumulator.mean()
