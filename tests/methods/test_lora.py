"""LoRA, rsLoRA and DoRA compute what peft computes, forward and backward, and merge away without a trace."""

import math

import pytest
import torch

from federa.methods import LoRA
from federa.methods.lora import lora_layers, scale_of
from federa.state import fingerprint
from federa.types import FederaError

peft = pytest.importorskip("peft")
VALUE = "bert.encoder.layer.1.attention.self.value"


def randomised(loaded, method, setup):
    """Prepare a checkpoint and move every factor and magnitude away from its start."""
    state = method.prepare(loaded.model, setup)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in state:
            if "lora" in name or "magnitude" in name:
                parameter = loaded.model.get_parameter(name)
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dict(lora_layers(loaded.model))


def in_peft(loaded, layers, config):
    """Return a peft model of the same checkpoint, with the factors of ours."""
    model = peft.get_peft_model(loaded.model, config)
    others = {}
    with torch.no_grad():
        for name, layer in layers.items():
            other = others[name] = model.get_submodule(f"base_model.model.{name}")
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.magnitude is not None:
                other.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return model.eval(), others


CASES = {
    "lora": (LoRA(rank=4, alpha=8), {"lora_alpha": 8}),
    "default alpha": (LoRA(rank=4), {"lora_alpha": 4}),
    "rslora": (LoRA(rank=4, alpha=8, rslora=True), {"lora_alpha": 8, "use_rslora": True}),
    "dora": (LoRA(rank=4, alpha=6, dora=True), {"lora_alpha": 6, "use_dora": True}),
    "rslora and dora": (
        LoRA(rank=4, alpha=6, rslora=True, dora=True),
        {"lora_alpha": 6, "use_rslora": True, "use_dora": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(load, setup_for, batch, case):
    method, options = CASES[case]
    ours, base = load(), load()
    plain = base.model(**batch).logits.detach()
    layers = randomised(ours, method, setup_for(ours))
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], **options)
    theirs, others = in_peft(base, layers, config)

    out, expected = ours.model(**batch), theirs(**batch)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=0)
    assert (out.logits - plain).abs().max() > 0.05, "the factors do something"

    out.loss.backward()
    expected.loss.backward()
    for name, layer in layers.items():
        other = others[name]
        pairs = [(layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)]
        if method.dora:
            pairs.append((layer.magnitude, other.lora_magnitude_vector))
        for mine, modules in pairs:
            assert mine.grad.abs().max() > 1e-6
            torch.testing.assert_close(mine.grad, modules["default"].weight.grad, atol=1e-6, rtol=1e-4)
        assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [(None, False, 1.0), (32.0, False, 2.0), (8.0, False, 0.5), (None, True, 4.0), (8.0, True, 2.0)],
)
def test_scale(load, setup_for, alpha, rslora, expected):
    assert scale_of(alpha, 16, rslora=rslora) == expected
    loaded = load()
    LoRA(rank=16, alpha=alpha, rslora=rslora).prepare(loaded.model, setup_for(loaded))
    assert {layer.scale for _, layer in lora_layers(loaded.model)} == {expected}


@pytest.mark.parametrize("dora", [False, True])
def test_the_start(load, setup_for, batch, dora):
    loaded = load()
    before = loaded.model(**batch).logits
    weight = loaded.model.get_submodule(VALUE).weight.detach().clone()
    state = LoRA(rank=4, dora=dora).prepare(loaded.model, setup_for(loaded))
    torch.testing.assert_close(loaded.model(**batch).logits, before, atol=1e-5, rtol=0)
    assert torch.count_nonzero(state[f"{VALUE}.lora_B"]) == 0
    # uniform in +-1/sqrt(in_features), Hu et al.'s code
    bound, largest = 1 / math.sqrt(32), float(state[f"{VALUE}.lora_A"].abs().max())
    assert 0.9 * bound < largest <= bound
    assert torch.equal(loaded.model.get_submodule(VALUE).weight, weight)
    assert (f"{VALUE}.magnitude" in state) == dora
    if dora:
        expected = torch.linalg.vector_norm(weight, dim=1)
        torch.testing.assert_close(state[f"{VALUE}.magnitude"], expected)


def test_the_start_comes_from_the_seed_alone(load, setup_for):
    states = []
    for seed, other_randomness in ((5, 0), (5, 1), (6, 0)):
        loaded = load()
        torch.manual_seed(other_randomness)
        states.append(fingerprint(LoRA(rank=4).prepare(loaded.model, setup_for(loaded, seed=seed))))
    assert states[0] == states[1] != states[2]


def test_every_matrix_draws_for_itself(load, setup_for):
    loaded = load()
    state = LoRA(rank=4).prepare(loaded.model, setup_for(loaded))
    assert len({tensor.sum().item() for name, tensor in state.items() if name.endswith("lora_A")}) == 4


@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_trained_model_in_plain_layers(load, setup_for, batch, case):
    method, _ = CASES[case]
    loaded = load()
    names = [name for name, _ in loaded.model.named_parameters()]
    layers = randomised(loaded, method, setup_for(loaded))
    trained = loaded.model(**batch).logits.detach()
    method.merge(loaded.model)
    torch.testing.assert_close(loaded.model(**batch).logits, trained, atol=1e-5, rtol=0)
    assert [name for name, _ in loaded.model.named_parameters()] == names
    assert all(type(layer) is torch.nn.Linear for layer in layers.values())


def test_a_rank_larger_than_a_matrix_is_refused(load, setup_for):
    loaded = load()
    with pytest.raises(FederaError, match=r"method\.rank: 33 is larger .*self\.query \(32, 32\)"):
        LoRA(rank=33).prepare(loaded.model, setup_for(loaded))
    fits = load()
    LoRA(rank=32).prepare(fits.model, setup_for(fits))
