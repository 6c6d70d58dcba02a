"""Encoded examples as flat arrays, and batches cut from them.

A data set of any size is a handful of NumPy arrays: worker processes share them without a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federa.types import IntArray

GPU_LENGTH_MULTIPLE = 16  # tokens
IGNORED_LABEL = -100  # the label that torch's cross entropy skips
IGNORED_POSITION = 1 << 20  # beyond every token: transformers' loss for spans skips it


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of unequal length in one array: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray[tuple[int], np.dtype[np.int32]]
    offsets: IntArray

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> Ragged:
        """Return the rows, flattened."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.fromiter((v for row in rows for v in row), dtype=np.int32, count=int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """Return the rows of some parts, one after the other."""
        lengths = np.concatenate([[0], *(part.lengths() for part in parts)])
        return cls(np.concatenate([part.values for part in parts]), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Return one row."""
        return self.values[self.offsets[number] : self.offsets[number + 1]]

    def lengths(self) -> IntArray:
        """Return the length of every row, `(num_rows,)`."""
        return np.diff(self.offsets)

    def padded(self, rows: IntArray, fill: int, width: int | None = None) -> Tensor:
        """Return the chosen rows as int64, `(len(rows), width)` (the longest's), filled up at the right."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        width = width or int(lengths.max(initial=1))
        out = np.full((len(rows), width), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            out[i, : lengths[i]] = self.values[self.offsets[row] : self.offsets[row + 1]]
        return torch.from_numpy(out)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised data set: rows that a model takes, one an example, or several where a text is split.

    Attributes:
        features: model inputs by name (`input_ids`, perhaps `token_type_ids`).
        targets: what the model's loss asks for, by the name that the model gives it: an integer a row
            `(num_rows,)`, or one a token (`Ragged`).
        pad: what fills up each feature and each target; a row whose targets are all fill counts in no loss.
        example: the example that each row is part of, `(num_rows,)`, ascending from 0 without gaps; None
            where row i is example i.
        reference: what decoding and scoring need besides; the task's own.
    """

    features: Mapping[str, Ragged]
    targets: Mapping[str, IntArray | Ragged]
    pad: Mapping[str, int]
    example: IntArray | None = None
    reference: Any = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.features["input_ids"])

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self) if self.example is None else int(self.example[-1]) + 1

    def num_whole(self, rows: int) -> int:
        """Return how many examples have all of their rows among the first so many."""
        if self.example is None or rows == len(self):
            return min(rows, self.num_examples)
        return int(self.example[rows])

    def rows_of(self, examples: IntArray) -> IntArray:
        """Return the rows of some examples, example by example."""
        if self.example is None:
            return examples
        first = np.searchsorted(self.example, examples)
        counts = np.searchsorted(self.example, examples, side="right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows: IntArray = np.repeat(first, counts) + within
        return rows

    def lengths(self) -> IntArray:
        """Return the number of tokens of every row, `(num_rows,)`."""
        return self.features["input_ids"].lengths()

    def num_among(self, other: Encoded) -> int:
        """Return how many of the examples are, token by token, examples of another set, too."""
        own = Counter(self._tokens())
        return sum(own[tokens] for tokens in {tokens for tokens in other._tokens() if tokens in own})

    def _tokens(self) -> Iterator[bytes]:
        """Yield the tokens of every example, of all of its rows."""
        first = np.arange(len(self) + 1)
        if self.example is not None:
            first = np.searchsorted(self.example, np.arange(self.num_examples + 1))
        held = self.features["input_ids"]
        for start, end in pairwise(held.offsets[first]):
            yield held.values[start:end].tobytes()

    def batch(
        self, rows: IntArray, device: torch.device, *, labels: bool = True, multiple: int | None = None
    ) -> dict[str, Tensor]:
        """Return model inputs for some rows.

        Args:
            rows: their numbers.
            device: where the inputs are to be.
            labels: whether the targets are among them.
            multiple: what the length is to be a multiple of; None for what suits the device.

        Returns:
            By name `(len(rows), length)` or `(len(rows),)`: the longest row's length, rounded up, but not
            beyond the longest row of the data set, which the model has room for.
        """
        lengths = self.lengths()
        longest, step = int(lengths[rows].max(initial=1)), multiple or padding_multiple(device)
        width = longest if step == 1 else min(-(-longest // step) * step, max(longest, int(lengths.max())))
        inputs = {name: held.padded(rows, self.pad[name], width) for name, held in self.features.items()}
        own = torch.from_numpy(lengths[rows])
        inputs["attention_mask"] = (torch.arange(width)[None, :] < own[:, None]).long()
        for name, target in self.targets.items() if labels else ():
            inputs[name] = (
                target.padded(rows, self.pad[name], width)
                if isinstance(target, Ragged)
                else torch.from_numpy(target[rows])
            )
        return moved(inputs, device)


def padding_multiple(device: torch.device) -> int:
    """Return what lengths are rounded up to: on a GPU few shapes are to be met (`cuda_graphs.py`)."""
    return GPU_LENGTH_MULTIPLE if device.type == "cuda" else 1


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device.

    A copy to a GPU goes on beside the host's work if it is from pinned memory; from any other the host waits.
    """
    if device.type == "cuda":
        batch = {name: t.pin_memory() for name, t in batch.items()}
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


def training_batches(
    rows: IntArray, lengths: IntArray, batch_size: int, rng: np.random.Generator
) -> Iterator[IntArray]:
    """Yield the batches of one epoch: shuffled, yet each of examples of like length.

    Sorting by length inside windows of eight shuffled batches saves most of the padding and keeps the
    make-up of batches random; the batches themselves come in random order.
    """
    shuffled = rng.permutation(rows)
    window = 8 * batch_size
    batches = []
    for start in range(0, len(shuffled), window):
        part = shuffled[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def evaluation_batches(rows: IntArray, lengths: IntArray, batch_size: int) -> list[IntArray]:
    """Return batches of all rows, longest first, so that padding is small and memory peaks at once."""
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
