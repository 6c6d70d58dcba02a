"""SQuAD's exact match and F1 (Rajpurkar et al. 2016, and the evaluation script v1.1 that came with it).

Answers are compared once normalised; the best of the gold answers counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from federa.data.normal import normalised


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether two answers are the same once normalised."""
    return normalised(prediction) == normalised(answer)


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words, as bags; 0 where they share none.

    Two answers that are both empty once normalised share no word, and score 0, as in the script.
    """
    guess, gold = normalised(prediction).split(), normalised(answer).split()
    shared = (Counter(guess) & Counter(gold)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(guess), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the means of exact match and F1 over questions, from 0 to 1 (the script says percent).

    Args:
        predictions: one a question.
        answers: the gold answers of each question; one at least.
    """
    best = [
        (max(exact_match(guess, gold) for gold in golds), max(f1(guess, gold) for gold in golds))
        for guess, golds in zip(predictions, answers, strict=True)
    ]
    return {
        "f1": sum(score for _, score in best) / len(best),
        "exact_match": sum(hit for hit, _ in best) / len(best),
    }
