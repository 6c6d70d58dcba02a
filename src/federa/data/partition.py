"""Partitioners: who holds which training example."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from pydantic import Field

from federa.registry import Component, Registry
from federa.types import IntArray


class Partitioner(Component, ABC):
    """Splits training examples over clients: deterministic, disjoint, exhaustive.

    Attributes:
        clients: the number of clients.
        min_examples: no client is left with fewer; the largest clients give some of theirs.
    """

    clients: int = Field(default=20, ge=1)
    min_examples: int = Field(default=1, ge=1)

    @abstractmethod
    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:
        """Return the row numbers of each client, before `min_examples` is seen to.

        Args:
            groups: `(num_examples,)` what the partition may skew on: labels, or the codes of a column.
            rng: the only source of randomness.
        """


PARTITIONERS: Registry[Partitioner] = Registry("partition")
