"""SQuAD's exact match and F1: cases worked out by hand, and the definition read out letter by letter."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federa.tasks.squad import exact_match, f1, normalised, squad_scores

# Prediction, gold answers, exact match, F1: F1 = 2PR / (P + R) of the words that are left.
CASES = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("denver broncos", ["Denver Broncos"], 1, 1),
    ("Denver", ["Denver Broncos"], 0, Fraction(2, 3)),  # P 1, R 1/2
    ("Denver Broncos team", ["Denver Broncos"], 0, Fraction(4, 5)),  # P 2/3, R 1
    ("Carolina Panthers", ["Denver Broncos"], 0, 0),
    ("", ["Denver"], 0, 0),
    # Words are a bag
    ("Broncos Denver", ["Denver Broncos"], 0, 1),
    ("Denver Denver", ["Denver Broncos"], 0, Fraction(1, 2)),  # one shared: P 1/2, R 1/2
    ("Denver Denver", ["Denver"], 0, Fraction(2, 3)),
    ("to be or not to be", ["to be"], 0, Fraction(1, 2)),  # P 2/6, R 1
    ("to be", ["to be or not to be"], 0, Fraction(1, 2)),
    ("to to be", ["to be to"], 0, 1),
    ("x y z", ["y z w"], 0, Fraction(2, 3)),
    ("in the year of 1066", ["1066"], 0, Fraction(2, 5)),  # in year of 1066: P 1/4
    ("1066", ["in 1066 or 1067"], 0, Fraction(2, 5)),
    ("the of and", ["of"], 0, Fraction(2, 3)),
    # Articles
    ("The Denver Broncos", ["Denver Broncos"], 1, 1),
    ("an apple", ["apple"], 1, 1),
    ("a theory of an atom", ["theory of atom"], 1, 1),
    ("a b c", ["b c"], 1, 1),
    ("vitamin A", ["vitamin"], 1, 1),
    ("analysis", ["nalysis"], 0, 0),  # whole words only
    ("another theory", ["other ory"], 0, 0),
    ("the", ["Denver"], 0, 0),
    ("THE 1990s", ["1990s", "1990"], 1, 1),
    ("in an a the end", ["in end"], 1, 1),
    (
        "a\u0301",
        ["\u0301"],
        1,
        1,
    ),  # a combining accent is no part of a word: the letter before it is an article
    # Nothing left: the same, yet without a shared word
    ("a", ["the"], 1, 0),
    ("AN", ["A"], 1, 0),
    ("", [""], 1, 0),
    ("", ["the"], 1, 0),
    ("...", ["!"], 1, 0),
    ("The The", ["the"], 1, 0),
    (" \n", ["-"], 1, 0),
    # Punctuation goes without a trace, before the articles do
    ("Denver Broncos.", ["Denver Broncos"], 1, 1),
    ("U.S.", ["US"], 1, 1),
    ("U. S.", ["US"], 0, 0),
    ("well-known", ["wellknown"], 1, 1),
    ("well known", ["well-known"], 0, 0),
    ("rock 'n' roll", ["rock n roll"], 1, 1),
    ("$100", ["100"], 1, 1),
    ("50%", ["50"], 1, 1),
    ("3.5", ["35"], 1, 1),
    ("1,000", ["1000"], 1, 1),
    ('"Saturday"', ["Saturday"], 1, 1),
    ("over_time", ["overtime"], 1, 1),
    ("e=mc^2", ["emc2"], 1, 1),
    ("C++", ["C"], 1, 1),
    ("a-b", ["b"], 0, 0),  # ab
    ("the-end", ["end"], 0, 0),
    ("a.d.", ["d"], 0, 0),
    ("'a' b", ["b"], 1, 1),
    ("Jr., Martin", ["Martin Jr"], 0, 1),
    # ASCII's punctuation only
    ("€100", ["100"], 0, 0),
    ("–10", ["10"], 0, 0),
    ("“Saturday”", ["Saturday"], 0, 0),
    ("Levi’s Stadium", ["Levi's Stadium"], 0, Fraction(1, 2)),
    # Letters
    ("Beyoncé's", ["Beyoncés"], 1, 1),
    ("Beyonce", ["Beyoncé"], 0, 0),
    ("ÉCOLE", ["école"], 1, 1),
    ("STRASSE", ["straße"], 0, 0),
    ("中国", ["中国"], 1, 1),
    ("中 国", ["中国"], 0, 0),
    ("five", ["5"], 0, 0),
    # Spaces of any kind
    ("  Denver   Broncos ", ["Denver Broncos"], 1, 1),
    ("North\nCarolina", ["North Carolina"], 1, 1),
    ("North\tCarolina", ["North Carolina"], 1, 1),
    ("North\u00a0Carolina", ["North Carolina"], 1, 1),
    # Several gold answers: the best, each score for itself
    ("1990", ["1990s", "the 1990"], 1, 1),
    ("New York", ["New York City", "York"], 0, Fraction(4, 5)),
    ("New York", ["York", "New York City"], 0, Fraction(4, 5)),
    ("A.D. 70", ["AD 70", "70"], 1, 1),
    ("the", ["a", "the end"], 1, 0),
    ("x", ["y", "z", "w"], 0, 0),
]


def test_there_are_fifty_cases():
    assert len({(guess, *golds) for guess, golds, _, _ in CASES}) == len(CASES) >= 50


@pytest.mark.parametrize(("guess", "golds", "exact", "overlap"), CASES)
def test_by_hand(guess, golds, exact, overlap):
    expected = {"exact_match": exact, "f1": float(overlap)}
    assert squad_scores([guess], [golds]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("guess", "golds", "exact", "overlap"), [c for c in CASES if len(c[1]) == 1])
def test_neither_score_minds_which_is_the_gold_one(guess, golds, exact, overlap):
    assert exact_match(golds[0], guess) == bool(exact)
    assert f1(golds[0], guess) == pytest.approx(float(overlap), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The Quick, Brown FOX!", "quick brown fox"),
        ("  an  a the  ", ""),
        ("a an the thee Athe", "thee athe"),
        ("it's-the (same)", "itsthe same"),
        ("the", ""),
        ("x a", "x"),
    ],
)
def test_what_is_left_of_an_answer(text, left):
    assert normalised(text) == left
    assert normalised(left) == left


def test_the_means_are_over_questions():
    found = squad_scores(["Paris", "the Seine river", "Rhone"], [["Paris"], ["Seine"], ["Loire", "Rhine"]])
    assert found == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 2 / 3 + 0) / 3)}


def test_as_many_predictions_as_questions():
    with pytest.raises(ValueError, match="zip"):
        squad_scores(["a"], [["a"], ["b"]])


# The definition, letter by letter


def read_out(text):
    """Lower, drop punctuation, blank the articles, part at white space."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def by_definition(guess, gold):
    """Return exact match and F1, taking shared words away one by one."""
    one, other = read_out(guess), read_out(gold)
    rest, shared = list(other), 0
    for word in one:
        if word in rest:
            rest.remove(word)
            shared += 1
    overlap = 0 if shared == 0 else 2 / (len(one) / shared + len(other) / shared)
    return float(one == other), overlap


