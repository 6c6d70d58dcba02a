"""The interface of engines."""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from federa.machine import available_cores
from federa.registry import Component, Registry
from federa.types import Absence, FederaError, FloatArray, IntArray, Job, State, Update

if TYPE_CHECKING:
    from federa.experiment import Experiment


class Clients(Protocol):
    """Whatever answers the jobs of a round: an engine at work, or machines elsewhere."""

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update | Absence]:
        """Yield one update a job, in the order of the jobs, or why it did not come."""

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """Yield the outputs for each batch of rows of the evaluation set.

        With a job, with what that job's client keeps for itself (its own head) before the job's round.
        """


class Session(Clients, Protocol):
    """An engine at work on one experiment; its models stay resident from round to round."""

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """Yield one update a job, in the order of the jobs, each of tensors that nothing reuses."""


class Engine(Component, ABC):
    """Runs the clients of a round.

    With equal threads the bits of a result do not depend on which engine or on how many workers; those of
    `stacked` do: the same to rounding, and with dropout on other draws of the same distribution.

    Attributes:
        threads: of each worker; None for what the cores allow.
    """

    threads: int | None = Field(default=None, ge=1)

    def num_workers(self) -> int:
        """Return how many workers share the clients of a round; one pass over several is one worker's."""
        return 1

    @abstractmethod
    def open(self, experiment: Experiment) -> AbstractContextManager[Session]:
        """Start the engine, and stop it (its processes too) at the end of the block."""


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory of a training step for the next one.

    By default it hands large blocks back to the kernel, which then clears and maps them anew, page by page: a
    fifth of a small encoder's step on a CPU. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Ask glibc to hand freed memory back to the kernel: a float32 model that has become a bfloat16 one, say.

    Where `keep_freed_memory` came first, as in a node, nothing else would.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def share_cores(workers: int, threads: int | None) -> int:
    """Return the threads of each worker, so that all of them fit on the cores.

    Raises:
        FederaError: workers times threads exceeds the cores; they would fight for them.
    """
    cores = available_cores()
    threads = threads or max(1, cores // workers)
    if workers * threads > cores:
        raise FederaError(
            f"engine: {workers} workers x {threads} threads need more than the {cores} cores of this machine;"
            " lower engine.workers or engine.threads"
        )
    return threads


ENGINES: Registry[Engine] = Registry("engine")
