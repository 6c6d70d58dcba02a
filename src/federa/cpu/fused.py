"""The compiled kernels as differentiable functions of tensors.

Every function takes contiguous or strided CPU tensors of float32 or bfloat16 and gives the same bits for any
number of threads. Dropout masks are functions of one number drawn from torch's generator: nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from federa.cpu.plain import Stackable

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def takes(*tensors: Tensor) -> bool:
    """Return whether the kernels take these tensors: one dtype, float32 or bfloat16, on the CPU."""
    first = tensors[0].dtype
    return first in _NAMES and all(t.dtype == first and t.device.type == "cpu" for t in tensors)


def at(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie."""
    return None if tensor is None else tensor.data_ptr()


def seed_of(rate: float) -> int:
    """Return the number that dropout's mask is a function of, drawn from torch's generator."""
    return int(torch.randint(2**62, ()).item()) if rate > 0 else 0


class Dropout(Stackable):
    """Dropout of a tensor of any shape: (library, x, rate)."""

    @staticmethod
    def forward(ctx: Any, library: CDLL, x: Tensor, rate: float) -> Tensor:  # noqa: D102
        ctx.library, ctx.rate, ctx.seed = library, rate, seed_of(rate)
        return _dropout(library, x, rate, ctx.seed)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return None, _dropout(ctx.library, grads[0], ctx.rate, ctx.seed), None

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], library: CDLL, x: Tensor, rate: float
    ) -> tuple[Tensor, int | None]:
        return Dropout.apply(library, x, rate), in_dims[1]


