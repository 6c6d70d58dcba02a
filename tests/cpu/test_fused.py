"""The compiled kernels against float64: values, gradients, dropout's statistics, and any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from federa.cpu import fused, native
from federa.seeds import torch_seeded

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}  # relative to the norm; bf16 keeps 8 bits
# Whole vectors, a rest, rows that start at odd numbers, one vector, less than one.
WIDTHS = [384, 100, 67, 16, 7]


@pytest.fixture
def library() -> CDLL:
    found = native.load()
    if found is None:
        pytest.skip(f"no compiled kernels: {native.status()}")
    return found


@pytest.fixture
def tiles(library: CDLL) -> CDLL:
    """The kernels, where they have matrix tiles."""
    if not library.has_tiles():
        pytest.skip("this processor has no bf16 matrix tiles")
    return library


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def distance(ours: Tensor, truth: Tensor, least: float = 1e-9) -> float:
    """Return the error relative to the norm of what is true, or to `least` where the truth is (nearly) zero."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=least))


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gelu(library: CDLL, dtype: torch.dtype, width: int, with_bias: bool, threads: int) -> None:
    h, bias = leaf(3, 5, width, dtype=dtype, scale=3), leaf(width, dtype=dtype)
    y = fused.Gelu.apply(library, h, bias if with_bias else None)
    grad = torch.randn_like(y)
    y.backward(grad)
    h2, bias2 = doubled(h, bias)
    truth = F.gelu(h2 + bias2 if with_bias else h2)
    truth.backward(grad.double())
    assert distance(y, truth) < TOLERANCE[dtype]
    assert distance(h.grad, h2.grad) < TOLERANCE[dtype]
    if with_bias:
        assert distance(bias.grad, bias2.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_extreme_numbers(library: CDLL, dtype: torch.dtype) -> None:
    """As the formula has it: of minus infinity, which is infinity times zero, it is not a number.

    Nor is the slope there, nor at plus infinity; the polynomials of bfloat16 give its limits.
    """
    numbers = [0.0, -0.0, 30.0, -30.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor(numbers, dtype=dtype, requires_grad=True)
    y = fused.Gelu.apply(library, x[None], None)[0]
    y.sum().backward()
    (x2,) = doubled(x)
    cdf = (1 + torch.erf(x2 * 0.5**0.5)) / 2
    density = torch.exp(-x2.square() / 2) / (2 * torch.pi) ** 0.5
    assert y.tolist() == pytest.approx((x2 * cdf).tolist(), rel=1e-2, nan_ok=True)
    slope = cdf + x2 * density
    if dtype == torch.bfloat16:
        slope = torch.where(x2.isinf(), cdf, slope)
    assert x.grad.tolist() == pytest.approx(slope.tolist(), rel=1e-2, nan_ok=True)


def test_gelu_of_every_bfloat16(library: CDLL) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].clone().requires_grad_()
    y = fused.Gelu.apply(library, x[None], None)[0]
    y.sum().backward()
    (x2,) = doubled(x)
    truth = F.gelu(x2)
    truth.sum().backward()
    for ours, theirs in ((y, truth), (x.grad, x2.grad)):
        error = (ours.double() - theirs).abs()
        assert (error < 6e-4 + 2**-8 * theirs.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_biases_may_be_strided(library: CDLL, dtype: torch.dtype) -> None:
    wide = [torch.randn(40, dtype=dtype) for _ in range(3)]
    h, residual = torch.randn(2, 5, 20, dtype=dtype)
    (bias, weight, beta), packed = [t[::2] for t in wide], [t[::2].clone() for t in wide]
    ours = fused.Norm.apply(library, h, bias, residual, weight, beta, 1e-5, 0.0)
    theirs = fused.Norm.apply(library, h, packed[0], residual, *packed[1:], 1e-5, 0.0)
    assert torch.equal(ours, theirs)
    assert torch.equal(fused.Gelu.apply(library, h, bias), fused.Gelu.apply(library, h, packed[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_norm(library: CDLL, dtype: torch.dtype, width: int, rate: float, threads: int) -> None:
    h, residual = leaf(4, 5, width, dtype=dtype), leaf(4, 5, width, dtype=dtype)
    bias, weight, beta = (leaf(width, dtype=dtype) for _ in range(3))
    with torch_seeded(3):
        y = fused.Norm.apply(library, h, bias, residual, weight, beta, 1e-5, rate)
    with torch_seeded(3):  # the same draw: what is kept of ones is the mask
        mask = fused.Dropout.apply(library, torch.ones(4, 5, width), rate).double()
    grad = torch.randn_like(y)
    y.backward(grad)
    h2, residual2, bias2, weight2, beta2 = doubled(h, residual, bias, weight, beta)
    truth = F.layer_norm((h2 + bias2) * mask + residual2, (width,), weight2, beta2, 1e-5)
    truth.backward(grad.double())
    assert distance(y, truth) < TOLERANCE[dtype]
    for ours, theirs in ((h, h2), (residual, residual2), (bias, bias2), (weight, weight2), (beta, beta2)):
        assert distance(ours.grad, theirs.grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_meets_its_rate_and_keeps_the_mean(library: CDLL, rate: float, threads: int) -> None:
    with torch_seeded(1):
        y = fused.Dropout.apply(library, torch.ones(1_000_000), rate)
    dropped = float((y == 0).double().mean())
    assert dropped == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 1e6) ** 0.5)
    parts = 65536  # that a rate is a whole number of
    assert y.max().item() == pytest.approx(parts / (parts - round(rate * parts)), rel=1e-6)


def test_dropout_is_independent_between_elements_and_between_draws(library: CDLL) -> None:
    n = 4_000_000
    with torch_seeded(2):
        first, second = (fused.Dropout.apply(library, torch.ones(n), 0.1) for _ in range(2))
    gone, other = ((y == 0).double() - 0.1 for y in (first, second))
    for lag in (1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 384, 1000, 1 << 16):
        assert abs((gone[:-lag] * gone[lag:]).mean().item() / 0.09) < 4.5 / n**0.5, f"lag {lag}"
    assert abs((gone * other).mean().item() / 0.09) < 4.5 / n**0.5
    by_lane = gone.view(-1, 16).mean(dim=0)
    assert by_lane.abs().max() < 4.5 * (0.09 / (n / 16)) ** 0.5
    pairs = gone[:-1] * gone[1:]  # and pairs of neighbours do not tell of the next pair
    assert abs((pairs[:-2] * pairs[2:]).mean().item() / 0.09**2) < 4.5 / n**0.5


def test_dropout_depends_on_the_seed_alone(library: CDLL) -> None:
    x, drawn = torch.ones(5000), []
    for seed, threads in ((5, 1), (5, 2), (6, 1)):
        torch.set_num_threads(threads)
        with torch_seeded(seed):
            drawn.append(fused.Dropout.apply(library, x, 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("length", [64, 33, 1, 96, 128, 200])
@pytest.mark.parametrize("width", [32, 64, 24, 96])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_attention(tiles: CDLL, length: int, width: int, rate: float, threads: int) -> None:
    batch, heads = 3, 2
    tensors = [leaf(batch, length, heads, width, dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = (t.transpose(1, 2) for t in tensors)
    mask = torch.zeros(batch, length)
    mask[1, length // 2 + 1 :] = torch.finfo(torch.bfloat16).min
    with torch_seeded(4):
        y = fused.Attention.apply(tiles, q, k, v, mask, width**-0.5, rate)
    with torch_seeded(4):
        whole = torch.ones(batch, heads, length, (length + 31) // 32 * 32)  # as long as rows of tiles
        kept = fused.Dropout.apply(tiles, whole, rate)[..., :length].double()
    grad = torch.randn_like(y)
    y.backward(grad)
    doubles = doubled(*tensors)
    q2, k2, v2 = (t.transpose(1, 2) for t in doubles)
    scores = q2 @ k2.transpose(2, 3) * width**-0.5 + mask.double()[:, None, None]
    truth = (scores.softmax(-1) * kept @ v2).transpose(1, 2)
    truth.backward(grad.double())
    assert y.shape == (batch, length, heads, width)
    assert distance(y, truth) < TOLERANCE[torch.bfloat16]
    for ours, theirs in zip(
        tensors, doubles, strict=True
    ):  # of one key the weight is 1: no gradient to q and k
        assert (
            distance(ours.grad, theirs.grad, 0.3 * float(grad.float().norm())) < 2 * TOLERANCE[torch.bfloat16]
        )


@pytest.mark.parametrize("length", [40, 96, 200])
def test_attention_is_the_same_for_any_number_of_threads(tiles: CDLL, length: int) -> None:
    tensors = [leaf(4, 3, length, 32, dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch_seeded(1):
            y = fused.Attention.apply(tiles, *tensors, None, 0.2, 0.1)
        results.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", [0, 1, 2], ids=["query", "key", "value"])
def test_attention_lets_nan_through(tiles: CDLL, broken: int) -> None:
    tensors = [leaf(4, 3, 40, 32, dtype=torch.bfloat16) for _ in range(3)]
    with torch.no_grad():
        tensors[broken][2, 1, 5, 0] = float("nan")
    y = fused.Attention.apply(tiles, *tensors, None, 0.2, 0.0)
    found = torch.autograd.grad(y, tensors, torch.ones_like(y))
    q, k, v = doubles = doubled(*tensors)
    truth = ((q @ k.transpose(2, 3) * 0.2).softmax(-1) @ v).transpose(1, 2)
    expected = torch.autograd.grad(truth, doubles, torch.ones_like(truth))
    for ours, theirs in zip((y, *found), (truth, *expected), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("step", [97, 98], ids=["odd", "even"])
def test_attention_reads_heads_wherever_they_lie(tiles: CDLL, step: int) -> None:
    batch, heads, length, width = 2, 3, 64, 32
    rows = torch.randn(3, batch, length, step).bfloat16()[..., 1:]  # heads side by side, off by one number
    apart = [t[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2) for t in rows]
    results = []
    for way in (apart, [t.contiguous() for t in apart]):
        tensors = [t.detach().requires_grad_() for t in way]
        with torch_seeded(3):
            y = fused.Attention.apply(tiles, *tensors, None, 0.2, 0.1)
        results.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), [(64, 32), (33, 24), (200, 64), (5, 7), (1, 32)])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_attention_of_one_query(
    library: CDLL, dtype: torch.dtype, length: int, width: int, rate: float, threads: int
) -> None:
    batch, heads = 3, 2
    tensors = [leaf(batch, keys, heads, width, dtype=dtype) for keys in (1, length, length)]
    q, k, v = (t.transpose(1, 2) for t in tensors)
    mask = torch.zeros(batch, length)
    mask[1, length // 2 + 1 :] = torch.finfo(dtype).min
    mask[2] = torch.finfo(dtype).min  # hidden altogether: all keys alike
    with torch_seeded(4):
        y = fused.OneQueryAttention.apply(library, q, k, v, mask, width**-0.5, rate)
    with torch_seeded(4):
        kept = fused.Dropout.apply(library, torch.ones(batch, heads, 1, length), rate).double()
    grad = torch.randn_like(y)
    y.backward(grad)
    doubles = doubled(*tensors)
    q2, k2, v2 = (t.transpose(1, 2) for t in doubles)
    seen = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    hidden = torch.where(seen > 0, mask.double()[:, None, None], 0.0)
    scores = q2 @ k2.transpose(2, 3) * width**-0.5
    scores = scores * seen + (scores - scores.detach()) * (1 - seen) + hidden
    truth = (scores.softmax(-1) * kept @ v2).transpose(1, 2)
    truth.backward(grad.double())
    assert y.shape == (batch, 1, heads, width)
    assert distance(y, truth) < TOLERANCE[dtype]
    for ours, theirs in zip(tensors, doubles, strict=True):  # of one key the weight is 1
        assert distance(ours.grad, theirs.grad, 0.3 * float(grad.float().norm())) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_one_query_lets_nan_through(library: CDLL, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 3, 1, 32).to(dtype), *torch.randn(2, 2, 3, 9, 32).to(dtype)
    for tensor in (k, v):
        broken = tensor.clone()
        broken[1, 1, 4, 0] = float("nan")
        pair = (broken, v) if tensor is k else (k, broken)
        y = fused.OneQueryAttention.apply(library, q, *pair, None, 0.2, 0.0)
        assert y[1, 0, 1].isnan().any()
        assert not y[0].isnan().any()


def test_other_dtypes_and_mixtures_are_left_to_torch() -> None:
    x = torch.zeros(2)
    assert fused.takes(x, x)
    assert not fused.takes(x, x.bfloat16())
    assert not fused.takes(x.double())
