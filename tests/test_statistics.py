"""Paired differences by hand, intervals that cover, and costs to a target."""

import math

import numpy as np
import pytest

from federa.statistics import Cost, cost_to, mean_cost, paired


def scores(setting, *values):
    return {(setting, seed): value for seed, value in enumerate(values)}


def test_a_paired_difference_by_hand():
    found = paired(scores("a", 0.5, 0.7, 0.6), scores("a", 0.4, 0.7, 0.7))
    assert found.mean == pytest.approx(0.0)
    assert found.spread == pytest.approx(0.1)
    assert (found.wins, found.pairs) == (1.5, 3)
    assert found.low < 0 < found.high
    assert found.low >= -0.1 - 1e-12 and found.high <= 0.1 + 1e-12, "no wider than what was seen"


def test_only_runs_of_both_are_compared():
    found = paired({("a", 0): 1.0, ("a", 1): 0.0}, {("a", 1): 0.5, ("b", 0): 9.0})
    assert (found.mean, found.pairs) == (-0.5, 1)
    assert math.isnan(found.spread) and math.isnan(found.low) and math.isnan(found.high)
    assert paired({("a", 0): 1.0}, {("b", 0): 1.0}) is None


def test_settings_weigh_the_same_whatever_their_number_of_seeds():
    found = paired(
        {**scores("a", 1, 1, 1, 1), **scores("b", 0)}, {**scores("a", 0, 0, 0, 0), **scores("b", 1)}
    )
    assert found.mean == pytest.approx(0.0)
    assert found.pairs == 5


def test_the_same_difference_everywhere_has_an_interval_of_no_width():
    found = paired(scores("a", 0.6, 0.8), scores("a", 0.5, 0.7))
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.wins == 2


def test_the_interval_draws_settings_as_well_as_seeds():
    """Seeds agree, settings do not: what one more setting would show is uncertain."""
    found = paired(
        {**scores("a", 1, 1, 1), **scores("b", 0, 0, 0)}, {**scores("a", 0, 0, 0), **scores("b", 0, 0, 0)}
    )
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.3, 1.0, 30)
        found = paired(scores("a", *values), scores("a", *np.zeros(30)))
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_does_not_vary():
    one, other = scores("a", 0.5, 0.9, 0.1), scores("a", 0.4, 0.2, 0.3)
    assert paired(one, other) == paired(one, other)


RECORDS = [
    {"round": 1, "bytes_up": 1, "bytes_down": 2, "seconds_round": 0.5, "f1": 0.2},
    {"round": 2, "bytes_up": 1, "bytes_down": 2, "seconds_round": 0.5},
    {"round": 3, "bytes_up": 1, "bytes_down": 3, "seconds_round": 1.0, "f1": 0.6},
    {"round": 4, "bytes_up": 1, "bytes_down": 3, "seconds_round": 1.0, "f1": 0.5},
]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.2, Cost(1, 3, 0.5)), (0.3, Cost(3, 10, 2.0)), (0.6, Cost(3, 10, 2.0)), (0.61, None)],
)
def test_the_cost_to_a_target_counts_all_rounds_up_to_it(target, expected):
    assert cost_to(RECORDS, "f1", target) == expected
    assert cost_to([], "f1", target) is None


def test_a_mean_cost_is_one_only_if_all_reach_the_target():
    assert mean_cost([Cost(1, 2, 3), Cost(3, 4, 5)]) == Cost(2, 3, 4)
    assert mean_cost([Cost(1, 2, 3), None]) is None
    assert mean_cost([]) is None
