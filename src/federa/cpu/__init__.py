"""What makes a training step on a CPU fast: fused kernels in the place of chains of small operations.

`speed_up` changes a transformers model in place. What it puts in computes what was there before, to rounding;
dropout keeps its rate and its independence, and draws other masks. With a compiler the kernels of
`kernels.cpp` are used (`fused.py`), without one torch's own operations (`plain.py`).
"""

from __future__ import annotations

from ctypes import CDLL
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask

from federa.cpu import frozen, fused, native, plain
from federa.cpu.attention import read_together
from federa.cpu.ends import FusedIntermediate, FusedOutput
from federa.cpu.feed_forward import join
from federa.cpu.first_token import read_first_token_only
from federa.models import family

ATTENTION = "federa_cpu"


class FastDropout(nn.Dropout):  # type: ignore[misc, unused-ignore]
    """A drop-in for `nn.Dropout` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each element dropped at the rate `p` in training, and unchanged otherwise."""
        if not self.training or self.p == 0:
            return x
        library = native.load()
        if library is not None and fused.takes(x):
            return cast("Tensor", fused.Dropout.apply(library, x, self.p))
        return cast("Tensor", plain.PlainDropout.apply(x, self.p))


def cpu_attention(  # noqa: PLR0917
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend, in the form that transformers' `AttentionInterface` calls.

    Args:
        module: the calling layer.
        query: `(batch, heads, length, width)`; key and value likewise, they may be longer.
        key: see query.
        value: see query.
        attention_mask: additive, something that broadcasts to `(batch, heads, length, keys)`, or None.
        scaling: of the scores; None for `width ** -0.5`.
        dropout: the rate for the attention weights.

    Returns:
        `(batch, length, heads, width)`, and no weights.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    rate = dropout if module.training else 0.0
    library = native.load()
    if library is not None and _fits_kernels(query, key, value, attention_mask):
        function = fused.OneQueryAttention if length == 1 else fused.Attention
        if length == 1 or _fits_tiles(library, query, key):
            keys = key.shape[2]
            mask = None
            if attention_mask is not None:
                mask = attention_mask.float().expand(batch, 1, 1, keys).contiguous()
            return cast("Tensor", function.apply(library, query, key, value, mask, scale, rate)), None
    dtype = query.dtype
    if length == 1:  # of the first token alone: next to no work, so with scores in float32, as in the kernels
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = (t.reshape(batch * heads, t.shape[2], width) for t in (query * scale, key, value))
    out = plain.PlainAttention.apply(q, k, v, attention_mask, rate).to(dtype)
    return cast("Tensor", out).view(batch, heads, length, width).transpose(1, 2), None


def _fits_kernels(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether the kernels take these heads: as many of all kinds, and a mask over keys alone."""
    return (
        fused.takes(query, key, value)
        and query.shape[:2] == key.shape[:2]
        and key.shape == value.shape
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and (mask is None or mask.shape[1:3] == (1, 1))
    )


def _fits_tiles(library: CDLL, query: Tensor, key: Tensor) -> bool:
    """Return whether the attention on matrix tiles takes what fits the kernels."""
    return bool(library.has_tiles()) and query.dtype == torch.bfloat16 and query.shape == key.shape


def key_mask(  # noqa: PLR0917
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """Make a mask for `cpu_attention`: of one row for all queries where they see the same keys.

    Returns:
        `(batch, 1, 1, keys)`, additive; `(batch, 1, queries, keys)` where queries differ; None for no mask.
    """
    alike = mask_function is bidirectional_mask_function and not options.get("use_vmap")
    if not alike or attention_mask is None or attention_mask.shape != (batch_size, kv_length):
        return cast(
            "Tensor | None",
            eager_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                mask_function=mask_function,
                attention_mask=attention_mask,
                dtype=dtype,
                **options,
            ),
        )
    hidden = ~attention_mask.bool()
    if options.get("allow_is_bidirectional_skip") and not hidden.any():
        return None
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None, None, :]


def speed_up(model: Any) -> None:
    """Give a transformers model the fast dropout, attention and sub-layer ends that its family can take."""
    for module in list(model.modules()):
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    for module in list(model.modules()):
        parts = {name for name, _ in module.named_children()}
        if parts == {"dense", "LayerNorm", "dropout"} and _is_fast_end(module):
            _replace(module, FusedOutput, inputs=2)
        elif parts == {"dense", "intermediate_act_fn"} and _is_exact_gelu(module.intermediate_act_fn):
            _replace(module, FusedIntermediate, inputs=1)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = frozen.FrozenLinear
    if family(model) == "deberta-v2":
        from federa.cpu.disentangled import attend_along_diagonals  # loads that family's model

        attend_along_diagonals(model)
    if getattr(model, "_supports_attention_backend", False):
        transformers.AttentionInterface.register(ATTENTION, cpu_attention)
        AttentionMaskInterface.register(ATTENTION, key_mask)
        model.set_attn_implementation(ATTENTION)
    join(model)
    read_together(model)
    read_first_token_only(model)


def _is_fast_end(module: nn.Module) -> bool:
    return type(module.LayerNorm) is nn.LayerNorm and type(module.dropout) is FastDropout


def _is_exact_gelu(module: nn.Module) -> bool:
    return type(module) is GELUActivation and module.act is F.gelu


class _Marked(nn.Module):  # type: ignore[misc, unused-ignore]
    """A stand-in for a dropout that shows in the result where it is: it commutes with no other part."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x.abs()


def _replace(module: nn.Module, by: type[nn.Module], inputs: int) -> None:
    """Make a module one of another class, if on random numbers it computes the same.

    The names of its parts say what it probably is; only numbers tell a family that puts them together in
    another way.
    """
    linear = module.dense
    widths = [linear.in_features, linear.out_features][:inputs]
    draws = torch.Generator().manual_seed(0)
    example = [torch.randn(2, 3, width, generator=draws).to(linear.weight.dtype) for width in widths]
    training, original = module.training, module.__class__
    module.eval()
    try:
        with torch.no_grad():
            expected = _probe(module, example)
            module.__class__ = by
            same = all(map(_alike, _probe(module, example), expected))
    except Exception:  # it is called in another way, or asks more of its parts
        same = False
    if not same:
        module.__class__ = original
    module.train(training)


def _probe(module: nn.Module, example: list[Tensor]) -> list[Tensor]:
    """Return what a module computes; if it has a dropout, also with that one marked."""
    out = [module(*example)]
    if hasattr(module, "dropout"):
        dropout, module.dropout = module.dropout, _Marked()
        try:
            with native.without():  # the kernels have a dropout of their own
                out.append(module(*example))
        finally:
            module.dropout = dropout
    return out


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one.float(), other.float(), atol=1e-4, rtol=1e-3))
