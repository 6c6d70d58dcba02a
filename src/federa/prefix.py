"""What the frozen layers of an encoder make of a text, computed once.

Below the lowest layer that trains nothing changes in a run, so without dropout the hidden states that enter
that layer depend on the text alone. They are kept, and the next step that meets the text starts there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from federa.data.batches import Encoded, Ragged
from federa.models import free_memory
from federa.seeds import torch_seeded
from federa.types import FederaError, IntArray

SHARE = 0.25  # of the memory that would be free without them, for what a process keeps
KEY = "client.reuse_frozen"
_LENGTHS = (9, 5)  # of made-up texts
_TOLERANCE = 1e-5  # relative, of float32
_Text = tuple[bytes, ...]  # what a row gives the model, one a feature
_log = logging.getLogger(__name__)


class _Entry(nn.Module):  # type: ignore[misc, unused-ignore]
    """Stands for the frozen layers: keeps the first hidden states that come by, and gives them ever after.

    Args:
        layer: one of those that it stands among.
        pair: whether they return attention weights, or None, beside their hidden states.
    """

    def __init__(self, layer: nn.Module, pair: bool) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # ModernBERT chooses a mask by it
        self.pair = pair
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        """Return `(batch, length, width)`."""
        if self.states is None:
            self.states = hidden_states
        return (self.states, None) if self.pair else self.states


class Prefix:
    """The frozen layers of a model below the lowest that trains, and what they made of the texts met so far.

    Args:
        model: prepared by a method, on its device, still in float32.
        holder: the module that holds the list of layers.
        name: of the list in it.
        depth: how many layers are frozen, one at least.
    """

    def __init__(self, model: Any, holder: nn.Module, name: str, depth: int) -> None:
        self._model, self._holder, self._name = model, holder, name
        layers: list[nn.Module] = list(getattr(holder, name))
        self._entry = _Entry(layers[0], pair=False)
        self._below = nn.ModuleList([*layers[:depth], self._entry])
        # Twice: after the first of its layers DeBERTa-v2 may have a convolution, whose result must not count.
        self._above = nn.ModuleList([self._entry, self._entry, *layers[depth:]])
        self._kept: dict[_Text, Tensor] = {}
        self._bytes = 0
        self._device = next(model.parameters()).device
        training = model.training
        try:
            self._check()
        except FederaError:
            raise
        except Exception as error:
            raise FederaError(f"{KEY}: {_refused(model)} ({type(error).__name__}: {error})") from error
        finally:
            model.train(training)
        self._kept, self._bytes = {}, 0

    @contextmanager
    def reused(self, data: Encoded, rows: IntArray) -> Iterator[None]:
        """Let the model start above its frozen layers meanwhile, for a batch of these rows alone."""
        self._entry.states = pad_sequence(self._states(data, rows), batch_first=True)
        with self._layers(self._above):
            yield

    @contextmanager
    def _layers(self, layers: nn.ModuleList) -> Iterator[None]:
        """Let the model have other layers."""
        own = getattr(self._holder, self._name)
        setattr(self._holder, self._name, layers)
        try:
            yield
        finally:
            setattr(self._holder, self._name, own)
            self._entry.states = None

    def _states(self, data: Encoded, rows: IntArray) -> list[Tensor]:
        """Return what enters the lowest trained layer, a row each: `(length, width)`."""
        texts = [tuple(held.row(row).tobytes() for held in data.features.values()) for row in rows]
        new = {text: row for text, row in zip(texts, rows, strict=True) if text not in self._kept}
        fresh = self._computed(data, new) if new else {}
        self._keep(fresh)
        return [fresh[text] if text in fresh else self._kept[text] for text in texts]

    def _computed(self, data: Encoded, new: dict[_Text, int]) -> dict[_Text, Tensor]:
        """Return what the frozen layers make of some rows."""
        lengths = [len(data.features["input_ids"].row(row)) for row in new.values()]
        with torch.no_grad():
            padded = self._entering(data.batch(np.array(list(new.values())), self._device, labels=False))
            # Copies, or the padding stays in memory. Where the first token alone is read, there is no other.
            parts = [states[:length].clone() for states, length in zip(padded, lengths, strict=True)]
        return dict(zip(new, parts, strict=True))

    def _entering(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return what comes out of the frozen layers for a batch, `(batch, length, width)`."""
        with self._layers(self._below):
            self._model.base_model(**inputs)
            states = self._entry.states
        assert states is not None
        return states

    def _keep(self, fresh: dict[_Text, Tensor]) -> None:
        """Keep hidden states if they fit; others are computed again when they are needed."""
        size = sum(t.nbytes for t in fresh.values())
        # By what is free now: workers and other runs on the machine fill up at the same time.
        if fresh and self._bytes + size <= SHARE * (free_memory(self._device) + self._bytes):
            self._kept |= fresh
            self._bytes += size

    def _check(self) -> None:
        """Compare made-up texts with and without reuse: only numbers tell.

        Raises:
            FederaError: they differ, or the frozen layers draw something.
        """
        model, layers = self._model, getattr(self._holder, self._name)
        draws, size = np.random.default_rng(0), model.config.vocab_size
        texts = Ragged.from_rows([draws.integers(size, size=length).tolist() for length in _LENGTHS])
        padding = getattr(model.config, "pad_token_id", None) or 0
        data = Encoded({"input_ids": texts}, {}, {"input_ids": padding})
        rows = np.arange(len(_LENGTHS))
        inputs = data.batch(rows, self._device, labels=False)
        pairs: list[bool] = []
        hook = layers[0].register_forward_hook(lambda *call: pairs.append(isinstance(call[-1], tuple)))
        try:
            model.eval()
            expected = _outputs(model, inputs)
        finally:
            hook.remove()
        self._entry.pair = any(pairs)
        model.train()
        with torch_seeded(0), torch.no_grad():
            if not torch.equal(self._entering(inputs), self._entering(inputs)):
                raise FederaError(
                    f"{KEY}: frozen layers draw their dropout anew in every step; set client.dropout=0"
                )
        model.eval()
        for row in rows:  # each without padding
            self._states(data, rows[row : row + 1])
        with self.reused(data, rows):
            found = _outputs(model, inputs)
        if not all(map(_alike, found, expected)):
            raise FederaError(f"{KEY}: {_refused(model)}")


