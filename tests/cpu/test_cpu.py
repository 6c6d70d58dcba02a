"""The CPU's dropout and attention: the statistics of the originals, and their numbers where nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from federa.cpu import ATTENTION, FastDropout, FusedOutput, cpu_attention, native, speed_up
from federa.cpu.attention import FusedAttention
from federa.cpu.plain import apply_mask, draw_mask
from federa.seeds import torch_seeded
from small import FAMILIES

PRECISIONS = {torch.float32: 5e-6, torch.bfloat16: 4e-2}  # relative to the norm of what is true


@pytest.fixture(params=[nullcontext, native.without], ids=["kernels", "no kernels"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the compiled kernels, and as where there is no compiler."""
    with request.param():
        yield


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


def test_dropout_passes_the_gradient_of_what_it_kept(kernels: None) -> None:
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


def test_dropout_depends_on_the_seed_only(kernels: None) -> None:
    layer, x = FastDropout(0.5), torch.ones(999)
    drawn = []
    for seed in (5, 5, 6):
        with torch_seeded(seed):
            drawn.append(layer(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def classifier(folder: Path, head: str = "SequenceClassification") -> nn.Module:
    """Return a model in which every part counts, with numbers that bfloat16 has.

    Fresh matrices are so small that gradients hardly pass through the attention, and biases are zero.
    """
    with torch_seeded(3):
        model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            folder, attn_implementation="eager", num_labels=2 if head == "QuestionAnswering" else 3
        )
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(10)
                    if module.bias is not None:
                        module.bias.normal_(std=0.2)
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of four texts, two of them padded, and their mask."""
    ids = torch.randint(5, 30, (4, 12), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(12) < torch.tensor([12, 8, 12, 4])[:, None]).long()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sped_up_model_computes_what_the_original_does(
    family: str, dtype: torch.dtype, kernels: None, encoder: Callable[[str], Path]
) -> None:
    ids, mask = texts()
    truth, fast = classifier(encoder(family)).double(), classifier(encoder(family))
    speed_up(fast)
    assert (fast.config._attn_implementation == ATTENTION) == fast._supports_attention_backend
    assert not any(type(m) is nn.Dropout for m in fast.modules())
    for parameter in fast.parameters():  # rotary tables stay float32
        parameter.data = parameter.data.to(dtype)
    ours, theirs = (model(input_ids=ids, attention_mask=mask).logits for model in (fast, truth))
    for logits in (ours, theirs):
        logits.square().sum().backward()
    assert (ours - theirs).norm() < PRECISIONS[dtype] * theirs.norm()
    others = dict(truth.named_parameters())
    largest = max(float(p.grad.norm()) for p in others.values() if p.grad is not None)
    for name, parameter in fast.named_parameters():
        expected = others[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is None:
            continue
        if name.endswith(("key.bias", "k_lin.bias")):  # moves all scores of a query alike: truly zero
            assert parameter.grad.norm() < 1e-3 * largest, name
            continue
        assert expected.norm() > 1e-3 * largest, f"{name} does not count"
        assert (parameter.grad - expected).norm() < PRECISIONS[dtype] * expected.norm(), name


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_read_together_whatever_the_head(
    family: str, dtype: torch.dtype, kernels: None, encoder: Callable[[str], Path]
) -> None:
    """A head that says more than one thing, as one of spans does, is compared in all of them."""
    ids, mask = texts()
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        fast, original = (classifier(encoder(family), head) for _ in range(2))
        speed_up(fast)
        for parameter in fast.parameters():
            parameter.data = parameter.data.to(dtype)
        layers = fast.config.num_hidden_layers
        together = sum(type(module) is FusedAttention for module in fast.modules())
        assert together == (layers if family in {"bert", "roberta", "electra"} else 0), head
        ours, theirs = (model(input_ids=ids, attention_mask=mask).to_tuple() for model in (fast, original))
        assert len(ours) == len(theirs) == 1 + (head == "QuestionAnswering")
        if head != "SequenceClassification":  # what is padding has no label, and so no gradient
            shown = mask.bool() if head == "QuestionAnswering" else mask.bool()[..., None]
            ours, theirs = ([out * shown for out in outputs] for outputs in (ours, theirs))
        sum(out.float().square().sum() for out in (*ours, *theirs)).backward()
        grads = [
            torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
            for model in (fast, original)
        ]
        for one, other in (*zip(ours, theirs, strict=True), grads):
            assert (one - other).norm() < PRECISIONS[dtype] * other.norm(), head


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
def test_a_row_that_is_hidden_altogether_weighs_all_keys_alike(dtype: torch.dtype, kernels: None) -> None:
    """As in transformers' eager attention, where the lowest number swallows the scores that it is added to."""
    with torch_seeded(5):
        ours = [torch.randn(2, 2, 40, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
        grad = torch.randn(2, 40, 2, 8, dtype=dtype)
    mask = torch.zeros(2, 1, 1, 40, dtype=dtype)
    mask[0, ..., 30:] = mask[1] = torch.finfo(dtype).min
    out = cpu_attention(nn.Module().eval(), *ours, mask, scaling=1.0)[0]
    out.backward(grad)
    theirs = [t.detach().double().requires_grad_() for t in ours]
    q, k, v = theirs
    truth = ((q @ k.transpose(2, 3) + mask.double()).softmax(-1) @ v).transpose(1, 2)
    truth.backward(grad.double())
    for one, other in ((out, truth), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))):
        for row in range(2):
            assert (one[row] - other[row]).norm() < PRECISIONS[dtype] * other[row].norm()


class Ending(nn.Module):
    """The end of a sub-layer as families write it, and as none should be mistaken for it."""

    def __init__(self, order: str = "usual", **norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 8)
        self.LayerNorm = nn.LayerNorm(8, **norm)
        self.dropout = nn.Identity() if order == "none" else nn.Dropout(0.5)
        self.order = order

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        x, r = hidden_states, input_tensor
        if self.order == "last":
            return self.dropout(self.LayerNorm(self.dense(x) + r))
        if self.order == "late":
            return self.LayerNorm(self.dropout(self.dense(x) + r))
        if self.order == "first":
            return self.LayerNorm(self.dense(self.dropout(x)) + r)
        if self.order == "twice":
            return self.LayerNorm(self.dropout(self.dropout(self.dense(x))) + r)
        if self.order == "picky":
            return self.LayerNorm(self.dropout(self.dense(x)) + r[:4, :, self.dense.no_such_part])
        return self.LayerNorm(self.dropout(self.dense(x)) + r)


@pytest.mark.parametrize("order", ["usual", "last", "late", "first", "twice", "picky", "none"])
def test_only_what_drops_out_in_the_same_place_is_replaced(order: str) -> None:
    model = nn.Sequential(Ending(order)).train()
    nn.init.zeros_(model[0].dense.bias)  # as fresh ones are: a factor would pass through the product
    dropout = model[0].dropout
    speed_up(model)
    assert type(model[0]) is (FusedOutput if order == "usual" else Ending)
    assert model[0].dropout is dropout
    assert model[0].training and not native._switched_off.get()


@pytest.mark.parametrize("norm", [{"bias": False}, {"elementwise_affine": False}, {}])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8), (8,)])
def test_the_end_of_a_sub_layer_takes_any_norm_and_residual(
    norm: dict[str, bool], shape: tuple[int, ...]
) -> None:
    with torch_seeded(4):
        model, x, residual = nn.Sequential(Ending(**norm)).eval(), torch.randn(2, 3, 6), torch.randn(shape)
    expected = model[0](x, residual)
    speed_up(model)
    assert type(model[0]) is FusedOutput
    assert torch.allclose(model[0](x, residual), expected, atol=1e-6)


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
