"""What every part of federa speaks: the state of a model, a job, an update, the server's state.

`State`, `Job` and `Update` are all that crosses the wire between server and clients;
`ServerState` is all that crosses from one round to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from federa.errors import FederaError, RoundFailedError, RowError

__all__ = [
    "Absence",
    "FederaError",
    "FloatArray",
    "IntArray",
    "Job",
    "Metrics",
    "Record",
    "RoundFailedError",
    "RowError",
    "ServerState",
    "State",
    "Update",
]

State: TypeAlias = Mapping[str, Tensor]
"""Trained parameters only, float32, by the name that the model gives them."""

Metrics: TypeAlias = Mapping[str, float]
"""Numbers by name; means over examples unless the name says otherwise."""

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
Record: TypeAlias = dict[str, Any]
"""One line of `metrics.jsonl`."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the server tells one client in one round: four scalars that can travel anywhere."""

    round: int
    client_id: int
    seed: int
    lr: float


@dataclass(frozen=True, slots=True)
class Update:
    """What a client answers.

    Attributes:
        job: the job that is answered.
        delta: local minus global parameters; the keys and shapes of the state that was sent.
        weight: the number of examples that the client holds; weighs the update in the mean.
        metrics: `loss` (mean over the steps), `steps`, `seconds_train`.
    """

    job: Job
    delta: State
    weight: float
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Absence:
    """Stands for an update that did not come, in a federation of real machines.

    Attributes:
        job: the job that was not answered.
        reason: why, as far as anybody knows.
    """

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that crosses rounds, and so all that a resume needs.

    Attributes:
        round: the number of finished rounds.
        params: the global trained parameters.
        opt: the server optimizer's tensors, empty for plain averaging.
    """

    round: int
    params: State
    opt: State = field(default_factory=dict)
