"""The last layer of an encoder for a task that reads its first token alone.

A classifier takes what the last layer says of the first token. Every other token's query, attention, and
feed-forward pass in that layer is work that nothing depends on: of a network of six layers a seventh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from federa.cpu.attention import FusedSelfAttention, exchange, is_fused, is_known, read
from federa.cpu.ends import FusedOutput


class FirstTokenAttention(FusedSelfAttention):
    """The self-attention of BERT and its kin, for the first query alone."""

    def attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any, Tensor]:
        """Return `(batch, 1, width)` of `(batch, length, width)`, no weights, and the first token's input."""
        width = self.attention_head_size
        pair, same = read([self.key, self.value], hidden_states, width)
        first = same[:, :1]
        query = self.query(first).unflatten(-1, (-1, width)).transpose(1, 2)
        mask = None if attention_mask is None else attention_mask[..., :1, :]  # if it differs between queries
        return *self.weigh([query, *pair], mask, options), first


class FirstTokenOutput(FusedOutput):
    """The end of that sub-layer: the residual is the first token's."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return `(batch, 1, width)`."""
        return super().forward(hidden_states, input_tensor[:, :1])


def read_first_token_only(
    model: Any,
    is_end: Callable[[Any], bool] = is_fused,
    of_first_token: Callable[[type[nn.Module]], type[nn.Module]] = lambda end: FirstTokenOutput,
) -> None:
    """Spare a model what its last layer computes of other tokens, if its output does not depend on them.

    The last hidden state is `(batch, 1, width)` then: a model that is asked for its hidden states keeps them.

    Args:
        model: of transformers.
        is_end: see `is_known`.
        of_first_token: gives the class that takes the place of such an end's.
    """
    last = [m for m in model.modules() if is_known(m, is_end)][-1:]
    if last and not model.config.output_hidden_states:
        attention, end = last[0].self, last[0].output
        exchange(model, {attention: FirstTokenAttention, end: of_first_token(type(end))})
