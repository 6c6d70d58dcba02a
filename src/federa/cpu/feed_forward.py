"""A feed-forward sub-layer as one function: what goes in is also the residual, and gets one gradient."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from federa.cpu.ends import FusedIntermediate, FusedOutput, packed_of
from federa.cpu.frozen import Packed, entry, gelu, multiply, norm, sum_of_maps
from federa.cpu.fused import norm_backward
from federa.cpu.plain import is_transforming


class FeedForward(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """LN(dropout(GELU(x U' + a) W' + b) + x): (packed U, packed W, a, x, b, weight, beta, eps, rate)."""

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any,
        up: Packed,
        down: Packed,
        of_up: Tensor | None,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        beta: Tensor,
        eps: float,
        rate: float,
    ) -> Tensor:
        wide, slope = gelu(up, x, of_up, wanted=any(ctx.needs_input_grad))
        y, *saved = norm(ctx, down, wide, bias, x, weight, beta, eps, rate)
        ctx.up, ctx.down = up, down
        ctx.save_for_backward(*saved, slope)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        up, down, slope = ctx.up, ctx.down, ctx.saved_tensors[3]
        _, _, of_up, of_x, *of_ends = ctx.needs_input_grad
        d_h, d_bias, d_x, *d_norm = norm_backward(ctx, grads[0], (True, of_ends[0], True, *of_ends[1:]))
        d_of_up = None
        if of_up or of_x:
            cols = down.weight.shape[1]
            d_wide = multiply(down.library, cast("Tensor", d_h), down.backward, cols, after=slope)
            d_of_up = d_wide.flatten(0, -2).sum(0) if of_up else None
            if of_x:  # the residual's is our own: the other is added in place
                entries = [entry(up.backward, d_wide)]
                d_x = sum_of_maps(up.library, entries, up.weight.shape, d_x, cast("Tensor", d_x))
        return None, None, d_of_up, d_x if of_x else None, d_bias, *d_norm, None, None


def feed_forward_chunk(layer: Any, attention_output: Tensor) -> Tensor:
    """Return what a layer of BERT's kind makes of `(..., width)` after its attention."""
    x, first, last = attention_output, layer.intermediate, layer.output
    after, rate = last.LayerNorm, last.dropout.p if last.training else 0.0
    if not is_transforming():  # clients have their own biases
        up = packed_of(first.dense, x)
        down = packed_of(last.dense, x.new_empty(0, last.dense.in_features), x, after.weight, after.bias)
        if up is not None and down is not None and up.weight.shape == down.weight.shape[::-1]:
            ends = (last.dense.bias, after.weight, after.bias, after.eps, rate)
            return cast("Tensor", FeedForward.apply(up, down, first.dense.bias, x, *ends))
    return cast("Tensor", last(first(x), x))


# transformers asks for it at every call, and finding it out takes as long as a small kernel.
feed_forward_chunk.__signature__ = inspect.signature(feed_forward_chunk)  # type: ignore[attr-defined]


def join(model: nn.Module) -> None:
    """Give the layers of a model, where they are of BERT's kind, their feed-forward half as one function."""
    for layer in model.modules():
        parts = type(getattr(layer, "intermediate", None)), type(getattr(layer, "output", None))
        if parts == (FusedIntermediate, FusedOutput) and hasattr(layer, "feed_forward_chunk"):
            layer.feed_forward_chunk = MethodType(feed_forward_chunk, layer)
