"""Encoded examples as flat arrays, and batches cut from them.

A data set of any size is a handful of NumPy arrays: worker processes share them without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from federa.types import IntArray

IGNORED_LABEL = -100  # the label that torch's cross entropy skips


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

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> IntArray:
        """Return the length of every row, `(num_rows,)`."""
        return np.diff(self.offsets)

    def padded(self, rows: IntArray, fill: int) -> Tensor:
        """Return the chosen rows as int64, `(len(rows), longest of them)`, filled up at the right."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        out = np.full((len(rows), int(lengths.max(initial=1))), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            out[i, : lengths[i]] = self.values[self.offsets[row] : self.offsets[row + 1]]
        return torch.from_numpy(out)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised data set.

    Attributes:
        features: model inputs by name (`input_ids`, perhaps `token_type_ids`), one row an example.
        labels: one integer an example `(num_examples,)`, or a row of them (`Ragged`, for tokens).
        pad: what fills up each feature.
    """

    features: Mapping[str, Ragged]
    labels: IntArray | Ragged
    pad: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.features["input_ids"])

    def lengths(self) -> IntArray:
        """Return the number of tokens of every example, `(num_examples,)`."""
        return self.features["input_ids"].lengths()

    def batch(self, rows: IntArray, device: torch.device, *, labels: bool = True) -> dict[str, Tensor]:
        """Return model inputs for some examples, each tensor `(len(rows), longest of them)`."""
        inputs = {name: ragged.padded(rows, self.pad[name]) for name, ragged in self.features.items()}
        lengths = torch.from_numpy(self.lengths()[rows])
        width = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = (torch.arange(width)[None, :] < lengths[:, None]).long()
        if labels and isinstance(self.labels, Ragged):
            inputs["labels"] = self.labels.padded(rows, IGNORED_LABEL)
        elif labels:
            assert not isinstance(self.labels, Ragged)
            inputs["labels"] = torch.from_numpy(self.labels[rows])
        return {name: t.to(device, non_blocking=True) for name, t in inputs.items()}


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
