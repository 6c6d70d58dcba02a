"""Contracts of partitions, aggregators, server optimizers and wires."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from federa.aggregators import AGGREGATORS, Aggregator
from federa.data.partition import PARTITIONERS, Partitioner, partition_examples
from federa.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from federa.state import num_bytes
from federa.testing.common import check_close, check_config, check_like, check_same, copied
from federa.types import FederaError, Job, State, Update
from federa.wires import WIRES, Wire


def check_partitioner(partitioner: Partitioner) -> None:
    """Check that a partitioner is disjoint, exhaustive and seed-stable, and leaves no client short.

    The rows are of as many groups as there are clients (10 where the data decides), in random order.

    Raises:
        AssertionError: what the partitioner broke.
    """
    num_groups = partitioner.clients or 10
    rows = max(400, 4 * num_groups * partitioner.min_examples)
    groups = np.random.default_rng(0).permutation(np.arange(rows, dtype=np.int64) % num_groups)
    before = groups.copy()
    parts = partition_examples(partitioner, groups, seed=1)

    held = np.sort(np.concatenate(parts))
    assert len(np.unique(held)) == len(held), "a row is held twice"
    assert np.array_equal(held, np.arange(rows)), f"not exactly the rows 0 to {rows - 1} are held"
    assert partitioner.clients in (None, len(parts)), f"{len(parts)} clients, not {partitioner.clients}"
    least = min(len(part) for part in parts)
    assert least >= partitioner.min_examples, f"a client holds {least} rows, below min_examples"

    again = partition_examples(partitioner, groups, seed=1)
    assert len(again) == len(parts) and all(map(np.array_equal, parts, again)), (
        "the same seed splits differently"
    )
    assert np.array_equal(groups, before), "assign() changed the groups in place"
    check_config(partitioner, PARTITIONERS)


def check_aggregator(aggregator: Aggregator) -> None:
    """Check that an aggregator gives a float32 delta that depends on the updates alone.

    The updates are short (L2 norms below 0.5), so that clipping to a norm of 0.5 or more leaves them alone.

    Raises:
        AssertionError: what the aggregator broke.
    """
    params = _state(seed=0, scale=1.0)
    updates = [_update(client, weight) for client, weight in enumerate((1.0, 2.0, 5.0, 3.0))]
    before = [copied(state) for state in (params, *(update.delta for update in updates))]
    result = _aggregate(aggregator, params, updates)

    check_like(result, params, "the delta")
    check_close(
        _aggregate(aggregator, params, updates[:1]), updates[0].delta, "one client alone: not its delta"
    )
    check_close(_aggregate(aggregator, params, updates), result, "a second round from init() differs")
    check_close(_aggregate(aggregator, params, updates[::-1]), result, "the order of the clients matters")
    heavier = [Update(u.job, u.delta, 1000 * u.weight, u.metrics) for u in updates]
    check_close(_aggregate(aggregator, params, heavier), result, "weights times 1000 change the delta")
    check_same([params, *(update.delta for update in updates)], before)
    assert _refuses_nothing(aggregator, params), "finish() of an empty accumulator must raise ValueError"
    check_config(aggregator, AGGREGATORS)


def check_wire(wire: Wire) -> None:
    """Check that a wire gives back what was sent to its rounding, and keeps what it takes away if it says so.

    Raises:
        AssertionError: what the wire broke.
    """
    params, delta = _state(seed=0, scale=1.0), _state(seed=1, scale=0.01)
    before = copied(delta)
    sent = wire.encode(delta)
    found = wire.decode(sent, params)
    check_like(found, params, "what is read")
    assert list(found) == list(params), "what is read comes in another order than it is expected in"
    for name, tensor in delta.items():
        error = float((found[name] - tensor).abs().max())
        assert error <= 0.01 * float(tensor.abs().max()), f"{name!r} comes back off by {error:g}"
    assert num_bytes(sent) == wire.size(params), "size() does not say what is sent"
    again = wire.encode(delta)
    assert all(torch.equal(sent[name], again[name]) for name in sent), "the same update is sent differently"
    spoilt = {name: torch.full_like(tensor, math.nan) for name, tensor in delta.items()}
    try:
        read = wire.decode(wire.encode(spoilt), params)
        assert not all(t.isfinite().all() for t in read.values()), "NaN comes back as a number"
    except FederaError:
        pass
    check_same([delta], [before])
    if wire.remembers:
        total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in delta.items()}
        kept = {name: torch.zeros_like(t) for name, t in delta.items()}
        for _ in range(20):
            whole = {name: t + kept[name] for name, t in delta.items()}
            read = wire.decode(wire.encode(whole), params)
            kept = {name: t - read[name] for name, t in whole.items()}
            total = {name: t + read[name] for name, t in total.items()}
        for name, tensor in delta.items():
            error = float((total[name] / 20 - tensor).abs().max())
            assert error <= 2e-3 * float(tensor.abs().max()), f"{name!r}: the error does not cancel"
    check_config(wire, WIRES)


def check_server_optimizer(optimizer: ServerOptimizer) -> None:
    """Check that a server optimizer is a pure step along the delta, and that a checkpoint can hold its state.

    Raises:
        AssertionError: what the optimizer broke.
    """
    params, delta = _state(seed=0, scale=1.0), _state(seed=1, scale=0.05)
    opt = optimizer.init(params)
    before = [copied(state) for state in (params, delta, opt)]
    new_params, new_opt = optimizer.step(params, delta, opt)

    check_same([params, delta, opt], before)
    check_like(new_params, params, "the new parameters")
    check_like(new_opt, opt, "the new optimizer state")
    along = sum(float(((new_params[name] - params[name]) * delta[name]).sum()) for name in params)
    assert along > 0, "the first step does not go along the delta (which is local minus global)"
    still, _ = optimizer.step(params, {name: torch.zeros_like(p) for name, p in params.items()}, opt)
    check_close(still, params, "a zero delta moves the parameters of a fresh optimizer")

    restored = load(save(dict(new_opt)))
    check_like(restored, new_opt, "the optimizer state read back from safetensors")
    expected, found = (optimizer.step(new_params, delta, state) for state in (new_opt, restored))
    check_same(found, expected, "a step after a safetensors round trip differs")
    check_config(optimizer, SERVER_OPTIMIZERS)


def _state(seed: int, scale: float) -> dict[str, Tensor]:
    """Return a small random state: shapes (3, 2), (4,) and ()."""
    rng = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (3, 2), "a.bias": (4,), "scale": ()}
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def _update(client: int, weight: float) -> Update:
    """Return one client's short update."""
    job = Job(round=0, client_id=client, seed=client, lr=0.1)
    return Update(job, _state(seed=10 + client, scale=0.05), weight, {"loss": 1.0})


def _aggregate(aggregator: Aggregator, params: State, updates: Sequence[Update]) -> State:
    """Return the delta of one round."""
    accumulator = aggregator.init(params)
    for update in updates:
        accumulator = aggregator.accumulate(accumulator, update)
    return aggregator.finish(accumulator)


def _refuses_nothing(aggregator: Aggregator, params: State) -> bool:
    """Return whether a round without updates raises ValueError."""
    try:
        _aggregate(aggregator, params, [])
    except ValueError:
        return True
    return False
