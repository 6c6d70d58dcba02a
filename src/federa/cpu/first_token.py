"""The last layer of an encoder for a task that reads its first token alone.

A classifier takes what the last layer says of the first token. Every other token's query, attention, and
feed-forward pass in that layer is work that nothing depends on: of a network of six layers a seventh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from federa.cpu.ends import FusedOutput

_PARTS = {"query", "key", "value", "dropout"}


class FirstTokenAttention(nn.Module):  # type: ignore[misc, unused-ignore]
    """The self-attention of BERT and its kin, for the first query alone."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """Return `(batch, 1, width)` of `(batch, length, width)`, and no weights."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

        query = heads(self.query(hidden_states[:, :1]))
        key, value = heads(self.key(hidden_states)), heads(self.value(hidden_states))
        mask = None if attention_mask is None else attention_mask[..., :1, :]  # if it differs between queries
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        rate = self.dropout.p if self.training else 0.0
        options = {name: value for name, value in options.items() if name != "past_key_values"}
        out, weights = attend(self, query, key, value, mask, dropout=rate, scaling=self.scaling, **options)
        return out.flatten(-2), weights


class FirstTokenOutput(FusedOutput):
    """The end of that sub-layer: the residual is the first token's."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return `(batch, 1, width)`."""
        return super().forward(hidden_states, input_tensor[:, :1])


def read_first_token_only(model: Any) -> None:
    """Spare a model what its last layer computes of other tokens, if its output does not depend on them.

    Only numbers tell: logits of made-up texts, before and after. The last hidden state is `(batch, 1, width)`
    then, so a model that is asked to give its hidden states keeps them.
    """
    last = [m for m in model.modules() if _is_known(m)][-1:]
    if not last or model.config.output_hidden_states:
        return
    (attention,) = last
    before = attention.self.__class__, attention.output.__class__
    training = model.training
    model.eval()
    try:
        expected = _logits(model)
        attention.self.__class__, attention.output.__class__ = FirstTokenAttention, FirstTokenOutput
        found = _logits(model)
        telling = not torch.allclose(*expected)  # a head of zeros would say the same of anything
        same = (
            telling
            and expected.shape == found.shape
            and torch.allclose(found, expected, atol=1e-4, rtol=1e-3)
        )
    except Exception:  # it reads more, or is called in another way
        same = False
    if not same:
        attention.self.__class__, attention.output.__class__ = before
    model.train(training)


def _is_known(module: nn.Module) -> bool:
    """Return whether a module is an attention sub-layer of the kind that is known here."""
    own = getattr(module, "self", None)
    return (
        isinstance(own, nn.Module)
        and {name for name, _ in own.named_children()} == _PARTS
        and type(getattr(module, "output", None)) is FusedOutput
        and not getattr(own, "is_decoder", True)
    )


def _logits(model: Any) -> Tensor:
    """Return what a model says of two texts, one of them shorter than the batch."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 6), generator=draws)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()
