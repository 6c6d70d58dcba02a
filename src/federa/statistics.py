"""What a sceptic asks of a comparison: paired differences, their intervals, and costs to a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from federa.seeds import generator
from federa.types import Record

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference of two methods on the same settings and seeds, first minus second.

    Attributes:
        mean: over settings of the mean over seeds.
        spread: sample standard deviation over all pairs; NaN for one.
        low: the lower end of the 95 % bootstrap interval of the mean; NaN for one pair.
        high: the upper end.
        wins: pairs in which the first is ahead; a tie is half a win.
        pairs: how many there are.
    """

    mean: float
    spread: float
    low: float
    high: float
    wins: float
    pairs: int


def paired(first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float]) -> Paired | None:
    """Return the paired difference of two methods, or None if they share no run.

    The interval is a percentile bootstrap (Efron and Tibshirani 1993, chapter 13) that draws settings, and
    within each of them seeds: runs of one setting have a partition and a data set in common. With three seeds
    of one setting it is narrow; it can be no wider than what was seen.

    Args:
        first: scores by setting and seed.
        second: likewise; pairs are the keys in both.
    """
    by_setting: dict[str, list[float]] = {}
    for key in sorted(first.keys() & second.keys()):
        by_setting.setdefault(key[0], []).append(first[key] - second[key])
    if not by_setting:
        return None
    groups = [np.array(values) for values in by_setting.values()]
    every = np.concatenate(groups)
    mean = float(np.mean([group.mean() for group in groups]))
    low = high = spread = float("nan")
    if len(every) > 1:
        spread = float(np.std(every, ddof=1))
        low, high = (float(end) for end in np.quantile(_resampled(groups), _ends()))
    wins = float((every > 0).sum() + 0.5 * (every == 0).sum())
    return Paired(mean, spread, low, high, wins, len(every))


def _ends() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _resampled(groups: Sequence[Floats]) -> Floats:
    """Return bootstrap draws of the mean over settings of the mean over seeds, `(RESAMPLES,)`."""
    rng = generator(0, "bootstrap")
    # Of every setting as many means over resampled seeds as there are draws, then a setting for each place.
    means = np.stack(
        [rng.choice(group, (RESAMPLES, len(group), len(groups))).mean(axis=1) for group in groups]
    )
    chosen = rng.integers(0, len(groups), (RESAMPLES, len(groups)))
    draws = means[chosen, np.arange(RESAMPLES)[:, None], np.arange(len(groups))]
    means_over: Floats = draws.mean(axis=1)
    return means_over


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took until its metric first reached a target.

    Attributes:
        round: the round it was reached in.
        bytes: sent up and down until then.
        seconds: of the rounds until then.
    """

    round: float
    bytes: float
    seconds: float


def cost_to(records: Iterable[Record], metric: str, target: float) -> Cost | None:
    """Return what a run took to reach a target, or None if it did not (or was not evaluated on the way)."""
    sent = seconds = 0.0
    for record in records:
        sent += record["bytes_up"] + record["bytes_down"]
        seconds += record["seconds_round"]
        if record.get(metric, -np.inf) >= target:
            return Cost(float(record["round"]), sent, seconds)
    return None


def mean_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """Return the mean over runs, or None unless all of them reached the target."""
    reached = [cost for cost in costs if cost is not None]
    if not reached or len(reached) < len(costs):
        return None
    mean = np.mean([(cost.round, cost.bytes, cost.seconds) for cost in reached], axis=0)
    return Cost(*(float(value) for value in mean))
