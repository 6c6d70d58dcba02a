"""Entities in BIO tags: reading them, and scoring them as exact spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]
"""An entity: its type, its first word, and the word after its last."""

OUTSIDE = "O"
BIOES = {"B": "B", "I": "I", "E": "I", "S": "B", "L": "I", "U": "B"}
"""BIO's mark for each of BIOES, or of BILOU, which is the same with other letters."""
CONTINUES = "IEL"


def split_tag(tag: str) -> tuple[str, str]:
    """Return the mark (`B`, `I` or `O`) and the type (empty for `O`) of a tag."""
    mark, _, kind = tag.partition("-")
    return mark, kind


def illegal(tags: Sequence[str], marks: str = "BI") -> int | None:
    """Return the first word whose tag cannot stand there in BIO, or None.

    A tag is `O`, `B-TYPE` or `I-TYPE`, and `I-TYPE` follows a `B-` or `I-` of the same type.

    Args:
        tags: of a sentence.
        marks: those that there are beside `O`; with `BIOES`'s, `E-TYPE` is an `I-` that ends its entity, and
            `S-TYPE` an entity of one word, and an entity of several must end with an `E-`.
    """
    before, closed = "", "E" in marks
    for i, tag in enumerate(tags):
        mark, kind = split_tag(tag)
        if tag != OUTSIDE and (len(mark) != 1 or mark not in marks or not kind):
            return i
        if mark in CONTINUES and kind != before:
            return i
        if closed and before and mark not in CONTINUES:
            return i  # the entity before has no end
        before = kind if mark in "BI" else ""
    return len(tags) - 1 if closed and before else None


def from_iob1(tags: Sequence[str]) -> list[str]:
    """Return IOB1 tags (where `B-` only parts two entities of one type that touch) as BIO tags.

    Ramshaw and Marcus 1995; the files of CoNLL-2003 are in it.
    """
    out, before = [], OUTSIDE
    for tag in tags:
        starts = tag.startswith("I-") and split_tag(before)[1] != split_tag(tag)[1]
        out.append("B-" + tag[2:] if starts else tag)
        before = tag
    return out


def from_bioes(tags: Sequence[str]) -> list[str]:
    """Return legal BIOES tags as BIO tags."""
    return [tag if tag == OUTSIDE else BIOES[tag[0]] + tag[1:] for tag in tags]


def spans(tags: Iterable[str]) -> list[Span]:
    """Return the entities of BIO tags, strictly: each begins with `B-`, and an `I-` without one is no entity.

    This is what seqeval counts with `mode="strict", scheme=IOB2`.
    """
    found: list[Span] = []
    kind, start = "", 0
    end = 0
    for end, tag in enumerate((*tags, OUTSIDE)):
        mark, this = split_tag(tag)
        if kind and not (mark == "I" and this == kind):
            found.append((kind, start, end))
            kind = ""
        if mark == "B":
            kind, start = this, end
    return found


def span_scores(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 over all entities (micro averages), and the macro average of F1.

    Args:
        truth: BIO tags, one sequence a sentence.
        predicted: likewise; sentences of equal length.

    An entity counts as found if type, first and last word agree. Where there is nothing to find or nothing
    found, the ratio is 0, as in seqeval; so a sentence without entities adds nothing.
    """
    hits, found, there = Counter[str](), Counter[str](), Counter[str]()
    for one, other in zip(truth, predicted, strict=True):
        if len(one) != len(other):
            raise ValueError(f"a sentence of {len(one)} words has {len(other)} predicted tags")
        gold, guess = set(spans(one)), set(spans(other))
        there.update(kind for kind, _, _ in gold)
        found.update(kind for kind, _, _ in guess)
        hits.update(kind for kind, _, _ in gold & guess)
    kinds = sorted(there.keys() | found.keys())
    each = [_f1(hits[kind], found[kind], there[kind]) for kind in kinds]
    correct, guesses, entities = hits.total(), found.total(), there.total()
    return {
        "f1": _f1(correct, guesses, entities),
        "precision": correct / guesses if guesses else 0.0,
        "recall": correct / entities if entities else 0.0,
        "macro_f1": sum(each) / len(each) if each else 0.0,
    }


def _f1(hits: int, found: int, there: int) -> float:
    return 2 * hits / (found + there) if found + there else 0.0
