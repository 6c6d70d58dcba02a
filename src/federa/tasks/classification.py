"""Text classification: one text, or a pair of texts, one label."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from federa.data.batches import IGNORED_LABEL, Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.registry import nearest
from federa.tasks.base import TASKS, Task, paddings, require_texts
from federa.types import FederaError, FloatArray, IntArray, RowError

OTHER = "Other"  # SemEval's label for no relation


@TASKS.register
class Classification(Task):
    """Single-label text classification; metrics are accuracy and macro-F1.

    Attributes:
        metric: what curves, targets and tables use; `semeval_f1` needs `official`.
        official: `semeval2010_task8` adds its official score, `semeval_f1`: the macro-F1 of the nine
            relations, direction counted, `Other` left out.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    name: Literal["classification"] = "classification"
    max_length: int = Field(default=128, ge=4)
    metric: Literal["accuracy", "macro_f1", "semeval_f1"] = "accuracy"
    official: Literal["semeval2010_task8"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Classification:
        if self.metric == "semeval_f1" and self.official is None:
            raise FederaError("task.metric: semeval_f1 needs task.official=semeval2010_task8")
        return self

    @property
    def primary(self) -> str:  # noqa: D102
        return self.metric

    def inputs(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.text_column] + ([data.text_pair_column] if data.text_pair_column else [])

    def answers(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.label_column]

    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return the label names: a ClassLabel's own, else the sorted values as text."""
        feature = table.features[data.label_column]
        if hasattr(feature, "names"):
            return self._checked(list(feature.names))
        values = set(_values(table, data))
        if len(values) < 2:
            raise FederaError(f"data.label_column: {data.label_column!r} has one value only; two are needed")
        return self._checked([str(value) for value in sorted(values)])

    def _checked(self, names: list[str]) -> list[str]:
        if self.official is not None:
            require_relations(names)
        return names

    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str] | None) -> Encoded:
        """Tokenise texts and number the labels."""
        texts = require_texts(table, self.inputs(data))
        limit = min(self.max_length, tokenizer.model_max_length)
        tokens = tokenizer(*texts, truncation=True, max_length=limit, return_attention_mask=False)
        features = {name: Ragged.from_rows(rows) for name, rows in tokens.items() if name != "attention_mask"}
        targets = {} if labels is None else {"labels": label_ids(table, data, labels)}
        return Encoded(
            features, targets, {**paddings(tokenizer), "labels": IGNORED_LABEL}, reference=list(labels or ())
        )

    def texts(self, table: Any, data: DataConfig) -> list[str]:  # noqa: D102
        return [" ".join(parts) for parts in zip(*require_texts(table, self.inputs(data)), strict=True)]

    def groups(self, table: Any, data: DataConfig) -> list[str]:
        """Return the labels' names."""
        return label_names(table, data)

    def kinds(self, table: Any, data: DataConfig) -> list[list[str]]:
        """Return each text's label."""
        return [[label] for label in label_names(table, data)]

    def scorable(self, encoded: Encoded, examples: IntArray) -> bool:
        """Return whether there is a relation to find, where those are what the metric counts."""
        labels = encoded.targets["labels"]
        assert not isinstance(labels, Ragged)
        names = {encoded.reference[label] for label in labels[examples]}
        return bool(names - {OTHER} if self.metric == "semeval_f1" else names)

    def strata(self, table: Any, data: DataConfig) -> list[str]:
        """Return the labels' names."""
        require_texts(table, self.inputs(data))  # what is wrong with a row is said before it is held out
        return label_names(table, data)

    def outputs(self, model_output: Any) -> Tensor:
        """Return the logits, `(batch, num_labels)`."""
        logits: Tensor = model_output.logits
        return logits

    def decode(self, outputs: Sequence[FloatArray], encoded: Encoded, examples: IntArray) -> list[Any]:
        """Return the most likely label of every example and its probability, `(id, probability)`."""
        logits = np.stack(list(outputs)).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        best = logits.argmax(axis=-1)
        probability = 1 / np.exp(logits).sum(axis=-1)  # the largest logit is 0
        return list(zip(best.tolist(), probability.tolist(), strict=True))

    def score(self, predictions: Sequence[Any], encoded: Encoded, examples: IntArray) -> dict[str, float]:
        """Return accuracy, macro-F1 (over the labels that occur), and the official score if there is one."""
        predicted = np.fromiter((label for label, _ in predictions), dtype=np.int64, count=len(predictions))
        labels = encoded.targets["labels"]
        assert not isinstance(labels, Ragged)
        truth = labels[examples]
        scores = {"accuracy": float(np.mean(predicted == truth)), "macro_f1": macro_f1(truth, predicted)}
        if self.official is not None:
            names = np.array(encoded.reference)
            scores["semeval_f1"] = semeval_f1(names[truth].tolist(), names[predicted].tolist())
        return scores

    def show(self, prediction: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Return the `label` and its `probability`."""
        return {"label": labels[prediction[0]], "probability": round(prediction[1], 6)}


def macro_f1(truth: IntArray, predicted: IntArray) -> float:
    """Return the mean over the labels that occur in either of F1 = 2 hits / (times true + times predicted).

    It is scikit-learn's, whose checks take milliseconds a call: with ten thousand clients, most of a minute.
    """
    size = 1 + int(max(truth.max(), predicted.max()))
    hits = np.bincount(truth[truth == predicted], minlength=size)
    times = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    return float(np.mean(2 * hits[times > 0] / times[times > 0]))


def relation(name: str) -> str:
    """Return the relation of a directed label: `Cause-Effect` of `Cause-Effect(e1,e2)`."""
    return name.partition("(")[0]


def require_relations(names: Sequence[str]) -> None:
    """Raise unless the labels are SemEval's: `Relation(e1,e2)` and `Relation(e2,e1)`, and perhaps `Other`.

    Raises:
        FederaError: a label of another form.
    """
    directed = re.compile(r"[^()]+\((e1,e2|e2,e1)\)")
    odd = next((name for name in names if name != OTHER and not directed.fullmatch(name)), None)
    if odd is not None:
        raise FederaError(
            f"task.official=semeval2010_task8: the label {odd!r} is neither {OTHER!r} nor of the form "
            "'Cause-Effect(e1,e2)'; set data.label_column to the column of names"
        )


def semeval_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the official score of SemEval-2010 Task 8 (Hendrickx et al. 2010, section 4).

    The mean over the relations, `Other` left out, of F1 = 2 hits / (times predicted + times true), where a
    hit has the right relation in the right direction, and the counts are of both directions together. As in
    the official scorer the mean is over the relations that occur in the truth.
    """
    hits = Counter(relation(one) for one, other in zip(truth, predicted, strict=True) if one == other)
    times = Counter(relation(name) for name in (*truth, *predicted))
    kinds = sorted({relation(name) for name in truth} - {OTHER})
    return sum(2 * hits[kind] / times[kind] for kind in kinds) / len(kinds) if kinds else 0.0


def _lacks(value: object) -> bool:
    """Return whether a cell is empty; among numbers that is NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _values(table: Any, data: DataConfig) -> list[Any]:
    """Return every row's label as the table has it.

    Raises:
        RowError: a row without one.
    """
    values = list(table[data.label_column])
    missing = next((row for row, value in enumerate(values) if _lacks(value)), None)
    if missing is not None:
        raise RowError(missing, f"column {data.label_column!r} is empty")
    return values


def label_names(table: Any, data: DataConfig) -> list[str]:
    """Return the name of every row's label.

    Raises:
        RowError: a row without one.
    """
    values = _values(table, data)
    names = getattr(table.features[data.label_column], "names", None)
    if names is not None:  # by name: another table may number its labels in another order
        values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]
    return [str(value) for value in values]


def label_ids(table: Any, data: DataConfig, labels: Sequence[str]) -> IntArray:
    """Return the id of every row's label, `(num_rows,)`.

    Raises:
        RowError: a label that the training table does not have.
    """
    known = {label: i for i, label in enumerate(labels)}
    words = label_names(table, data)
    row = next((i for i, word in enumerate(words) if word not in known), None)
    if row is not None:
        shown = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
        raise RowError(
            row,
            f"label {words[row]!r} is outside the training set's labels{nearest(words[row], known)}: {shown}",
        )
    return np.array([known[word] for word in words], dtype=np.int64)