def frozen_prefix(model: Any, head: frozenset[str]) -> Prefix | None:
    """Return the frozen layers below the lowest that trains, or None, with a warning, if there are none.

    Args:
        model: prepared by a method, on its device, still in float32.
        head: names of the head's parameters, which reads what comes out of the last layer.

    Raises:
        FederaError: a model whose layers are not known, which draws in them, or says something else with them
            left out.
    """
    lists = [
        (holder, name, held)
        for holder in model.modules()
        for name, held in holder.named_children()
        if isinstance(held, nn.ModuleList)
        and len(held)
        and all(isinstance(m, GradientCheckpointingLayer) for m in held)
    ]
    if len(lists) != 1:
        raise FederaError(f"{KEY}: {type(model).__name__} is not one list of layers; set it to false")
    ((holder, name, layers),) = lists
    trained = {p for n, p in model.named_parameters() if p.requires_grad and n not in head}
    in_layers = [trained.intersection(layer.parameters()) for layer in layers]
    depth = next((i for i, own in enumerate(in_layers) if own), len(layers))
    if depth == 0 or trained.difference(*in_layers):  # what is in no layer may stand before the first
        _log.warning("%s: the first layer trains, or what comes before it: there is nothing to reuse", KEY)
        return None
    return Prefix(model, holder, name, depth)


def _refused(model: nn.Module) -> str:
    return f"{type(model).__name__} says something else without its frozen layers; set it to false"


def _outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return what a model says, and its last hidden states, of all that is no padding."""
    hidden = inputs["attention_mask"] == 0
    with torch.no_grad():
        found = [*model(**inputs).to_tuple(), model.base_model(**inputs)[0]]
    tensors = [t for t in found if isinstance(t, Tensor)]
    return [t[~hidden] if t.shape[:2] == hidden.shape else t for t in tensors]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.dist(one, other) <= _TOLERANCE * other.norm())
