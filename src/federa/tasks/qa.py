"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from federa.data.batches import IGNORED_POSITION, Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.tasks.base import TASKS, Task, paddings, require_texts
from federa.tasks.squad import squad_scores
from federa.tasks.windows import require_room
from federa.types import FloatArray, IntArray, RowError

Offsets = np.ndarray[tuple[int], np.dtype[np.int32]]
NOWHERE = -1  # the offset of a token that is not of the context
SLICE = 1000  # questions tokenised at once; a tokenizer's answer takes far more room than what is kept
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of a context.

    Attributes:
        text: what stands there.
        start: its first character; `end` the one after its last.
        score: the sum of the two logits.
    """

    text: str
    start: int
    end: int
    score: float


@TASKS.register
class QA(Task):
    """Answers that are spans of a context (SQuAD v1.1, MRQA); metrics are SQuAD's exact match and F1.

    A context longer than the model becomes overlapping windows behind the same question. A window without the
    whole answer is trained to point at the first token; the answer is the best span of all windows. Of
    several gold answers the first that can be given as it is, from token to token, is trained on.

    Attributes:
        metric: what curves, targets and tables use.
        overlap: tokens of the context that two neighbouring windows share (transformers' `stride`).
        max_answer_length: of a predicted answer, in tokens.
        n_best: how many starts and ends of a window are tried with each other.
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_type: ClassVar[str] = "QUESTION_ANS"
    name: Literal["qa"] = "qa"
    max_length: int = Field(default=384, ge=8)
    metric: Literal["f1", "exact_match"] = "f1"
    overlap: int = Field(default=128, ge=0)
    max_answer_length: int = Field(default=30, ge=1)
    n_best: int = Field(default=20, ge=1)

    @property
    def primary(self) -> str:  # noqa: D102
        return self.metric

    def inputs(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.question_column, data.context_column]

    def answers(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.answers_column]

    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return the names of the two outputs of a token."""
        return ["start", "end"]

    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str] | None) -> Encoded:
        """Tokenise questions and contexts into windows, and find the answers' tokens."""
        questions, contexts = self._texts(table, data)
        gold = None if labels is None else _gold(table, data, contexts)
        limit = min(self.max_length, tokenizer.model_max_length)
        self._require_room(questions, tokenizer, limit)
        samples: list[IntArray] = []
        windows: defaultdict[str, list[Ragged]] = defaultdict(list)
        for first in range(0, len(questions), SLICE):
            part = slice(first, first + SLICE)
            sample, found = self._windows(questions[part], contexts[part], tokenizer, limit)
            samples.append(first + sample)
            for name, rows in found.items():
                windows[name].append(rows)
        features = {name: Ragged.joined(parts) for name, parts in windows.items()}
        example = np.concatenate(samples)
        reference = _Reference(table, data, features.pop("starts"), features.pop("ends"))
        targets: dict[str, IntArray] = {}
        if gold is not None:
            places = self._places(example, reference, contexts, gold)
            targets = {"start_positions": places[:, 0].copy(), "end_positions": places[:, 1].copy()}
        return Encoded(
            features,
            targets,
            {**paddings(tokenizer), "start_positions": IGNORED_POSITION, "end_positions": IGNORED_POSITION},
            example if len(example) > len(questions) else None,
            reference,
        )

    def _windows(
        self, questions: list[str], contexts: list[str], tokenizer: Any, limit: int
    ) -> tuple[IntArray, dict[str, Ragged]]:
        """Return which question each window is of, and the features of all windows.

        Among them are `starts` and `ends`, the characters of the context that each token has. Windows are
        those that a tokenizer is meant to give, from the left; some versions of `tokenizers` (0.23.1, 0.23.2)
        lose what lies beyond the first `limit` tokens.
        """
        tokens = tokenizer(
            questions, contexts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        names = [n for n in ("input_ids", "token_type_ids") if n in tokens]
        found: dict[str, list[list[int]]] = {name: [] for name in (*names, "starts", "ends")}
        question = []
        for row, offsets in enumerate(tokens["offset_mapping"]):
            parts = tokens.sequence_ids(row)
            first = parts.index(1) if 1 in parts else len(parts)  # a context may have no token
            after = first + parts.count(1)
            room = limit - (len(parts) - (after - first))
            outside = [NOWHERE] * first, [NOWHERE] * (len(parts) - after)
            for start in range(first, max(first + 1, after - self.overlap), room - self.overlap):
                own = slice(start, min(start + room, after))
                for name in names:
                    ids = tokens[name][row]
                    found[name].append([*ids[:first], *ids[own], *ids[after:]])
                found["starts"].append([*outside[0], *(at for at, _ in offsets[own]), *outside[1]])
                found["ends"].append([*outside[0], *(to for _, to in offsets[own]), *outside[1]])
                question.append(row)
        return np.array(question, dtype=np.int64), {n: Ragged.from_rows(rows) for n, rows in found.items()}

    def _texts(self, table: Any, data: DataConfig) -> tuple[list[str], list[str]]:
        """Return questions and contexts.

        Raises:
            RowError: one that is no text, or empty.
        """
        questions, contexts = require_texts(table, self.inputs(data))
        for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            for what, text in (("question", question), ("context", context)):
                if not text.strip():
                    raise RowError(row, f"an empty {what}")
        return questions, contexts

    def _require_room(self, questions: Sequence[str], tokenizer: Any, limit: int) -> None:
        """Raise where a question leaves no room for a context; the message names the row."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        require_room(limit - special, self.overlap, limit)
        tokens = tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
        longest = int(np.argmax([len(one) for one in tokens]))
        taken = len(tokens[longest]) + special
        if limit - taken <= self.overlap:
            raise RowError(
                longest,
                f"its question and special tokens take {taken} of {limit} tokens, which "
                f"leaves no room for a context with an overlap of {self.overlap}; raise task.max_length, "
                "lower task.overlap, or drop the row",
            )

    def _places(
        self,
        example: IntArray,
        reference: _Reference,
        contexts: Sequence[str],
        gold: Sequence[Sequence[Span]],
    ) -> IntArray:
        """Return the first and last token to point at in every window, `(num_rows, 2)`."""
        places = np.zeros((len(example), 2), dtype=np.int64)
        bounds = np.searchsorted(example, np.arange(len(gold) + 1)).tolist()
        for context, spans, first, after in zip(contexts, gold, bounds[:-1], bounds[1:], strict=True):
            rows = range(first, after)
            for begin, end in spans:
                found = _tokens_of(reference, rows, begin, end)
                if self._can_give(reference, found, context, context[begin:end]):
                    break
            else:
                found = _tokens_of(reference, rows, *spans[0])
            for row, tokens in found.items():
                places[row] = tokens
        return places

    def _can_give(self, reference: _Reference, found: Mapping[int, Span], context: str, answer: str) -> bool:
        """Return whether decoding these tokens, of one window or another, gives this answer."""
        return any(
            last - first < self.max_answer_length
            and context[reference.starts.row(row)[first] : reference.ends.row(row)[last]].strip() == answer
            for row, (first, last) in found.items()
        )

    def texts(self, table: Any, data: DataConfig) -> list[str]:
        """Return each question with its first answer, which is what FedNLP clusters."""
        questions, contexts = self._texts(table, data)
        return [
            f"{q} {c[a:b]}"
            for q, c, ((a, b), *_) in zip(questions, contexts, _gold(table, data, contexts), strict=True)
        ]

    def units(self, table: Any, data: DataConfig) -> list[str] | None:
        """Return the contexts: a held-out question must not share its context with a training one."""
        _, contexts = self._texts(table, data)
        _gold(table, data, contexts)  # what is wrong with a row is said before what a hold-out makes of it
        return contexts

    def loss(self, model_output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy of start and end over the tokens of a row.

        The loss of transformers' models counts the padding among the places where an answer may be.
        """
        hidden = inputs["attention_mask"] == 0
        parts = []
        for logits, name in (
            (model_output.start_logits, "start_positions"),
            (model_output.end_logits, "end_positions"),
        ):
            seen = logits.float().masked_fill(hidden, torch.finfo(torch.float32).min)
            parts.append(functional.cross_entropy(seen, inputs[name], ignore_index=IGNORED_POSITION))
        return (parts[0] + parts[1]) / 2

    def outputs(self, model_output: Any) -> Tensor:
        """Return the logits of start and end, `(batch, length, 2)`."""
        return torch.stack([model_output.start_logits, model_output.end_logits], dim=-1)

    def decode(self, outputs: Sequence[FloatArray], encoded: Encoded, examples: IntArray) -> list[Any]:
        """Return the best `Answer` of every example, over its windows."""
        reference: _Reference = encoded.reference
        rows = encoded.rows_of(examples)
        best: dict[int, tuple[float, int, int]] = {}
        for row, output in zip(rows, outputs, strict=True):
            example = int(row if encoded.example is None else encoded.example[row])
            found = self._best_span(output, reference.starts.row(row), reference.ends.row(row))
            if found is not None and (example not in best or found > best[example]):
                best[example] = found
        contexts = reference.contexts(examples)
        answers = []
        for example, context in zip(examples, contexts, strict=True):
            score, start, end = best.get(int(example), (-np.inf, 0, 0))
            text = context[start:end]  # a byte-level token may begin with the space before it
            start += len(text) - len(text.lstrip())
            answers.append(Answer(text.strip(), start, start + len(text.strip()), score))
        return answers

    def _best_span(self, logits: FloatArray, starts: Offsets, ends: Offsets) -> tuple[float, int, int] | None:
        """Return score, first character and end of a window's best span, or None if it has no span."""
        inside = np.flatnonzero(starts >= 0)
        if not len(inside):
            return None
        first = inside[np.argsort(-logits[inside, 0], kind="stable")[: self.n_best]]
        last = inside[np.argsort(-logits[inside, 1], kind="stable")[: self.n_best]]
        length = last[None, :] - first[:, None] + 1
        total = logits[first, 0][:, None] + logits[last, 1][None, :]
        total = np.where((length >= 1) & (length <= self.max_answer_length), total, -np.inf)
        i, j = np.unravel_index(int(total.argmax()), total.shape)
        if not np.isfinite(total[i, j]):
            return None
        return float(total[i, j]), int(starts[first[i]]), int(ends[last[j]])

    def score(self, predictions: Sequence[Any], encoded: Encoded, examples: IntArray) -> dict[str, float]:
        """Return exact match and F1, each from 0 to 1."""
        reference: _Reference = encoded.reference
        return squad_scores([answer.text for answer in predictions], reference.answers(examples))

    def show(self, prediction: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Return `answer`, where it starts, and its `score`: null where no token can answer."""
        score = round(prediction.score, 4) if np.isfinite(prediction.score) else None
        return {"answer": prediction.text, "start": prediction.start, "score": score}


class _Reference:
    """What decoding and scoring need of the questions; texts stay in the table until they are asked for.

    Attributes:
        starts: of every token of every row, its first character in the context, or `NOWHERE`.
        ends: likewise the character after its last.
    """

    def __init__(self, table: Any, data: DataConfig, starts: Ragged, ends: Ragged) -> None:
        self._table, self._data, self.starts, self.ends = table, data, starts, ends

    def contexts(self, examples: IntArray) -> list[str]:
        """Return the contexts of some examples."""
        return list(self._table.select(examples)[self._data.context_column])

    def answers(self, examples: IntArray) -> list[list[str]]:
        """Return the gold answers of some examples."""
        return [cell["text"] for cell in self._table.select(examples)[self._data.answers_column]]


def _gold(table: Any, data: DataConfig, contexts: Sequence[str]) -> list[list[Span]]:
    """Return the answers of every example as spans of characters.

    Raises:
        FederaError: no answer, or one that does not stand where it says; it names the row.
    """
    rows = []
    for row, (cell, context) in enumerate(zip(table[data.answers_column], contexts, strict=True)):
        texts, starts = (
            cell.get(key) if isinstance(cell, dict) else None for key in ("text", "answer_start")
        )
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowError(
                row,
                f"column {data.answers_column!r}: expected 'text' and 'answer_start', lists of equal length",
            )
        if not texts:
            raise RowError(row, "no answer; unanswerable questions are not of this task, drop them")
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or start < 0:
                raise RowError(row, f"{text!r} at {start!r} is no answer")
            if context[start : start + len(text)] != text:
                there = context[start : start + len(text)]
                raise RowError(row, f"the answer {text!r} is not at {start}; there stands {there!r}")
        rows.append([_bare(text, start) for text, start in zip(texts, starts, strict=True)])
    return rows


def _bare(text: str, start: int) -> Span:
    """Return where an answer stands without the spaces around it: a token may hold one before its word."""
    begin = start + len(text) - len(text.lstrip())
    return begin, begin + len(text.strip())


def _tokens_of(reference: _Reference, rows: range, begin: int, end: int) -> dict[int, Span]:
    """Return the first and last token of a span of characters, by the windows that hold all of it.

    All but the characters at its ends that no token of any window has (a lone joiner, say).
    """
    starts, ends = reference.starts, reference.ends
    held = slice(starts.offsets[rows.start], starts.offsets[rows.stop])
    opens, closes = starts.values[held], ends.values[held]
    begin = max(begin, int(opens[(opens >= 0) & (closes > begin)].min(initial=end)))
    end = min(end, int(closes[(opens >= 0) & (opens < end)].max(initial=begin)))
    found = {}
    for row in rows:
        opens, closes = starts.row(row), ends.row(row)
        inside = np.flatnonzero((opens >= 0) & (closes > begin) & (opens < end))
        if len(inside) and opens[inside[0]] <= begin and closes[inside[-1]] >= end:
            found[row] = int(inside[0]), int(inside[-1])
    return found
