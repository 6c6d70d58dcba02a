"""One client after the other, in this process: the reference for every other engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from federa.engines.base import ENGINES, Engine, Session, keep_freed_memory, share_cores
from federa.types import FloatArray, IntArray, Job, State, Update

if TYPE_CHECKING:
    from federa.experiment import Experiment


class SerialSession:
    """Runs every job on the experiment's own model."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """See `Session.train`."""
        for job in jobs:
            yield self._experiment.train_client(params, job)

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        yield from self._experiment.predict(params, batches, job)


@ENGINES.register
class Serial(Engine):
    """All cores work on one client at a time."""

    name: Literal["serial"] = "serial"

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[Session]:
        """Set the number of threads; it stays when the block ends."""
        torch.set_num_threads(share_cores(1, self.threads))
        keep_freed_memory()
        yield SerialSession(experiment)
