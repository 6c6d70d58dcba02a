"""A self-attention whose query, key and value are read off its input together.

These three and the residual have one input. Its rows are packed once for all of the maps, and on the way back
one pass sums the gradients of all four.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from federa.cpu import native
from federa.cpu.ends import FusedOutput
from federa.cpu.frozen import FrozenLinear, Packed, entry, packed, sum_of_maps, sum_of_products
from federa.cpu.fused import at
from federa.cpu.plain import is_transforming
from federa.models import outputs

_log = logging.getLogger(__name__)
PARTS = {"query", "key", "value", "dropout"}


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """A frozen matrix, what is added to what it makes, and low-rank factors if there are any.

    Attributes:
        matrix: `(out, in)`.
        bias: `(out,)` or None; it may train.
        A: `(rank, in)`.
        B: `(out, rank)`.
        scale: of B A.
    """

    matrix: Packed
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 0.0


def map_of(layer: nn.Linear, x: Tensor) -> Map | None:
    """Return what a layer is, if that is a frozen matrix on tiles, perhaps with low-rank factors."""
    factors = () if type(layer) is FrozenLinear else getattr(layer, "factors", None)
    if factors is None:
        return None
    matrix = packed(layer, x, *factors[:2])
    return None if matrix is None else Map(matrix, layer.bias, *factors)


def read(layers: Sequence[nn.Linear], x: Tensor, width: int) -> tuple[list[Tensor], Tensor]:
    """Return what layers make of `(batch, length, in)`, by heads, and x for its other readers.

    Args:
        layers: all of them read x.
        x: see above.
        width: of a head.

    Returns:
        `(batch, heads, length, width)` of each layer.
    """
    # Clients side by side have factors of their own.
    maps = [] if is_transforming() else [map_of(layer, x) for layer in layers]
    known = [m for m in maps if m is not None and m.matrix.weight.shape == layers[0].weight.shape]
    if len(known) < len(layers):
        return [layer(x).unflatten(-1, (-1, width)).transpose(1, 2) for layer in layers], x
    tensors = (t for m in known for t in (m.bias, m.A, m.B))
    *made, same = Maps.apply([m.matrix for m in known], [m.scale for m in known], width, x, *tensors)
    return made, same if x.requires_grad else x


class Maps(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """What several maps of one shape make of one input, and that input for whoever else reads it.

    Takes (packed matrices, scales, width of a head, x, then of each map: bias, A and B or None), x `(batch,
    length, in)`. Gives `(batch, heads, length, width)` of each map, and x.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, matrices: list[Packed], scales: list[float], width: int, x: Tensor, *own: Tensor | None
    ) -> tuple[Tensor, ...]:
        wide, own = x.contiguous(), tuple(None if t is None else t.contiguous() for t in own)
        cols, depth = matrices[0].weight.shape
        rows = x.numel() // depth
        made = [x.new_empty(*x.shape[:-1], cols) for _ in matrices]
        lows = [None if A is None else x.new_empty(rows, len(A)) for A in own[1::3]]
        table = [
            entry(matrix.forward, y, bias, (A, B, low), scale, transposed=True)
            for matrix, bias, A, B, scale, y, low in zip(
                matrices, own[::3], own[1::3], own[2::3], scales, made, lows, strict=True
            )
        ]
        entries = (native.Map * len(table))(*table)
        shape = (len(table), rows, depth, cols)
        matrices[0].library.linear_each(at(wide), entries, *shape, torch.get_num_threads())
        ctx.matrices, ctx.scales, ctx.shape = matrices, scales, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(wide if any(low is not None for low in lows) else None, *lows, *own)
        heads = [y.view(*x.shape[:-1], cols // width, width).transpose(1, 2) for y in made]
        if not ctx.needs_input_grad[3]:
            needs = ctx.needs_input_grad[4:]
            still = [y for i, y in enumerate(heads) if not any(needs[3 * i : 3 * i + 3])]
            ctx.mark_non_differentiable(*still)
        return (*heads, x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        matrices, scales, needs_x = ctx.matrices, ctx.scales, ctx.needs_input_grad[3]
        x, *saved = ctx.saved_tensors
        lows, own, needs = saved[: len(scales)], saved[len(scales) :], ctx.needs_input_grad[4:]
        library, (depth, cols) = matrices[0].library, matrices[0].weight.shape
        arrived = [
            (i, grad.transpose(1, 2).reshape(-1, depth).contiguous())
            for i, grad in enumerate(grads[:-1])
            if grad is not None
        ]
        d_lows = {
            i: grad.new_empty(len(grad), len(A)) if needs_x else (grad @ B).mul_(scales[i])
            for i, grad in arrived
            for A, B in [own[3 * i + 1 : 3 * i + 3]]
            if A is not None
        }
        d_x = None if grads[-1] is None else grads[-1].contiguous()
        if needs_x and arrived:
            entries = []
            for i, grad in arrived:
                A, B = own[3 * i + 1 : 3 * i + 3]
                entries.append(entry(matrices[i].backward, grad, None, (B, A, d_lows.get(i)), scales[i]))
            made = torch.empty(ctx.shape, dtype=torch.bfloat16)
            d_x = sum_of_maps(library, entries, (depth, cols), d_x, made)
        d_own: list[Tensor | None] = [None] * len(own)
        for i, grad in arrived:
            of_bias, of_A, of_B = needs[3 * i : 3 * i + 3]
            d_own[3 * i : 3 * i + 3] = (
                grad.sum(0) if of_bias else None,
                sum_of_products(library, d_lows[i], x.view(-1, cols)) if of_A else None,
                sum_of_products(library, lows[i], grad, transposed=True) if of_B else None,
            )
        return None, None, None, d_x if needs_x else None, *d_own


class FusedSelfAttention(nn.Module):  # type: ignore[misc, unused-ignore]
    """The self-attention of BERT and its kin."""

    def forward(self, hidden_states: Tensor, *masks: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        """Return `(batch, length, width)` of the like, and the weights if they are told."""
        return self.attend(hidden_states, *masks, **options)[:2]

    def attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any, Tensor]:
        """Return what `forward` does, and the input for its other readers."""
        layers = [self.query, self.key, self.value]
        heads, same = read(layers, hidden_states, self.attention_head_size)
        return *self.weigh(heads, attention_mask, options), same

    def weigh(
        self, heads: Sequence[Tensor], mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Return what queries find, `(batch, queries, width)`, and the weights if they are told."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        rate = self.dropout.p if self.training else 0.0
        options = {name: value for name, value in options.items() if name != "past_key_values"}
        out, weights = attend(self, *heads, mask, dropout=rate, scaling=self.scaling, **options)
        return out.flatten(-2), weights


class FusedAttention(nn.Module):  # type: ignore[misc, unused-ignore]
    """The attention sub-layer of BERT and its kin: the residual is handed over by the self-attention."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """Return `(batch, length, width)` of the like, and the weights if they are told."""
        out, weights, residual = self.self.attend(hidden_states, attention_mask, **options)
        return self.output(out, residual), weights


def read_together(model: Any) -> None:
    """Give a model self-attentions that read their input once, if it says the same with them."""
    found = [module for module in model.modules() if is_known(module)]
    classes = {module: FusedAttention for module in found}
    exchange(model, classes | {module.self: FusedSelfAttention for module in found})


def is_fused(end: Any) -> bool:
    """Return whether a module is the fused end of a sub-layer."""
    return type(end) is FusedOutput


def is_known(module: nn.Module, is_end: Callable[[Any], bool] = is_fused) -> bool:
    """Return whether a module is an attention sub-layer of the kind that is known here.

    Args:
        module: of a model.
        is_end: says whether what comes after the self-attention is the end of such a sub-layer.
    """
    own = getattr(module, "self", None)
    return (
        isinstance(own, nn.Module)
        and {name for name, _ in own.named_children()} == PARTS
        and is_end(getattr(module, "output", None))
        and not getattr(own, "is_decoder", True)
    )


def exchange(model: Any, classes: Mapping[nn.Module, type[nn.Module]]) -> None:
    """Make modules ones of other classes, if the model computes the same with them.

    Only numbers tell: logits of made-up texts, before and after.
    """
    if not classes:
        return
    before = {module: module.__class__ for module in classes}
    training, alike = model.training, False
    model.eval()
    try:
        expected = _said(model)
        for module, by in classes.items():
            module.__class__ = by
        found = _said(model)
        telling = not torch.allclose(*expected)  # a head of zeros would say the same of anything
        alike = (
            telling
            and expected.shape == found.shape
            and torch.allclose(found, expected, atol=1e-4, rtol=1e-3)
        )
    except Exception as error:  # it reads more, or is called in another way
        _log.info("attention stays as it came: %s: %s", type(error).__name__, error)
    finally:
        if not alike:
            for module, original in before.items():
                module.__class__ = original
        model.train(training)


def _said(model: Any) -> Tensor:
    """Return all that a model says of two texts, one of them shorter than the batch: `(2, numbers)`."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 6), generator=draws)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        said = outputs(model, ids, mask)  # of a span its start and its end
    return torch.cat([logits.float().flatten(1) for logits in said], 1)