answers = st.lists(
    st.sampled_from(
        ["a", "an", "the", "The", "Paris", "in", "U.S.", "-", "’", "é", "the-", " ", "\n", "1,000", "x"]
    ),
    max_size=6,
).map(" ".join) | st.text(max_size=8)


@given(answers, st.lists(answers, min_size=1, max_size=3))
def test_any_answer_is_scored_by_definition(guess, golds):
    each = [by_definition(guess, gold) for gold in golds]
    expected = {"exact_match": max(e for e, _ in each), "f1": max(f for _, f in each)}
    assert squad_scores([guess], [golds]) == pytest.approx(expected, abs=1e-12)


def test_real_answers_are_scored_by_definition(shared):
    """The second answer to every question of the dev set, against the others; right is what people agree on."""
    golds = [cell["text"] for cell in shared("squad", "validation")["answers"] if len(cell["text"]) > 1]
    cases = [(texts[1], [texts[0], *texts[2:]]) for texts in golds]
    assert len(cases) > 10_000
    for guess, others in cases:
        each = [by_definition(guess, gold) for gold in others]
        expected = {"exact_match": max(e for e, _ in each), "f1": max(f for _, f in each)}
        found = squad_scores([guess], [others])
        assert found == pytest.approx(expected, abs=1e-12), (guess, others)
    guesses, others = zip(*cases, strict=True)
    found = squad_scores(guesses, others)
    assert 0.8 < found["exact_match"] < 0.83 and 0.9 < found["f1"] < 0.92
