"""Text classification: one text, or a pair of texts, one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from federa.data.batches import Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.registry import nearest
from federa.tasks.base import TASKS, Task
from federa.types import FederaError, FloatArray, IntArray


@TASKS.register
class Classification(Task):
    """Single-label text classification; metrics are accuracy and macro-F1."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    primary: ClassVar[str] = "accuracy"
    name: Literal["classification"] = "classification"
    max_length: int = Field(default=128, ge=4)

    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return the label names: a ClassLabel's own, else the sorted values as text."""
        feature = table.features[data.label_column]
        if hasattr(feature, "names"):
            return list(feature.names)
        values = set(table[data.label_column])
        if None in values:
            raise FederaError(f"data.label_column: {data.label_column!r} has empty cells")
        if len(values) < 2:
            raise FederaError(f"data.label_column: {data.label_column!r} has one value only; two are needed")
        return [str(value) for value in sorted(values)]

    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str]) -> Encoded:
        """Tokenise texts and number the labels."""
        columns = [data.text_column] + ([data.text_pair_column] if data.text_pair_column else [])
        texts = [list(table[column]) for column in columns]
        for column, values in zip(columns, texts, strict=True):
            wrong = next((i for i, v in enumerate(values) if not isinstance(v, str)), None)
            if wrong is not None:
                raise FederaError(f"data: row {wrong} of column {column!r} is {values[wrong]!r}, not a text")
        limit = min(self.max_length, tokenizer.model_max_length)
        tokens = tokenizer(*texts, truncation=True, max_length=limit, return_attention_mask=False)
        features = {name: Ragged.from_rows(rows) for name, rows in tokens.items() if name != "attention_mask"}
        pad = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return Encoded(features, label_ids(table, data, labels), pad)

    def groups(self, encoded: Encoded) -> IntArray:  # noqa: D102
        assert not isinstance(encoded.labels, Ragged)
        return encoded.labels

    def group_names(self, labels: Sequence[str]) -> list[str]:  # noqa: D102
        return list(labels)

    def outputs(self, model_output: Any) -> Tensor:
        """Return the logits, `(batch, num_labels)`."""
        logits: Tensor = model_output.logits
        return logits

    def score(self, outputs: Sequence[FloatArray], encoded: Encoded, rows: IntArray) -> dict[str, float]:
        """Return accuracy and macro-F1 (over the labels that occur)."""
        predicted = np.stack(list(outputs)).argmax(axis=-1)
        truth = self.groups(encoded)[rows]
        return {"accuracy": float(np.mean(predicted == truth)), "macro_f1": macro_f1(truth, predicted)}


def macro_f1(truth: IntArray, predicted: IntArray) -> float:
    """Return the mean over the labels that occur in either of F1 = 2 hits / (times true + times predicted).

    It is scikit-learn's, whose checks take milliseconds a call: with ten thousand clients, most of a minute.
    """
    size = 1 + int(max(truth.max(), predicted.max()))
    hits = np.bincount(truth[truth == predicted], minlength=size)
    times = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    return float(np.mean(2 * hits[times > 0] / times[times > 0]))


def label_ids(table: Any, data: DataConfig, labels: Sequence[str]) -> IntArray:
    """Return the id of every row's label, `(num_rows,)`.

    Raises:
        FederaError: a label that the training table does not have.
    """
    values = list(table[data.label_column])
    names = getattr(table.features[data.label_column], "names", None)
    if names is not None:  # by name: another table may number its labels in another order
        values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]
    known = {label: i for i, label in enumerate(labels)}
    words = [str(value) for value in values]
    strange = next((word for word in words if word not in known), None)
    if strange is not None:
        shown = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
        raise FederaError(
            f"data.label_column: label {strange!r} is outside the training set's labels"
            f"{nearest(strange, known)}: {shown}"
        )
    return np.array([known[word] for word in words], dtype=np.int64)
