"""The trained parameters of a model in one flat buffer: what goes through them all is a few long passes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from federa.state import trained_parameters
from federa.types import State


class FlatParameters:
    """The trained parameters of a model as views into one flat buffer, with float32 masters.

    Parameters are laid out in four segments: (encoder, head) x (decayed, not decayed), so that an optimizer
    step is four calls on long vectors whatever the model. With `bf16` the model's views are bfloat16 copies.
    The table of token embeddings, where it trains, is a fifth segment at the end, so that a job can leave out
    the rows that its texts do not have (`with_tokens`).

    Attributes:
        names: in the buffer's order.
        master: `(num_trained,)` float32, what the optimizer changes.
        segments: for each non-empty segment its slice, whether it belongs to the head, and whether it decays.
        table: the name of the token embeddings, if they train.
        tokens: which of the table's rows are here, ascending; None for all of them.
    """

    tokens: Tensor | None = None
    _whole: torch.Size  # the table's shape, where `tokens` are some of it

    def __init__(
        self, model: nn.Module, head: frozenset[str], *, bf16: bool, table: str | None = None
    ) -> None:
        named = trained_parameters(model)
        self.table = table if table in named else None
        key = {name: (name == self.table, name in head, p.ndim < 2) for name, p in named.items()}
        self.names = sorted(named, key=lambda name: key[name])  # stable: the model's order within a segment
        self.shapes = {name: named[name].shape for name in self.names}
        sizes = [named[name].numel() for name in self.names]
        ends = list(itertools.accumulate(sizes))
        self.slices = {n: slice(e - s, e) for n, s, e in zip(self.names, sizes, ends, strict=True)}
        device = named[self.names[0]].device
        if bf16:
            for parameter in model.parameters():  # parameters only: rotary tables must stay float32
                parameter.data = parameter.data.bfloat16()
        self.master = torch.empty(ends[-1], device=device)
        self.gradient = torch.zeros_like(self.master)
        self._work = self.master if not bf16 else self.master.bfloat16()
        self._work_gradient = self.gradient if not bf16 else self.gradient.bfloat16()
        self._named = named
        for name in self.names:
            self._give_out(name)
        self.segments = []
        for (_, is_head, plain), members in itertools.groupby(self.names, key=lambda name: key[name]):
            group = list(members)
            span = slice(self.slices[group[0]].start, self.slices[group[-1]].stop)
            self.segments.append((span, is_head, not plain))

    def _give_out(self, name: str) -> None:
        """Make a parameter of the model, and its gradient, views into the buffers."""
        parameter = self._named[name]
        parameter.grad = None
        parameter.data = self.view(self._work, name)
        parameter.grad = self.view(self._work_gradient, name)

    @contextmanager
    def with_tokens(self, tokens: Tensor) -> Iterator[FlatParameters]:
        """Yield the parameters with these rows of the table alone, in the same buffers.

        Meanwhile the model's table is as short. Rows of tokens that no text has get no gradient and stay what
        they were, and so a third to a half of a small encoder is not gone through in every step.

        Args:
            tokens: ascending row numbers of the table, on the CPU as states are.
        """
        assert self.table is not None
        part, span = copy.copy(self), self.slices[self.table]
        end = span.start + len(tokens) * self.shapes[self.table][1]
        part.tokens, part._whole = tokens, self.shapes[self.table]
        part.shapes = {**self.shapes, self.table: torch.Size((len(tokens), self.shapes[self.table][1]))}
        part.slices = {**self.slices, self.table: slice(span.start, end)}
        part.segments = [*self.segments[:-1], (slice(span.start, end), *self.segments[-1][1:])]
        part.master, part.gradient = self.master[:end], self.gradient[:end]
        part._work = part.master if self._work is self.master else self._work[:end]
        apart = self._work_gradient is not self.gradient
        part._work_gradient = self._work_gradient[:end] if apart else part.gradient
        try:
            part._give_out(self.table)
            yield part
        finally:
            self._give_out(self.table)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """Return what a flat vector like `master` holds for a parameter, in its shape."""
        return flat[self.slices[name]].view(self.shapes[name])

    def load_(self, *states: State) -> None:
        """Copy states into the masters and the model."""
        for state in states:
            for name, tensor in state.items():
                own = tensor if self.tokens is None or name != self.table else tensor[self.tokens]
                self.view(self.master, name).copy_(own)
        self.push_()

    def push_(self) -> None:
        """Bring the model's views up to date with the masters."""
        if self._work is not self.master:
            self._work.copy_(self.master)

    def zero_gradient_(self) -> None:
        """Forget the model's gradients."""
        self._work_gradient.zero_()

    def backward_(self, loss: Tensor, *, add: bool = False) -> None:
        """Make the float32 gradient that of a loss, or add that to it: with `bf16` too, sums are float32."""
        apart = self._work_gradient is not self.gradient
        if apart or not add:
            self.zero_gradient_()
        loss.backward()
        if apart and add:
            self.gradient.add_(self._work_gradient)
        elif apart:
            self.gradient.copy_(self._work_gradient)

    def read(self, flat: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return named views of a flat vector like `master`, on the CPU; without names it stays."""
        flat = flat.cpu() if names else flat
        return {name: self.view(flat, name) for name in names}

    def changes(self, start: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return by name what has changed since `start`, a copy of `master`; rows not here have not."""
        found = self.read(self.master - start, names)
        if self.table in found and self.tokens is not None:
            whole = torch.zeros(self._whole)
            found[self.table] = whole.index_copy_(0, self.tokens, found[self.table])
        return found
