"""What the contract tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from federa.registry import C, Registry
from federa.types import State

TOLERANCE = 1e-6


def copied(state: State) -> State:
    """Return a deep copy."""
    return {name: tensor.clone() for name, tensor in state.items()}


def check_same(
    states: Sequence[State], expected: Sequence[State], message: str = "an input was changed in place"
) -> None:
    """Check that states are equal to the bit."""
    for state, other in zip(states, expected, strict=True):
        same = state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)
        assert same, message


def check_close(state: State, expected: State, message: str) -> None:
    """Check that two states are equal to rounding."""
    for name, tensor in expected.items():
        worst = float((state[name] - tensor).abs().max())
        assert worst <= TOLERANCE, f"{message}: {name} is off by {worst:.1e}"


def check_config(component: C, registry: Registry[C]) -> None:
    """Check that a recipe can name the component and give back what it was."""
    assert component.name in registry.names(), f"{component.name!r} is not registered as a {registry.kind}"
    parsed = registry.parse(json.loads(component.model_dump_json()))
    assert parsed == component, f"the config does not survive JSON: {component!r} became {parsed!r}"


def check_like(state: State, expected: State, what: str) -> None:
    """Check for float32 and the keys and shapes of another state."""
    assert state.keys() == expected.keys(), f"{what}: keys {sorted(state)}, not {sorted(expected)}"
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, f"{what}: {name} is {tensor.dtype}, not float32"
        assert tensor.shape == expected[name].shape, f"{what}: {name} has shape {tuple(tensor.shape)}"
