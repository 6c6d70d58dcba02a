"""Adapters start as the identity, sit where the papers put them, and compute h + up(act(down(h)))."""

import math

import pytest
import torch

from federa.methods import Adapter
from federa.methods.adapter import AdapterLinear
from federa.state import fingerprint

FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert")


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_the_output_is_what_it_was_and_only_adapters_train(load, setup_for, batch, family, placement):
    loaded = load(family)
    before = loaded.model(**batch).logits
    pristine = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    state = Adapter(placement=placement, width=8).prepare(loaded.model, setup_for(loaded))
    torch.testing.assert_close(loaded.model(**batch).logits, before, atol=1e-5, rtol=0)

    places = adapters(loaded.model)
    assert len(places) == (4 if placement == "houlsby" else 2)
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert set(state) == loaded.head | {f"{place}.{part}" for place in places for part in parts}
    for name, parameter in loaded.model.named_parameters():
        assert parameter.requires_grad == (name in state), name
        if name in pristine:
            assert torch.equal(parameter, pristine[name]), name
    assert set(pristine) <= {n for n, _ in loaded.model.named_parameters()}, (
        "no name of the checkpoint changes"
    )


def test_places(load, setup_for):
    """Houlsby: after attention and after feed-forward. Pfeiffer: after feed-forward only."""
    found = {}
    for placement in ("houlsby", "pfeiffer"):
        loaded = load()
        Adapter(placement=placement, width=8).prepare(loaded.model, setup_for(loaded))
        found[placement] = list(adapters(loaded.model))
    layers = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert found["pfeiffer"] == [f"{layer}.output.dense" for layer in layers]
    assert found["houlsby"] == [
        f"{layer}.{e}" for layer in layers for e in ("attention.output.dense", "output.dense")
    ]


@pytest.mark.parametrize(
    ("activation", "act"),
    [
        ("relu", lambda v: max(v, 0.0)),
        ("tanh", math.tanh),
        ("gelu", lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2)))),
    ],
)
def test_forward_by_hand(activation, act):
    layer = torch.nn.Linear(1, 2)
    layer.__class__ = AdapterLinear
    layer.activation = activation
    layer.down, layer.up = torch.nn.Linear(2, 1), torch.nn.Linear(1, 2)
    numbers = {
        "weight": [[2.0], [-1.0]],
        "bias": [0.5, 1.0],
        "down.weight": [[1.0, -2.0]],
        "down.bias": [0.25],
        "up.weight": [[3.0], [-4.0]],
        "up.bias": [0.1, 0.2],
    }
    layer.load_state_dict({name: torch.tensor(value) for name, value in numbers.items()})
    for x in (2.0, -1.0):
        h0, h1 = 2 * x + 0.5, -x + 1
        z = act(h0 - 2 * h1 + 0.25)
        expected = torch.tensor([[h0 + 3 * z + 0.1, h1 - 4 * z + 0.2]])
        torch.testing.assert_close(layer(torch.tensor([[x]])), expected, atol=1e-5, rtol=1e-5)


def test_the_activation_of_the_recipe_is_used(load, setup_for, batch):
    logits = {}
    for activation in ("gelu", "relu", "tanh"):
        loaded = load()
        Adapter(width=8, activation=activation).prepare(loaded.model, setup_for(loaded))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in adapters(loaded.model).values():
                layer.up.weight.copy_(torch.randn(layer.up.weight.shape, generator=generator))
                layer.down.weight.copy_(torch.randn(layer.down.weight.shape, generator=generator))
        logits[activation] = loaded.model(**batch).logits
    assert not torch.allclose(logits["gelu"], logits["relu"], atol=1e-4)
    assert not torch.allclose(logits["tanh"], logits["relu"], atol=1e-4)


def test_the_start_is_small_and_seeded(load, setup_for):
    states = []
    for seed, other_randomness in ((5, 0), (5, 1), (6, 0)):
        loaded = load()
        torch.manual_seed(other_randomness)
        states.append(Adapter(width=16).prepare(loaded.model, setup_for(loaded, seed=seed)))
    assert fingerprint(states[0]) == fingerprint(states[1]) != fingerprint(states[2])
    for name, tensor in states[0].items():
        if name.endswith("down.weight"):
            assert tensor.shape == (16, 32)
            assert 0.008 < float(tensor.std()) < 0.012
        elif "down" in name or "up" in name:
            assert torch.count_nonzero(tensor) == 0, name


def test_gradients_reach_the_adapter(load, setup_for, batch):
    """A zero `up` must still learn at the first step, and `down` at the second."""
    loaded = load()
    Adapter(width=8).prepare(loaded.model, setup_for(loaded))
    loaded.model(**batch).loss.backward()
    for layer in adapters(loaded.model).values():
        assert layer.up.weight.grad.abs().max() > 0
        layer.up.weight.data.sub_(layer.up.weight.grad)
        assert layer.weight.grad is None
    loaded.model(**batch).loss.backward()
    assert all(layer.down.weight.grad.abs().max() > 0 for layer in adapters(loaded.model).values())
