"""The interface of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from federa.data.batches import Encoded
from federa.data.datasets import DataConfig
from federa.registry import Component, Registry
from federa.types import FloatArray, IntArray


class Task(Component, ABC):
    """What a model is trained for.

    Attributes:
        auto_class: the transformers auto class that gives the model its head.
        primary: the metric that curves, targets and tables use.
        max_length: examples are cut (or, in tasks that can, split) at so many tokens.
    """

    auto_class: ClassVar[str]
    primary: ClassVar[str]
    max_length: int = 128

    @abstractmethod
    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return the label names, in the order of their ids, as the training table has them."""

    @abstractmethod
    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str]) -> Encoded:
        """Return the table's examples as flat arrays.

        Raises:
            FederaError: a label outside the set, or an example without text.
        """

    @abstractmethod
    def groups(self, encoded: Encoded) -> IntArray:
        """Return what a partitioner may skew on, `(num_examples,)`, ids from 0."""

    @abstractmethod
    def group_names(self, labels: Sequence[str]) -> list[str]:
        """Return the names of the groups, in the order of their ids."""

    @abstractmethod
    def outputs(self, model_output: Any) -> Tensor:
        """Return what scoring needs of a model's output, `(batch, ...)`."""

    @abstractmethod
    def score(self, outputs: Sequence[FloatArray], encoded: Encoded, rows: IntArray) -> dict[str, float]:
        """Return the metrics of some examples.

        Args:
            outputs: what `outputs` gave, one array an example, in the order of `rows`.
            encoded: the data set that the rows belong to.
            rows: `(num_rows,)`, row numbers.
        """


TASKS: Registry[Task] = Registry("task")
