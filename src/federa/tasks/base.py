"""The interface of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from federa.data.batches import Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.registry import Component, Registry
from federa.types import FloatArray, IntArray, RowError

Prediction = Any
"""What a task makes of a model's outputs for one example: its own kind of thing."""


class Task(Component, ABC):
    """What a model is trained for.

    A row of the table is an example. Tasks that split long texts encode an example as several rows of
    `Encoded`; partitions, predictions and scores are by example.

    Attributes:
        auto_class: the transformers auto class that gives the model its head.
        peft_type: what PEFT calls such a model.
        max_length: rows are cut, or texts split, at so many tokens.
        group_by: what partitions skew on: None for the task's own groups, `clusters` for k-means over
            sentence embeddings of the texts, or a column of the table.
        clusters: the number of clusters of `group_by=clusters` (FedNLP's for SQuAD is 30).
        added_tokens: words that become tokens of the vocabulary, such as the marks `<e1>` of SemEval's
            entities; each starts as the mean of the tokens it was. Without this they stay text.
    """

    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    max_length: int = 128
    group_by: str | None = None
    clusters: int = Field(default=30, ge=2)
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @property
    @abstractmethod
    def primary(self) -> str:
        """The metric that curves, targets and tables use: a share between 0 and 1; more is better."""

    @abstractmethod
    def inputs(self, data: DataConfig) -> list[str]:
        """Return the columns that a prediction needs."""

    @abstractmethod
    def answers(self, data: DataConfig) -> list[str]:
        """Return the columns that training needs besides."""

    @abstractmethod
    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return the label names, in the order of their ids, as the training table has them."""

    @abstractmethod
    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str] | None) -> Encoded:
        """Return the table's examples as flat arrays.

        Args:
            table: the examples.
            data: which columns hold what.
            tokenizer: the model's.
            labels: the label names; None to encode for predictions, without targets.

        Raises:
            RowError: a label outside the set, or an example that cannot be used.
        """

    def from_text(self, text: str) -> Any:
        """Return what the input column holds for a line of plain text."""
        return text

    @abstractmethod
    def texts(self, table: Any, data: DataConfig) -> list[str]:
        """Return one text an example, which stands for it where examples are clustered."""

    def groups(self, table: Any, data: DataConfig) -> list[str] | None:
        """Return the task's own group of every example, or None where a task has none: then it clusters."""
        return None

    def strata(self, table: Any, data: DataConfig) -> list[str] | None:
        """Return values of which a hold-out keeps the shares, one an example; None for no such thing."""
        return None

    def kinds(self, table: Any, data: DataConfig) -> Sequence[Collection[str]] | None:
        """Return what each example shows of the label set: a hold-out leaves all of it in training."""
        return None

    def units(self, table: Any, data: DataConfig) -> list[str] | None:
        """Return values of which a hold-out keeps equal ones together; None for no such thing."""
        return None

    def loss(self, model_output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what training minimises, a number: the model's own loss.

        It must not depend on how far a batch is padded: clients trained side by side are padded alike. It is
        a mean over as many things as `terms` says: a batch's loss can be put together from its parts'.
        """
        loss: Tensor = model_output.loss
        return loss

    def terms(self, encoded: Encoded, rows: IntArray) -> int:
        """Return how many things the `loss` of these rows is a mean over: the targets that are no fill."""
        count = 0
        for name, held in encoded.targets.items():
            own = np.concatenate([held.row(row) for row in rows]) if isinstance(held, Ragged) else held[rows]
            count += int(np.count_nonzero(own != encoded.pad[name]))
        return count

    def scorable(self, encoded: Encoded, examples: IntArray) -> bool:
        """Return whether a score of these few examples says anything; what does not is no client's score."""
        return len(examples) > 0

    @abstractmethod
    def outputs(self, model_output: Any) -> Tensor:
        """Return what decoding needs of a model's output, `(batch, ...)`."""

    @abstractmethod
    def decode(self, outputs: Sequence[FloatArray], encoded: Encoded, examples: IntArray) -> list[Prediction]:
        """Return a prediction for each of some examples.

        Args:
            outputs: what `outputs` gave, one array a row, in the order of `encoded.rows_of(examples)`.
            encoded: the data set that the examples belong to.
            examples: `(num_examples,)`, example numbers.
        """

    @abstractmethod
    def score(
        self, predictions: Sequence[Prediction], encoded: Encoded, examples: IntArray
    ) -> dict[str, float]:
        """Return the metrics of some examples, whose predictions come in the same order."""

    @abstractmethod
    def show(self, prediction: Prediction, labels: Sequence[str]) -> dict[str, Any]:
        """Return a prediction as people read it, of JSON's types."""


TASKS: Registry[Task] = Registry("task")


def require_texts(table: Any, columns: Sequence[str]) -> list[list[str]]:
    """Return columns of texts.

    Raises:
        RowError: a cell that is not a text.
    """
    texts = [list(table[column]) for column in columns]
    for column, values in zip(columns, texts, strict=True):
        wrong = next((i for i, v in enumerate(values) if not isinstance(v, str)), None)
        if wrong is not None:
            raise RowError(wrong, f"column {column!r} is {values[wrong]!r}, not a text")
    return texts


def paddings(tokenizer: Any) -> dict[str, int]:
    """Return what fills up the features that a tokenizer gives."""
    return {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
