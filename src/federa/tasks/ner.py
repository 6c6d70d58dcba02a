"""Named entity recognition: a BIO tag for every word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from federa.data.batches import IGNORED_LABEL, Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.registry import nearest
from federa.tasks.base import TASKS, Task, paddings
from federa.tasks.spans import BIOES, OUTSIDE, from_bioes, from_iob1, illegal, span_scores, split_tag
from federa.tasks.windows import frame, owners, require_room, window_starts
from federa.types import FederaError, FloatArray, IntArray, RowError

NO_ENTITY = "none"  # the group of sentences without an entity


@TASKS.register
class NER(Task):
    """Entities in sentences that are words already; metrics are of exact spans (strict, as seqeval's).

    A word's label is on its first piece. A sentence longer than the model becomes overlapping windows, and
    each of its words is trained on and predicted in the one window where it has the most context.

    Attributes:
        metric: what curves, targets and tables use.
        overlap: tokens that two neighbouring windows share at least.
        scheme: of the tags in the data; `iob1` (as the files of CoNLL-2003) and `bioes` (or BILOU, the same
            with other letters) are turned into `bio`.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    name: Literal["ner"] = "ner"
    max_length: int = Field(default=128, ge=4)
    metric: Literal["f1", "precision", "recall", "macro_f1"] = "f1"
    overlap: int = Field(default=32, ge=0)
    scheme: Literal["bio", "iob1", "bioes"] = "bio"

    @property
    def primary(self) -> str:  # noqa: D102
        return self.metric

    def inputs(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.tokens_column]

    def answers(self, data: DataConfig) -> list[str]:  # noqa: D102
        return [data.tags_column]

    def labels(self, table: Any, data: DataConfig) -> list[str]:
        """Return `O` and, for every type that occurs, `B-` and `I-`: closed, whichever of them occurs."""
        kinds = set().union(*self.kinds(table, data))
        if not kinds:
            raise FederaError(f"data.tags_column: {data.tags_column!r} has no entity; all tags are O")
        return [OUTSIDE, *(f"{mark}-{kind}" for kind in sorted(kinds) for mark in "BI")]

    def _tags(self, table: Any, data: DataConfig) -> list[list[str]]:
        """Return the tags of every sentence in BIO.

        Raises:
            FederaError: words and tags that do not match, or tags that BIO does not have; it names the row.
        """
        column = data.tags_column
        feature = getattr(table.features[column], "feature", None)
        names = getattr(feature, "names", None)
        rows = []
        for row, (words, tags) in enumerate(zip(_words(table, data), table[column], strict=True)):
            if not isinstance(tags, list) or len(tags) != len(words):
                count = f"{len(tags)} tags" if isinstance(tags, list) else "no list of tags"
                raise RowError(row, f"{len(words)} words and {count}")
            if names is not None:
                tags = [names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag for tag in tags]
            odd = next((i for i, tag in enumerate(tags) if not isinstance(tag, str)), None)
            if odd is not None:
                raise RowError(row, f"word {odd}: the tag {tags[odd]!r} is not a text")
            if self.scheme == "iob1":
                tags = from_iob1(tags)
            wrong = illegal(tags, "".join(BIOES) if self.scheme == "bioes" else "BI")
            if wrong is not None:
                after = f" after {tags[wrong - 1]!r}" if wrong else " at the start"
                name = "BIOES" if self.scheme == "bioes" else "BIO"
                raise RowError(
                    row,
                    f"word {wrong}: the tag {tags[wrong]!r}{after} is not {name}{self._hint(tags[wrong])}",
                )
            rows.append(from_bioes(tags) if self.scheme == "bioes" else tags)
        return rows

    def _hint(self, tag: str) -> str:
        """Return in which scheme a tag that is not BIO may be right."""
        mark, kind = split_tag(tag)
        other = {"I": "iob1", **dict.fromkeys("ESLU", "bioes")}.get(mark)
        if self.scheme != "bio" or other is None or not kind:
            return ""
        return f"; if the file is in {other.upper()}, set task.scheme={other}"

    def encode(self, table: Any, data: DataConfig, tokenizer: Any, labels: Sequence[str] | None) -> Encoded:
        """Tokenise words, and put each word's tag on its first piece."""
        sentences = _words(table, data)
        truth = None if labels is None else self._ids(self._tags(table, data), labels)
        limit = min(self.max_length, tokenizer.model_max_length)
        before, after = frame(tokenizer)
        room = limit - len(before) - len(after)
        require_room(room, self.overlap, limit)
        ids: list[list[int]] = []
        places: list[list[int]] = []  # of each token: the word whose first piece it is, else -1
        targets: list[list[int]] = []
        example: list[int] = []
        for row, (pieces, words) in enumerate(zip(*_pieces(sentences, tokenizer), strict=True)):
            owner = owners(len(pieces), room, self.overlap)
            for window, start in enumerate(window_starts(len(pieces), room, self.overlap)):
                inside = range(start, min(start + room, len(pieces)))
                own = [words[t] if owner[t] == window else -1 for t in inside]
                if max(own) < 0:  # the middle of a very long word: nothing to learn or predict
                    continue
                ids.append([*before, *(pieces[t] for t in inside), *after])
                places.append([*(-1 for _ in before), *own, *(-1 for _ in after)])
                example.append(row)
                if truth is not None:
                    targets.append([truth[row][w] if w >= 0 else IGNORED_LABEL for w in places[-1]])
        features = {"input_ids": Ragged.from_rows(ids)}
        if "token_type_ids" in tokenizer.model_input_names:
            features["token_type_ids"] = Ragged.from_rows([[0] * len(one) for one in ids])
        split = len(ids) > len(sentences)
        return Encoded(
            features,
            {} if truth is None else {"labels": Ragged.from_rows(targets)},
            {**paddings(tokenizer), "labels": IGNORED_LABEL},
            np.array(example, dtype=np.int64) if split else None,
            _Reference(sentences, Ragged.from_rows(places), truth, list(labels or ())),
        )

    @staticmethod
    def _ids(rows: list[list[str]], labels: Sequence[str]) -> list[list[int]]:
        known = {label: i for i, label in enumerate(labels)}
        out = []
        for row, tags in enumerate(rows):
            strange = next((i for i, tag in enumerate(tags) if tag not in known), None)
            if strange is not None:
                kinds = sorted({split_tag(label)[1] for label in labels} - {""})
                kind = split_tag(tags[strange])[1]
                raise RowError(
                    row,
                    f"word {strange}: the training set has no entity of type {kind!r}"
                    f"{nearest(kind, kinds)}; it has {', '.join(kinds)}",
                )
            out.append([known[tag] for tag in tags])
        return out

    def from_text(self, text: str) -> list[str]:
        """Return the words of a line, as spaces part them."""
        return text.split()

    def texts(self, table: Any, data: DataConfig) -> list[str]:  # noqa: D102
        return [" ".join(words) for words in _words(table, data)]

    def kinds(self, table: Any, data: DataConfig) -> list[set[str]]:
        """Return the types of each sentence's entities."""
        return [{split_tag(tag)[1] for tag in tags} - {""} for tags in self._tags(table, data)]

    def groups(self, table: Any, data: DataConfig) -> list[str]:
        """Return the types of the entities that a sentence has, `LOC-PER` for example (FedNLP's groups)."""
        return ["-".join(sorted(kinds)) or NO_ENTITY for kinds in self.kinds(table, data)]

    def outputs(self, model_output: Any) -> Tensor:
        """Return the most likely tag of every token, `(batch, length)`."""
        best: Tensor = model_output.logits.argmax(dim=-1)
        return best

    def decode(self, outputs: Sequence[FloatArray], encoded: Encoded, examples: IntArray) -> list[Any]:
        """Return a sentence's words and their tag ids, `(words, tags)`, for every example."""
        reference: _Reference = encoded.reference
        rows = encoded.rows_of(examples)
        tags = {int(e): np.zeros(len(reference.words[e]), dtype=np.int64) for e in examples}
        for row, output in zip(rows, outputs, strict=True):
            place = reference.places.row(row)
            own = np.flatnonzero(place >= 0)
            tags[row if encoded.example is None else int(encoded.example[row])][place[own]] = output[own]
        return [(reference.words[e], tags[int(e)]) for e in examples]

    def scorable(self, encoded: Encoded, examples: IntArray) -> bool:
        """Return whether there is an entity to find: without one F1 is 0, also for those who find none."""
        reference: _Reference = encoded.reference
        return reference.truth is not None and any(any(reference.truth[e]) for e in examples)

    def score(self, predictions: Sequence[Any], encoded: Encoded, examples: IntArray) -> dict[str, float]:
        """Return precision, recall and F1 of exact spans (micro), and F1's mean over the types (macro)."""
        reference: _Reference = encoded.reference
        assert reference.truth is not None, "encoded without tags"
        names = reference.labels
        return span_scores(
            [[names[tag] for tag in reference.truth[e]] for e in examples],
            [[names[tag] for tag in tags] for _, tags in predictions],
        )

    def show(self, prediction: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Return `tokens` and their `tags`."""
        words, tags = prediction
        return {"tokens": words, "tags": [labels[tag] for tag in tags]}


class _Reference:
    """What decoding and scoring need of the sentences.

    Attributes:
        words: of every example.
        places: of every token of every row, the word that it decides; -1 for none.
        truth: tag ids of every example, if there are tags.
        labels: the names of the ids.
    """

    def __init__(
        self, words: list[list[str]], places: Ragged, truth: list[list[int]] | None, labels: list[str]
    ) -> None:
        self.words, self.places, self.truth, self.labels = words, places, truth, labels


def _words(table: Any, data: DataConfig) -> list[list[str]]:
    """Return the words of every sentence.

    Raises:
        FederaError: a sentence that is no list of texts, or empty; it names the row.
    """
    sentences = list(table[data.tokens_column])
    for row, words in enumerate(sentences):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise RowError(row, f"column {data.tokens_column!r} is not a list of words")
        if not words:
            raise RowError(row, f"column {data.tokens_column!r} has no words")
    return sentences


def _pieces(sentences: list[list[str]], tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Return each sentence's token ids, and for each token the word whose first piece it is, else -1.

    The words are tokenised as one text with spaces between them, so a byte-level vocabulary sees the spaces
    that it was trained with. A word that comes to nothing (a lone joiner, say) becomes the unknown token: it
    has a tag, which must not be lost.
    """
    if not sentences:
        return [], []
    encoded = tokenizer(
        [" ".join(words) for words in sentences],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model: windows are to come
    )
    pieces, places = [], []
    for words, ids, offsets in zip(sentences, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        starts = ends - [len(word) for word in words]
        last = np.array([end - 1 for _, end in offsets], dtype=np.int64)
        # By its last character: a piece may begin with the space before its word.
        word = np.searchsorted(ends, last, side="right")
        word = np.where((word < len(words)) & (last >= starts[np.minimum(word, len(words) - 1)]), word, -1)
        one, place, expected = [], [], 0
        for piece, of in zip(ids, word.tolist(), strict=True):
            while of > expected:  # words without a piece
                one.append(tokenizer.unk_token_id)
                place.append(expected)
                expected += 1
            one.append(piece)
            place.append(of if of == expected else -1)
            expected += of == expected
        for missing in range(expected, len(words)):
            one.append(tokenizer.unk_token_id)
            place.append(missing)
        pieces.append(one)
        places.append(place)
    return pieces, places
