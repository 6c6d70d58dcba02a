"""The weighted mean of updates that are clipped to a norm: no client can move the model far."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from federa.aggregators.base import AGGREGATORS, Aggregator
from federa.aggregators.mean import RunningMean, empty_mean
from federa.types import State, Update


def clipped(delta: State, max_norm: float) -> State:
    """Return `delta`, scaled down to an L2 norm of `max_norm` over all of its tensors if it is longer.

    The scaled tensors are float64, for a sum that is float64 too.
    """
    squares = (float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in delta.values())
    norm = math.sqrt(sum(squares))
    if norm <= max_norm:
        return delta
    return {name: tensor.double() * (max_norm / norm) for name, tensor in delta.items()}


@AGGREGATORS.register
class ClippedMean(Aggregator):
    """Mean of the clipped updates, weighed by examples (clipping as in McMahan et al. 2018, DP-FedAvg).

    Adds no noise, so it promises no differential privacy. Memory: one state in float64, and one update.

    Attributes:
        max_norm: the greatest L2 norm of an update, over all of its tensors together.
    """

    name: Literal["clipped_mean"] = "clipped_mean"
    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def init(self, params: State) -> RunningMean:  # noqa: D102
        return empty_mean(params)

    def accumulate(self, accumulator: RunningMean, update: Update) -> RunningMean:  # noqa: D102
        accumulator.add_(clipped(update.delta, self.max_norm), update.weight)
        return accumulator

    def finish(self, accumulator: RunningMean) -> State:  # noqa: D102
        return accumulator.mean()