def _dropout(library: CDLL, x: Tensor, rate: float, seed: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    function = getattr(library, f"dropout_{_NAMES[x.dtype]}")
    function(at(x), at(y), x.numel(), rate, seed, torch.get_num_threads())
    return y


class Gelu(Stackable):
    """GELU (Hendrycks and Gimpel 2016, the exact form) of h + bias: (library, h, bias or None)."""

    @staticmethod
    def forward(ctx: Any, library: CDLL, h: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        h, bias = h.contiguous(), None if bias is None else bias.contiguous()
        y = torch.empty_like(h)
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        slope = torch.empty_like(h) if wanted else None
        rows, cols = h.numel() // h.shape[-1], h.shape[-1]
        function = getattr(library, f"gelu_{_NAMES[h.dtype]}")
        function(at(h), at(bias), at(y), at(slope), rows, cols, torch.get_num_threads())
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (slope,) = ctx.saved_tensors
        d_h = slope * grads[0]
        d_bias = d_h.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return None, d_h, d_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        library, h, bias = args
        if in_dims[2] is not None or in_dims[1] is None:
            return Gelu.one_by_one(info.batch_size, in_dims, args)
        return Gelu.apply(library, h.movedim(in_dims[1], 0), bias), 0


class Norm(Stackable):
    """LN(dropout(h + bias) + residual): (library, h, bias or None, residual, weight, beta, eps, rate)."""

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any,
        library: CDLL,
        h: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        beta: Tensor,
        eps: float,
        rate: float,
    ) -> Tensor:
        h, residual, weight, beta = (t.contiguous() for t in (h, residual, weight, beta))
        bias = None if bias is None else bias.contiguous()
        rows, cols = h.numel() // h.shape[-1], h.shape[-1]
        y = torch.empty_like(h)
        wanted = any(ctx.needs_input_grad)
        normed = torch.empty_like(h) if wanted else None
        rstd = torch.empty(rows) if wanted else None
        ctx.library, ctx.rate, ctx.seed = library, rate, seed_of(rate)
        getattr(library, f"norm_{_NAMES[h.dtype]}")(
            *map(at, (h, bias, residual, weight, beta, y, normed, rstd)),
            rows,
            cols,
            eps,
            rate,
            ctx.seed,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(normed, rstd, weight)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return None, *norm_backward(ctx, grads[0], ctx.needs_input_grad[1:]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        library, h, bias, residual, *rest = args
        if [i for i, dim in enumerate(in_dims) if dim is not None] != [1, 3]:  # scales of each client's own
            return Norm.one_by_one(info.batch_size, in_dims, args)
        h, residual = h.movedim(in_dims[1], 0), residual.movedim(in_dims[3], 0)
        return Norm.apply(library, h, bias, residual, *rest), 0


def norm_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of (h, bias, residual, weight, beta), the last four where they are needed."""
    normed, rstd, weight = ctx.saved_tensors[:3]
    grad = grad.contiguous()
    rows, cols = grad.numel() // grad.shape[-1], grad.shape[-1]
    d_residual = torch.empty_like(grad)
    d_h = torch.empty_like(grad) if ctx.rate > 0 else None
    getattr(ctx.library, f"norm_backward_{_NAMES[grad.dtype]}")(
        *map(at, (grad, normed, rstd, weight, d_residual, d_h)),
        rows,
        cols,
        ctx.rate,
        ctx.seed,
        torch.get_num_threads(),
    )
    d_h = d_residual if d_h is None else d_h
    flat = grad.view(rows, cols)
    d_bias = d_h.view(rows, cols).sum(0) if needs[1] else None
    d_weight = (flat.float() * normed.view(rows, cols).float()).sum(0).to(weight.dtype) if needs[3] else None
    d_beta = flat.sum(0) if needs[4] else None
    return d_h, d_bias, d_residual, d_weight, d_beta


class Attention(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """softmax(scale * Q K^T + mask), dropped out, times V, on bf16 matrix tiles.

    Takes (library, q, k, v, mask, scale, rate): q, k and v `(batch, heads, length, width)` of bfloat16 with
    neighbours in the last dimension, the mask `(batch, length)` float32 over keys or None.
    Gives `(batch, length, heads, width)`. The weights are never stored: the backward pass computes them again
    from the logarithms of their sums, as in FlashAttention (Dao et al. 2022, algorithm 4).
    """

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any,
        library: CDLL,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        rate: float,
    ) -> Tensor:
        batch, heads, length, width = q.shape
        out = torch.empty(batch, length, heads, width, dtype=q.dtype)
        lse = torch.empty(batch, heads, length) if any(ctx.needs_input_grad) else None
        strides = torch.tensor([step for t in (q, k, v) for step in t.stride()[:3]])
        seed = seed_of(rate)
        tensors = map(at, (q, k, v, strides, mask, out, lse))
        ctx.numbers = (batch, heads, length, width, scale, rate, seed)
        library.attention(*tensors, *ctx.numbers, torch.get_num_threads())
        ctx.library = library
        ctx.save_for_backward(q, k, v, strides, mask, out, lse)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, k, v, strides, mask, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_q, d_k, d_v = (torch.empty_like(out) for _ in range(3))
        tensors = map(at, (q, k, v, strides, mask, out, lse, grad, d_q, d_k, d_v))
        ctx.library.attention_backward(*tensors, *ctx.numbers, torch.get_num_threads())
        return None, d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None, None


class OneQueryAttention(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """softmax(scale * q K^T + mask), dropped out, times V, for one query a head.

    Takes (library, q, k, v, mask, scale, rate): q `(batch, heads, 1, width)`, k and v `(batch, heads, length,
    width)` with neighbours in the last dimension, the mask `(batch, length)` float32 over keys or None.
    Gives `(batch, 1, heads, width)`.
    """

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any,
        library: CDLL,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        rate: float,
    ) -> Tensor:
        batch, heads, length, width = k.shape
        out, weights = q.new_empty(batch, 1, heads, width), torch.empty(batch, heads, length)
        strides = torch.tensor([step for t in (q, k, v) for step in t.stride()[:3]])
        ctx.library, ctx.numbers = library, (batch, heads, length, width, scale, rate, seed_of(rate))
        tensors = map(at, (q, k, v, strides, mask, out, weights))
        getattr(library, f"attention_one_{_NAMES[q.dtype]}")(*tensors, *ctx.numbers, torch.get_num_threads())
        ctx.save_for_backward(q, k, v, strides, weights)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, k, v, strides, weights = ctx.saved_tensors
        batch, heads, length, width = k.shape
        grad, d_q = grads[0].contiguous(), q.new_empty(batch, 1, heads, width)
        d_k, d_v = (k.new_empty(batch, length, heads, width) for _ in range(2))
        tensors = map(at, (q, k, v, strides, weights, grad, d_q, d_k, d_v))
        function = getattr(ctx.library, f"attention_one_backward_{_NAMES[q.dtype]}")
        function(*tensors, *ctx.numbers, torch.get_num_threads())
        return None, d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None, None
