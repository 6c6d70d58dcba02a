"""The CPU's dropout and attention: the statistics of the originals, and their numbers where nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from federa.cpu import ATTENTION, FastDropout, cpu_attention, speed_up
from federa.cpu.plain import apply_mask, draw_mask
from federa.seeds import torch_seeded
from small import FAMILIES


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_met_and_the_mean_is_kept(rate: float) -> None:
    with torch_seeded(1):
        mask, scale = draw_mask(torch.Size((1000, 1000)), rate)
    dropped = (mask == 0).double().mean().item()
    assert set(mask.unique().tolist()) == {-1, 0}
    assert dropped == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 1e6) ** 0.5 + 2e-5)  # four sigmas
    assert scale == pytest.approx(1 / (1 - rate), rel=4e-4)


def test_elements_are_dropped_independently() -> None:
    """Neighbours (four share one draw), rows and further lags are uncorrelated."""
    with torch_seeded(2):
        mask, _ = draw_mask(torch.Size((4_000_000,)), 0.1)
    gone = (mask == 0).double() - 0.1
    for lag in (1, 2, 3, 4, 5, 8, 64, 1000):
        correlation = (gone[:-lag] * gone[lag:]).mean().item() / 0.09
        assert abs(correlation) < 4 / 4_000_000**0.5, f"lag {lag}"
    by_lane = gone.view(-1, 4).mean(dim=0)
    assert by_lane.abs().max() < 4 * (0.09 / 1e6) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_zeroes_and_scales(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=dtype)
    mask = torch.tensor([-1, 0, -1, 0], dtype=torch.int16)
    before = x.clone()
    assert apply_mask(x, mask, 2.0).tolist() == [2.0, 0.0, 6.0, 0.0]
    assert torch.equal(x, before)


def test_dropout_passes_the_gradient_of_what_it_kept() -> None:
    layer = FastDropout(0.3)
    x = torch.randn(50, 40, requires_grad=True)
    with torch_seeded(0):
        y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    kept = y != 0
    assert torch.allclose(y[kept] / x[kept], x.grad[kept])
    layer.eval()
    assert layer(x) is x


def test_dropout_depends_on_the_seed_only() -> None:
    layer, x = FastDropout(0.5), torch.ones(999)
    drawn = []
    for seed in (5, 5, 6):
        with torch_seeded(seed):
            drawn.append(layer(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sped_up_model_computes_what_the_original_does(family: str, encoder: Callable[[str], Path]) -> None:
    ids = torch.randint(5, 30, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[1, 12:] = 0
    mask[3, 5:] = 0
    results = []
    for fast in (False, True):
        with torch_seeded(3):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                encoder(family), attn_implementation="eager", num_labels=3
            )
        if fast:
            speed_up(model)
            assert (model.config._attn_implementation == ATTENTION) == model._supports_attention_backend
            assert not any(type(m) is nn.Dropout for m in model.modules())
        model.eval()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.square().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert torch.allclose(gradient, other, atol=1e-6, rtol=1e-4), name


def test_attention_gradients_with_dropout_match_finite_differences() -> None:
    module = nn.Module().train()
    tensors = [torch.randn(2, 2, 5, 3, dtype=torch.float32, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, :, :, 3:] = torch.finfo(torch.float32).min

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        with torch_seeded(11):
            return cpu_attention(module, *qkv, mask, dropout=0.4)[0]

    assert torch.autograd.gradcheck(attend, tensors, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0.0)
    plain = cpu_attention(module, *tensors, mask)[0]
    assert not torch.allclose(plain, attend(*tensors))
    q, k, v = (t.detach() for t in tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(plain, expected, atol=1e-6)
