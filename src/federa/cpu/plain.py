"""Dropout and attention out of torch's own operations, with the statistics of the originals.

A mask drawn as torch draws it costs one call of a serial generator for every element, which makes dropout
the largest part of a small encoder's step. Here one 64-bit draw serves four elements, and masks are applied
to the bits of the numbers. The attention is transformers' eager one as a single differentiable function,
which keeps what its backward pass needs and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STEPS = 1 << 15  # a rate is met to 1 / 65536; the scale is that of the rate that is met, so means are exact
_LANES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class Stackable(torch.autograd.Function):  # type: ignore[misc]
    """A function with a `vmap` rule of its own, for the engine that trains several clients in one pass.

    Torch asks for a `setup_context` before it looks for such a rule, that is for a forward pass that cannot
    see what will need a gradient: ours keep theirs, and are handed to `vmap` by `_Lifted`.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:  # noqa: D102
        return _Lifted.apply(cls, *args) if is_transforming() else super().apply(*args)

    @classmethod
    def one_by_one(
        cls, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
    ) -> tuple[Tensor, int]:
        """Apply the function to one client after the other: the rule that always holds."""
        lanes = [
            cls.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        return torch.stack(lanes), 0


class _Lifted(torch.autograd.Function):  # type: ignore[misc]
    """(function, arguments): the function's rule, in the form that torch asks for."""

    @classmethod
    def apply(cls, function: type[Stackable], *args: Any) -> Any:
        # Torch comes back here, outside of `vmap`, with arguments that no client has a part in.
        return super().apply(function, *args) if is_transforming() else function.apply(*args)

    @staticmethod
    def forward(function: type[Stackable], *args: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: type[Stackable], *args: Any
    ) -> tuple[Any, Any]:
        out, dims = function.vmap(info, in_dims[1:], *args)
        return out, dims


def draw_mask(shape: torch.Size, rate: float, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Return a dropout mask, int16: all bits set where an element is kept, none where it is dropped.

    Args:
        shape: of the mask.
        rate: the probability that an element is dropped, 0 <= rate < 1.
        device: of the mask; None for the CPU.

    Returns:
        The mask, and the scale that keeps the mean.
    """
    kept = max(1, round((1 - rate) * _STEPS))
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = draws.view(torch.int16)[:count].view(shape)
    # 15 random bits, minus the number of outcomes that keep, are negative for exactly those: spread the sign.
    mask.bitwise_and_(_STEPS - 1).sub_(kept).bitwise_right_shift_(15)
    return mask, _STEPS / kept


def apply_mask(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return `x * scale` where the mask keeps, else zero; x is float32, float16 or bfloat16."""
    lanes = _LANES[x.dtype]
    bits = mask if lanes is torch.int16 else mask.to(lanes)
    return x.contiguous().view(lanes).bitwise_and(bits).view(x.dtype).mul_(scale)


class PlainDropout(Stackable):
    """Dropout of a tensor of any shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:  # noqa: D102
        mask, ctx.scale = draw_mask(x.shape, rate)
        ctx.save_for_backward(mask)
        return apply_mask(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (mask,) = ctx.saved_tensors
        return apply_mask(grads[0], mask, ctx.scale), None

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, rate: float
    ) -> tuple[Tensor, int | None]:
        return PlainDropout.apply(x, rate), in_dims[0]


class PlainAttention(torch.autograd.Function):  # type: ignore[misc]
    """softmax(Q K^T + mask), dropped out, times V; Q is scaled already.

    Q, K, V are `(batch * heads, length, width)`; the additive mask broadcasts to
    `(batch, heads, length, length)`.
    """

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float
    ) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores.view(mask.shape[0], -1, *scores.shape[1:]).add_(mask)
        weights = torch.softmax(scores, dim=-1)
        kept, ctx.drop_scale = (None, 1.0) if rate == 0 else draw_mask(weights.shape, rate)
        dropped = weights if kept is None else apply_mask(weights, kept, ctx.drop_scale)
        ctx.save_for_backward(q, k, v, weights, kept)
        return torch.bmm(dropped, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, k, v, weights, kept = ctx.saved_tensors
        grad = grads[0]
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        dropped = weights
        if kept is not None:
            dropped = apply_mask(weights, kept, ctx.drop_scale)
            d_weights = apply_mask(d_weights, kept, ctx.drop_scale)
        d_v = torch.bmm(dropped.transpose(1, 2), grad)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        return torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q), d_v, None, None
