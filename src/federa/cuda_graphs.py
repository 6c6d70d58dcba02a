"""CUDA graphs: a step's operations recorded once for each shape of its batch, and issued again as one.

A small model's step on a GPU is a thousand short operations, and the host takes longer to issue them than the
device to do them. A recorded step costs the host one call. What it computes is what it computed when it was
recorded: the same kernels on the same memory, with dropout drawn anew.
"""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from federa.types import FederaError

MOST = 96  # shapes that are recorded: each holds its list of operations on the device
ROOM = 1.5  # times a step's memory must be free beside the largest step's, which may come as it is
_SYNC = "called a synchronizing CUDA operation"  # torch's words
_PROTOTYPE = "Synchronization debug mode is a prototype"  # likewise, of the means to find that out
_log = logging.getLogger(__name__)

Step = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: Tensor


class CudaGraphs:
    """Takes a step as it comes if its shape is new, records it the second time, and replays it from then on.

    A step that waits for the device cannot be recorded. Some do so the first time alone, for what they keep
    (DeBERTa's relative positions); one that does it again is never recorded, nor is any other.

    Args:
        step: a method of what owns this object; it reads a batch, changes tensors that stay in their places,
            and returns one (detached). What is different from call to call must be in tensors: numbers of the
            host are recorded as they were.
        device: of those tensors, a GPU.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._method, self._device = weakref.WeakMethod(step), device  # no cycle: graphs hold memory
        self._needed: dict[tuple[object, ...], int] = {}
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._refused: set[tuple[object, ...]] = set()  # there was no room for them
        self._waited: set[tuple[object, ...]] = set()  # when it was new
        self._waits = False
        self._failed = ""
        self._said: set[tuple[str, type[Warning], str, int]] = set()  # warnings that have been passed on

    def __len__(self) -> int:
        """Return how many shapes have been recorded."""
        return len(self._recordings)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Take a step.

        Args:
            batch: on the device.

        Returns:
            What the step returned, in memory of its own.

        Raises:
            FederaError: the step cannot be recorded.
        """
        if self._failed:  # torch's generator is not to be used after that
            raise FederaError(self._failed)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items()))
        recording = self._recordings.get(key)
        if recording is None:
            if key not in self._needed or key in self._waited:
                return self._watched(key, batch)
            if self._waits or len(self) >= MOST or key in self._refused:
                return self._step(batch)
            recording = self._record(batch) if self._fits(key) else None
            if recording is None:
                if not self._refused:
                    _log.warning("client.cuda_graphs: no room to record every step; others are slower")
                self._refused.add(key)
                return self._step(batch)
            self._recordings[key] = recording
        for name, tensor in batch.items():
            recording.inputs[name].copy_(tensor)
        recording.graph.replay()
        return recording.output.clone()

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        method = self._method()
        assert method is not None, "its owner calls"
        return method(batch)

    def _watched(self, key: tuple[object, ...], batch: dict[str, Tensor]) -> Tensor:
        """Take a step as it comes; note what memory it takes, and whether the host waits in it."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = self._step(batch)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in said:
            what = str(warning.message), warning.category, warning.filename, warning.lineno
            if what not in self._said and not any(words in what[0] for words in (_SYNC, _PROTOTYPE)):
                self._said.add(what)
                warnings.warn_explicit(*what)
        self._needed[key] = torch.cuda.max_memory_allocated(self._device) - before
        waited = any(_SYNC in str(warning.message) for warning in said)
        if waited and key not in self._waited:
            self._waited.add(key)
            return out
        self._waited.discard(key)
        if waited and not self._waits:
            self._waits = True
            _log.info("client.cuda_graphs: this model's step waits for the device, so it is not recorded")
        return out

    def _fits(self, key: tuple[object, ...]) -> bool:
        torch.cuda.empty_cache()  # as a recording does: what torch keeps then is for recordings alone
        free = int(torch.cuda.mem_get_info(self._device)[0])
        return bool(free >= ROOM * self._needed[key] + max(self._needed.values()))

    def _record(self, batch: dict[str, Tensor]) -> _Recording | None:
        """Record the step of a shape; None where the device has no room for it, and nothing is done then."""
        inputs = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool):
                output = self._step(inputs)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            self._failed = (
                f"client.cuda_graphs: this model's step cannot be recorded ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error) else ''}); set it to false"
            )
            raise FederaError(self._failed) from error
        return _Recording(graph, inputs, output)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting cycles: to free an old graph amid a recording spoils that."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
