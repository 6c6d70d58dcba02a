"""Entities of BIO tags: by hand, and as seqeval counts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federa.tasks.spans import BIOES, from_bioes, from_iob1, illegal, span_scores, spans, split_tag

KINDS = ("PER", "LOC", "creative-work")
LEGAL = [["O"], ["B-PER"], ["B-PER", "I-PER"], ["B-LOC"], ["B-creative-work", "I-creative-work"]]


def tags(text):
    return text.split()


# Reading tags


@pytest.mark.parametrize(
    ("tag", "parts"),
    [("O", ("O", "")), ("B-PER", ("B", "PER")), ("I-creative-work", ("I", "creative-work")), ("", ("", ""))],
)
def test_a_tag_is_a_mark_and_a_type(tag, parts):
    assert split_tag(tag) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "O O O",
        "B-PER",
        "B-PER I-PER I-PER",
        "B-PER B-PER I-PER O B-LOC",
        "O B-creative-work I-creative-work B-creative-work",
    ],
)
def test_bio_is_legal(text):
    assert illegal(tags(text)) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("I-PER", 0),
        ("O I-PER", 1),
        ("B-PER O I-PER", 2),
        ("B-PER I-LOC", 1),
        ("B-PER I-PER I-LOC I-PER", 2),
        ("O PER", 1),
        ("O S-PER", 1),
        ("B", 0),
        ("B-", 0),
        ("O-PER", 0),
        ("o", 0),
        ("O BI-PER", 1),
        ("O b-PER", 1),
    ],
)
def test_the_first_word_that_is_not_bio(text, word):
    assert illegal(tags(text)) == word


def test_an_empty_tag_is_illegal():
    assert illegal(["O", ""]) == 1


@pytest.mark.parametrize(
    ("iob1", "bio"),
    [
        ("", ""),
        ("O O", "O O"),
        ("I-PER I-PER O I-LOC", "B-PER I-PER O B-LOC"),
        ("I-PER B-PER I-PER", "B-PER B-PER I-PER"),
        ("I-PER I-LOC", "B-PER B-LOC"),
        ("B-PER I-PER", "B-PER I-PER"),
        ("B-PER I-LOC I-LOC", "B-PER B-LOC I-LOC"),
        ("I-LOC O I-LOC B-LOC", "B-LOC O B-LOC B-LOC"),
    ],
)
def test_iob1_by_hand(iob1, bio):
    assert from_iob1(tags(iob1)) == tags(bio)


@pytest.mark.parametrize(
    ("bioes", "bio"),
    [
        ("", ""),
        ("O S-PER S-PER", "O B-PER B-PER"),
        ("B-PER E-PER B-PER I-PER E-PER", "B-PER I-PER B-PER I-PER I-PER"),
        ("U-LOC B-LOC L-LOC O", "B-LOC B-LOC I-LOC O"),
        ("S-creative-work B-PER E-PER", "B-creative-work B-PER I-PER"),
    ],
)
def test_bioes_by_hand(bioes, bio):
    assert illegal(tags(bioes), "".join(BIOES)) is None
    assert from_bioes(tags(bioes)) == tags(bio)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("E-PER", 0),
        ("O I-PER", 1),
        ("S-PER E-PER", 1),
        ("B-PER E-PER I-PER", 2),
        ("B-PER E-LOC", 1),
        ("B-PER L-PER L-PER", 2),
        ("O BI-PER", 1),
        ("E", 0),
        ("B-PER O S-PER", 1),  # an entity without an end
        ("B-PER I-PER B-PER E-PER", 2),
        ("O B-PER I-PER", 2),
    ],
)
def test_the_first_word_that_is_not_bioes(text, word):
    assert illegal(tags(text), "".join(BIOES)) == word


def to_iob1(bio):
    """Keep `B-` only between two entities of one type that touch."""
    before = ["O", *bio]
    return [
        "I-" + tag[2:] if tag.startswith("B-") and split_tag(last)[1] != tag[2:] else tag
        for last, tag in zip(before, bio)
    ]


@given(st.lists(st.sampled_from(LEGAL), max_size=8))
def test_iob1_is_undone(parts):
    bio = [tag for part in parts for tag in part]
    assert illegal(bio) is None
    assert from_iob1(to_iob1(bio)) == bio


# Entities


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("O O", []),
        ("B-PER", [("PER", 0, 1)]),
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER I-PER", [("PER", 0, 2)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1)]),
        ("I-PER I-PER", []),
        ("O I-PER B-LOC I-LOC", [("LOC", 2, 4)]),
        ("B-PER I-PER I-LOC I-PER", [("PER", 0, 2)]),
        ("B-creative-work I-creative-work O", [("creative-work", 0, 2)]),
    ],
)
def test_entities_by_hand(text, found):
    assert spans(tags(text)) == found
    assert spans(iter(tags(text))) == found


def test_scores_by_hand():
    """Two of three guesses are right, two of four entities found; LOC 1 of (1, 2), PER 1 of (2, 2)."""
    truth = [tags("B-PER I-PER O B-LOC"), tags("B-PER O B-LOC I-LOC")]
    guess = [tags("B-PER I-PER O B-LOC"), tags("B-PER I-PER O O")]
    found = span_scores(truth, guess)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 4)
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize(
    ("truth", "guess", "f1"),
    [
        ("B-PER I-PER I-PER", "B-PER I-PER O", 0.0),  # a word short is no entity found
        ("B-PER", "B-LOC", 0.0),
        ("B-PER I-PER", "I-PER I-PER", 0.0),
        ("O O", "O O", 0.0),  # nothing to find
        ("O O", "B-PER O", 0.0),
        ("B-PER O", "O O", 0.0),
        ("B-PER B-PER", "B-PER B-PER", 1.0),
    ],
)
def test_an_entity_counts_whole_or_not_at_all(truth, guess, f1):
    found = span_scores([tags(truth)], [tags(guess)])
    assert found["f1"] == found["macro_f1"] == f1


def test_spans_of_two_sentences_are_not_mixed_up():
    truth, guess = [tags("B-PER O"), tags("O B-PER")], [tags("O B-PER"), tags("B-PER O")]
    assert span_scores(truth, guess)["f1"] == 0.0


def test_sentences_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="a sentence of 2 words has 1 predicted tags"):
        span_scores([tags("O O")], [tags("O")])
    with pytest.raises(ValueError, match="zip"):
        span_scores([tags("O")], [tags("O"), tags("O")])


# As seqeval

any_tags = st.lists(
    st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BI" for kind in KINDS)]), min_size=1, max_size=12
)


@given(any_tags)
def test_entities_are_seqevals(sequence):
    """Legal or not."""
    scheme = pytest.importorskip("seqeval.scheme")
    theirs = scheme.Entities([sequence], scheme.IOB2).entities[0]
    assert spans(sequence) == [(one.tag, one.start, one.end) for one in theirs]


def random_corpus(rng):
    """Return true and predicted tags of one to three sentences; guesses are half right, and may be illegal."""
    words = ["O", "O", *(f"{mark}-{kind}" for mark in "BI" for kind in KINDS[: rng.integers(1, 4)])]
    truth = [rng.choice(words, rng.integers(1, 12)).tolist() for _ in range(rng.integers(1, 4))]
    return truth, [[t if rng.random() < 0.6 else str(rng.choice(words)) for t in one] for one in truth]


@pytest.mark.filterwarnings("ignore")
def test_scores_are_seqevals_on_a_thousand_random_cases():
    metrics = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2

    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(1000):
        truth, guess = random_corpus(rng)
        found = span_scores(truth, guess)
        how = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
        expected = {
            "precision": metrics.precision_score(truth, guess, **how),
            "recall": metrics.recall_score(truth, guess, **how),
            "f1": metrics.f1_score(truth, guess, **how),
            "macro_f1": metrics.f1_score(truth, guess, average="macro", **how),
        }
        if not any(spans(one) for one in (*truth, *guess)):
            expected["macro_f1"] = 0.0  # a mean over no type, which is none of seqeval's
        assert found == pytest.approx(expected, abs=1e-12), (truth, guess)
        seen.add(round(found["f1"], 2))
    assert len(seen) > 20, "many different scores"
