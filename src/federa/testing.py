"""Contract tests for components: call them from the tests of a plugin.

Each takes a component, returns nothing, and raises AssertionError that says what the component broke.
They need no test framework:

    def test_my_partitioner():
        check_partitioner(MyPartitioner(clients=8))
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from federa.aggregators import AGGREGATORS, Aggregator
from federa.data.partition import PARTITIONERS, Partitioner, partition_examples
from federa.registry import C, Registry
from federa.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from federa.types import Job, State, Update

TOLERANCE = 1e-6


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
    _check_config(partitioner, PARTITIONERS)


def check_aggregator(aggregator: Aggregator) -> None:
    """Check that an aggregator gives a float32 delta that depends on the updates alone.

    The updates are short (L2 norms below 0.5), so that clipping to a norm of 0.5 or more leaves them alone.

    Raises:
        AssertionError: what the aggregator broke.
    """
    params = _state(seed=0, scale=1.0)
    updates = [_update(client, weight) for client, weight in enumerate((1.0, 2.0, 5.0, 3.0))]
    before = [_copy(state) for state in (params, *(update.delta for update in updates))]
    result = _aggregate(aggregator, params, updates)

    _check_like(result, params, "the delta")
    _check_close(
        _aggregate(aggregator, params, updates[:1]), updates[0].delta, "one client alone: not its delta"
    )
    _check_close(_aggregate(aggregator, params, updates), result, "a second round from init() differs")
    _check_close(_aggregate(aggregator, params, updates[::-1]), result, "the order of the clients matters")
    heavier = [Update(u.job, u.delta, 1000 * u.weight, u.metrics) for u in updates]
    _check_close(_aggregate(aggregator, params, heavier), result, "weights times 1000 change the delta")
    _check_same([params, *(update.delta for update in updates)], before)
    assert _refuses_nothing(aggregator, params), "finish() of an empty accumulator must raise ValueError"
    _check_config(aggregator, AGGREGATORS)


def check_server_optimizer(optimizer: ServerOptimizer) -> None:
    """Check that a server optimizer is a pure step along the delta, and that a checkpoint can hold its state.

    Raises:
        AssertionError: what the optimizer broke.
    """
    params, delta = _state(seed=0, scale=1.0), _state(seed=1, scale=0.05)
    opt = optimizer.init(params)
    before = [_copy(state) for state in (params, delta, opt)]
    new_params, new_opt = optimizer.step(params, delta, opt)

    _check_same([params, delta, opt], before)
    _check_like(new_params, params, "the new parameters")
    _check_like(new_opt, opt, "the new optimizer state")
    along = sum(float(((new_params[name] - params[name]) * delta[name]).sum()) for name in params)
    assert along > 0, "the first step does not go along the delta (which is local minus global)"
    still, _ = optimizer.step(params, {name: torch.zeros_like(p) for name, p in params.items()}, opt)
    _check_close(still, params, "a zero delta moves the parameters of a fresh optimizer")

    restored = load(save(dict(new_opt)))
    _check_like(restored, new_opt, "the optimizer state read back from safetensors")
    expected, found = (optimizer.step(new_params, delta, state) for state in (new_opt, restored))
    _check_same(found, expected, "a step after a safetensors round trip differs")
    _check_config(optimizer, SERVER_OPTIMIZERS)


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


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _check_same(
    states: Sequence[State], expected: Sequence[State], message: str = "an input was changed in place"
) -> None:
    for state, other in zip(states, expected, strict=True):
        same = state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)
        assert same, message


def _check_close(state: State, expected: State, message: str) -> None:
    for name, tensor in expected.items():
        worst = float((state[name] - tensor).abs().max())
        assert worst <= TOLERANCE, f"{message}: {name} is off by {worst:.1e}"


def _check_like(state: State, expected: State, what: str) -> None:
    """Check for float32 and the keys and shapes of another state."""
    assert state.keys() == expected.keys(), f"{what}: keys {sorted(state)}, not {sorted(expected)}"
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, f"{what}: {name} is {tensor.dtype}, not float32"
        assert tensor.shape == expected[name].shape, f"{what}: {name} has shape {tuple(tensor.shape)}"


def _check_config(component: C, registry: Registry[C]) -> None:
    """Check that a recipe can name the component and give back what it was."""
    assert component.name in registry.names(), f"{component.name!r} is not registered as a {registry.kind}"
    parsed = registry.parse(json.loads(component.model_dump_json()))
    assert parsed == component, f"the config does not survive JSON: {component!r} became {parsed!r}"
