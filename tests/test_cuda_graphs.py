"""When a step is recorded, replayed, or taken as it comes: on a device that is made up. `test_cuda.py` has a real one."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from federa.cuda_graphs import MOST, CudaGraphs
from federa.types import FederaError

GB = 1 << 30


class Device:
    """Stands for torch.cuda: so much memory, and a graph that calls what was recorded."""

    def __init__(self, monkeypatch, free=64 * GB):
        self.free, self.held, self.peak, self.waits, self.recording, self.emptied = free, 0, 0, False, None, 0
        self.amid = None  # what goes wrong amid a recording
        for name in (
            "graph_pool_handle", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "graph",
            "get_sync_debug_mode", "set_sync_debug_mode", "empty_cache", "mem_get_info", "CUDAGraph",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def graph_pool_handle(self):
        return (0, 1)

    def reset_peak_memory_stats(self, device):
        self.peak = self.held

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak

    def get_sync_debug_mode(self):
        return 0

    def set_sync_debug_mode(self, mode):
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def empty_cache(self):
        self.emptied += 1

    def mem_get_info(self, device):
        return self.free, 80 * GB

    class CUDAGraph:
        def replay(self):
            self.output.copy_(self.again())

    @contextmanager
    def graph(self, graph, pool):
        self.recording = graph
        yield
        self.recording = None
        if self.amid is not None:
            raise self.amid


class Owner:
    """Has a step that doubles its batch."""

    def __init__(self, device, needs=GB):
        self.device, self.needs, self.taken, self.warns = device, needs, 0, None
        self.graphs = CudaGraphs(self.step, torch.device("cpu"))

    def step(self, batch):
        if self.device.waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        if self.warns is not None:
            warnings.warn(self.warns, stacklevel=1)
        self.device.peak = self.device.held + self.needs
        found = batch["x"] * 2
        if self.device.recording is None:
            self.taken += 1
        else:
            self.device.recording.output, self.device.recording.again = found, lambda: batch["x"] * 2
        return found

    def take(self, length, value=1.0):
        found = self.graphs({"x": torch.full((length,), value)})
        assert found.tolist() == [2 * value] * length


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_a_shape_is_taken_recorded_and_replayed(device):
    owner = Owner(device)
    for value in (1.0, 2.0, 3.0):
        owner.take(4, value)
    assert (owner.taken, len(owner.graphs)) == (1, 1)
    owner.take(5)
    assert (owner.taken, len(owner.graphs)) == (2, 1)


def test_what_a_step_returned_stays(device):
    owner = Owner(device)
    owner.take(2)
    first, second = (owner.graphs({"x": torch.full((2,), value)}) for value in (3.0, 4.0))
    assert (first.tolist(), second.tolist()) == ([6, 6], [8, 8])


def test_no_shape_is_recorded_beyond_the_most(device):
    owner = Owner(device)
    for length in [*range(1, MOST + 4)] * 3:
        owner.take(length)
    assert len(owner.graphs) == MOST


def test_where_there_is_no_room_a_step_comes_as_it_is_and_is_not_asked_again(device, caplog):
    owner = Owner(device, needs=30 * GB)
    for _ in range(5):
        owner.take(4)
    assert (owner.taken, len(owner.graphs), device.emptied) == (5, 0, 1)
    owner.take(6), owner.take(6)
    assert caplog.text.count("no room to record every step") == 1
    owner.needs = GB
    for _ in range(3):
        owner.take(5)
    assert len(owner.graphs) == 1, "a smaller one fits beside the largest: 31.5 of 64"


def test_out_of_memory_amid_a_recording_is_a_step_as_it_comes(device):
    owner = Owner(device)
    device.amid = torch.OutOfMemoryError("none left")
    for _ in range(3):
        owner.take(4)
    assert (owner.taken, len(owner.graphs)) == (3, 0)
    device.amid = None
    for _ in range(2):
        owner.take(5)
    assert len(owner.graphs) == 1


def test_a_recording_that_fails_ends_it_also_for_shapes_that_were_recorded(device):
    owner = Owner(device)
    for _ in range(3):
        owner.take(4)
    device.amid = RuntimeError("operation not permitted\nwhen stream is capturing")
    owner.take(5)
    words = r"^client\.cuda_graphs: .* cannot be recorded \(RuntimeError: operation not permitted\); set it to false$"
    for length in (5, 5, 4):
        with pytest.raises(FederaError, match=words):
            owner.take(length)


def test_a_step_that_waits_is_not_recorded(device):
    owner = Owner(device)
    device.waits = True
    for _ in range(3):
        owner.take(4)
    assert (owner.taken, len(owner.graphs)) == (3, 0)
    device.waits = False
    for _ in range(3):
        owner.take(5)
    assert len(owner.graphs) == 0, "what waits once more than at first is not tried again"


def test_a_step_that_waits_the_first_time_alone_is_recorded(device):
    owner = Owner(device)
    for length in (4, 5):
        device.waits = True
        owner.take(length)
        device.waits = False
        for _ in range(3):
            owner.take(length)
    assert (owner.taken, len(owner.graphs)) == (4, 2)


def test_warnings_of_a_step_are_passed_on_once_and_torchs_of_the_search_never(device):
    owner = Owner(device)
    owner.warns = "something else"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for length in (3, 4, 5):
            owner.take(length)
    assert [str(warning.message) for warning in said] == ["something else"]
