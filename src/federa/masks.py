"""Attention masks and relative positions that are made without a wait for the device."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from federa.models import family

if TYPE_CHECKING:
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

ATTENTION = "federa_ready"  # before the name of the attention that it runs


def ready_mask(  # noqa: PLR0917
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """Return an additive mask, `(batch, 1, 1 or queries, keys)`, without a look at any value.

    Transformers' own leaves a mask out when nothing is hidden. No batched pass can ask about that, and on an
    accelerator the question is a wait: the host stands still in every step until the device has caught up.
    """
    seen = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if mask_function is not bidirectional_mask_function:
        device = options.get("device") if attention_mask is None else attention_mask.device
        batch, head, query, key = (
            torch.arange(n, device=device) for n in (batch_size, 1, q_length, kv_length)
        )
        pattern = mask_function(
            batch[:, None, None, None], head[:, None, None], query[:, None], key + options.get("kv_offset", 0)
        )
        seen = pattern if seen is None else seen & pattern
    if seen is None:
        return None
    nothing = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, nothing, torch.finfo(dtype).min)


def use_ready_masks(model: Any) -> None:
    """Let a transformers model's own attention take masks that no step waits for.

    A family that does not go through transformers' registry (DeBERTa) makes its masks itself, and those do
    not wait; but its relative positions do, in every step.
    """
    if not getattr(model, "_supports_attention_backend", False):
        if family(model) == "deberta-v2":
            encoder = model.base_model.encoder
            encoder.get_rel_pos = functools.partial(_kept_positions, weakref.ref(encoder), {})
        return
    name = model.config._attn_implementation
    AttentionInterface.register(f"{ATTENTION}_{name}", ALL_ATTENTION_FUNCTIONS[name])
    AttentionMaskInterface.register(f"{ATTENTION}_{name}", ready_mask)
    model.set_attn_implementation(f"{ATTENTION}_{name}")


def _kept_positions(
    encoder: weakref.ref[DebertaV2Encoder],
    kept: dict[tuple[int, int, torch.device], Tensor | None],
    hidden: Tensor,
    query: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor | None:
    """Return DeBERTa's relative positions, which only lengths settle: each pair of lengths is computed once.

    To compute them transformers copies a number to the device and waits.
    """
    if given is not None:
        return given
    key = ((hidden if query is None else query).size(-2), hidden.size(-2), hidden.device)
    if key not in kept:
        own = encoder()
        assert own is not None, "it calls"
        kept[key] = type(own).get_rel_pos(own, hidden, query)
    return kept[key]
