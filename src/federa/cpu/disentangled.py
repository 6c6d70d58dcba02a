"""DeBERTa's disentangled attention (He et al. 2021, equation 4), of the relative positions that a text has.

Scores are the sum of three products: content with content, content with relative position, and position with
content. The model of transformers multiplies by all of its 512 relative positions, for every text of a batch,
and then gathers those that there are. A text of length L has 2L - 1 of them, each on a diagonal of the
scores: here only these are multiplied by, and a diagonal is read through strides.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    build_relative_position,
)

from federa.cpu.plain import Stackable, apply_mask, draw_mask

TABLE_BYTES = 1 << 21  # of a table of scores by relative position


def on_diagonals(table: Tensor) -> Tensor:
    """Return what a table by relative position says of every pair of positions, as a view.

    Args:
        table: `(..., length, 2 * length - 1)`, contiguous; row i, column d is for i and i + d - (length - 1).

    Returns:
        `(..., length, length)`; row i, column j is for i and j.
    """
    length, width = table.shape[-2:]
    strides = (*table.stride()[:-2], width - 1, 1)
    return table.as_strided((*table.shape[:-1], length), strides, table.storage_offset() + length - 1)


def _tabled(scores: Tensor) -> Tensor:
    """Return a table that says of every pair of positions what is given, and zero of others."""
    length = scores.shape[-1]
    table = scores.new_zeros(*scores.shape[:-1], 2 * length - 1)
    on_diagonals(table).copy_(scores)
    return table


def _hide_(scores: Tensor, mask: Tensor, part: slice, heads: int) -> None:
    """Add a client's mask to the scores of each of its heads, those groups of all that are a part."""
    if len(mask) == 1:
        scores += mask
    elif part == slice(None):
        scores.unflatten(0, (-1, heads)).add_(mask[:, None])
    else:
        scores += mask[torch.arange(part.start, part.start + len(scores)) // heads]


def _parts(q: Tensor) -> Iterator[slice]:
    """Yield groups a few at a time: tables that stay in the cache, out of memory that is used again.

    On a GPU all of them at once.
    """
    if q.device.type != "cpu":
        yield slice(None)
        return
    _, batch, length, _ = q.shape
    size = max(1, TABLE_BYTES // (batch * length * (2 * length - 1) * q.element_size()))
    for first in range(0, len(q), size):
        yield slice(first, first + size)


class DisentangledAttention(Stackable):
    """softmax(Q K' + Q P' + (K R')' + mask), dropped out, times V: (q, k, v, p, r, mask, rate).

    q, k, v are `(groups, batch, length, width)`, a group being a head (of a client); q is scaled. p and r are
    the projected relative positions, `(groups, 2 * length - 1, width)`: those of keys by key - query
    ascending, those of queries, scaled, by query - key ascending. The mask is additive, `(clients, batch,
    length, length)`.
    """

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: Tensor, r: Tensor, mask: Tensor, rate: float
    ) -> Tensor:
        weights, out = q.new_empty(*q.shape[:-1], q.shape[-2]), torch.empty_like(q)
        kept = None if rate == 0 else torch.empty(weights.shape, dtype=torch.int16, device=q.device)
        ctx.drop_scale = 1.0
        for part in _parts(q):
            scores = q[part] @ k[part].transpose(-1, -2)
            for content, positions, flipped in ((q, p, False), (k, r, True)):
                table = torch.bmm(content[part].flatten(1, 2), positions[part].transpose(1, 2))
                said = on_diagonals(table.view(*scores.shape[:-1], -1))
                scores += said.transpose(-1, -2) if flipped else said
            _hide_(scores, mask, part, len(q) // len(mask))
            weights[part] = dropped = torch.softmax(scores, dim=-1)
            if kept is not None:
                kept[part], ctx.drop_scale = draw_mask(scores.shape, rate, q.device)
                dropped = apply_mask(dropped, kept[part], ctx.drop_scale)
            out[part] = dropped @ v[part]
        ctx.save_for_backward(q, k, v, p, r, weights, kept)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, k, v, p, r, weights, kept = ctx.saved_tensors
        d_q, d_k, d_v, d_p, d_r = (torch.empty_like(t) for t in (q, k, v, p, r))
        for part in _parts(q):
            grad, dropped = grads[0][part], weights[part]
            d_weights = grad @ v[part].transpose(-1, -2)
            if kept is not None:
                dropped = apply_mask(dropped, kept[part], ctx.drop_scale)
                d_weights = apply_mask(d_weights, kept[part], ctx.drop_scale)
            d_v[part] = dropped.transpose(-1, -2) @ grad
            d_scores = torch._softmax_backward_data(d_weights, weights[part], -1, weights.dtype)
            flipped = d_scores.transpose(-1, -2)
            d_q[part], d_k[part] = d_scores @ k[part], flipped @ q[part]
            for d_content, content, d_positions, positions, said in (
                (d_q, q, d_p, p, d_scores),
                (d_k, k, d_r, r, flipped),
            ):
                table = _tabled(said).flatten(1, 2)
                d_content[part].flatten(1, 2).baddbmm_(table, positions[part])
                d_positions[part] = torch.bmm(table.transpose(1, 2), content[part].flatten(1, 2))
        return d_q, d_k, d_v, d_p, d_r, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        clients = info.batch_size

        def lanes(i: int) -> Tensor:
            tensor, dim = args[i], in_dims[i]
            return tensor.expand(clients, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        tensors = [lanes(i).flatten(0, 1).contiguous() for i in range(5)]
        out = DisentangledAttention.apply(*tensors, lanes(5).flatten(0, 1), args[6])
        return out.unflatten(0, (clients, -1)), 0


@functools.cache  # never dropped: recorded steps read them where they are
@torch.inference_mode(False)  # type: ignore[untyped-decorator, unused-ignore]  # training may meet it again
def positions_of(
    length: int, buckets: int, furthest: int, span: int, device: torch.device
) -> tuple[slice, Tensor, Tensor]:
    """Return which relative positions a text of some length has.

    Args:
        length: of the text.
        buckets: of relative positions; -1 for none: each is its own.
        furthest: the largest distance that is told from others.
        span: half the number of rows of the table of embeddings.
        device: of the rows of `p` and of `r`; the first call for a length may wait for it.

    Returns:
        The rows that occur; and the rows of `p` and of `r` of `DisentangledAttention`, counted from the first
        of these, `(2 * length - 1,)` each.
    """
    one = torch.zeros(1, length, 1)
    relative = build_relative_position(one, one, bucket_size=buckets, max_position=furthest)[0]
    ascending = torch.cat([relative[0].flip(0)[:-1], relative[:, 0]])  # of query - key
    keys = torch.clamp(ascending + span, 0, 2 * span - 1).flip(0)
    queries = torch.clamp(span - ascending.flip(0), 0, 2 * span - 1)
    first, last = min(keys.min(), queries.min()), max(keys.max(), queries.max())
    return slice(int(first), int(last) + 1), (keys - first).to(device), (queries - first).to(device)


class FastDisentangledSelfAttention(DisentangledSelfAttention):  # type: ignore[misc, unused-ignore]
    """A drop-in for DeBERTa's attention: the same to rounding, with dropout masks of its own."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False, **options: Any
    ) -> tuple[Tensor, Any]:
        """Return `(batch, length, width)` of `(batch, length, width)`, and no weights."""
        rel_embeddings = options.get("rel_embeddings")
        asked_more = output_attentions or options.get("query_states") is not None
        if asked_more or rel_embeddings is None or attention_mask.ndim != 4:
            answer = super().forward(hidden_states, attention_mask, output_attentions, **options)
            return cast("tuple[Tensor, Any]", answer)
        count, scale = self.num_attention_heads, (3 * self.attention_head_size) ** -0.5
        held, keys, queries = positions_of(
            hidden_states.shape[1], self.position_buckets, self.max_relative_positions, self.pos_ebd_size,
            hidden_states.device,
        )  # fmt: skip
        positions = self.pos_dropout(rel_embeddings[held])[None]
        key_proj = self.key_proj if self.share_att_key else self.pos_key_proj
        query_proj = self.query_proj if self.share_att_key else self.pos_query_proj

        def heads(x: Tensor) -> Tensor:  # (batch, length, width) to (heads, batch, length, width / heads)
            return x.unflatten(-1, (count, -1)).permute(2, 0, 1, 3).contiguous()

        out = DisentangledAttention.apply(
            heads(self.query_proj(hidden_states) * scale),
            heads(self.key_proj(hidden_states)),
            heads(self.value_proj(hidden_states)),
            heads(key_proj(positions)[:, keys])[:, 0],
            heads(query_proj(positions)[:, queries] * scale)[:, 0],
            _additive(attention_mask, hidden_states.dtype),
            self.dropout.p if self.training else 0.0,
        )
        return out.permute(1, 2, 0, 3).flatten(-2), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides pairs of positions, `(1, batch, length, length)`.

    Args:
        mask: `(batch, 1, length, length)`, true where a query sees a key.
        dtype: of the scores.
    """
    nothing = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask.bool()[:, 0], nothing, torch.finfo(dtype).min)[None]


def attend_along_diagonals(model: nn.Module) -> None:
    """Give a model of the family the fast attention, where on random numbers it computes the same."""
    for module in model.modules():
        if type(module) is not DisentangledSelfAttention:
            continue
        training = module.training
        module.eval()
        try:
            expected = _probe(module)
            module.__class__ = FastDisentangledSelfAttention
            same = torch.allclose(_probe(module), expected, atol=1e-4, rtol=1e-3)
        except Exception:  # it has no relative positions, or one kind of the two
            same = False
        if not same:
            module.__class__ = DisentangledSelfAttention
        module.train(training)


def _probe(module: DisentangledSelfAttention) -> Tensor:
    """Return what an attention says of two made-up texts, one of them shorter."""
    draws = torch.Generator().manual_seed(0)
    width, length = module.query_proj.in_features, 7
    dtype = module.query_proj.weight.dtype
    rows = torch.randn(2 * module.pos_ebd_size, width, generator=draws).to(dtype)
    texts = torch.randn(2, length, width, generator=draws).to(dtype)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    mask[1, :, 4:], mask[1, :, :, 4:] = False, False
    relative = build_relative_position(
        texts, texts, bucket_size=module.position_buckets, max_position=module.max_relative_positions
    )
    with torch.no_grad():
        out = module(texts, mask, relative_pos=relative, rel_embeddings=rows)[0]
    return cast("Tensor", out).float()
