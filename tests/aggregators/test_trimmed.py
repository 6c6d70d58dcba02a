import pytest
import torch
from pydantic import ValidationError

from federa.aggregators import TrimmedMean
from federa.types import Job, Update


def trimmed(trim, values):
    aggregator = TrimmedMean(trim=trim)
    accumulator = aggregator.init({"w": torch.zeros(())})
    for client, value in enumerate(values):
        update = Update(Job(0, client, 0, 0.1), {"w": torch.tensor(float(value))}, 1.0, {})
        accumulator = aggregator.accumulate(accumulator, update)
    return float(aggregator.finish(accumulator)["w"])


def test_the_share_is_cut_at_each_end():
    # Two of ten at each end: the mean of 2, 3, 5, 7, 11, 13 is 41 / 6.
    values = [13, -100, 2, 1000, 3, 0, 5, 500, 7, 11]
    assert trimmed(0.2, values) == pytest.approx(41 / 6)


def test_the_number_cut_is_rounded_down():
    # 0.25 * 7 = 1.75: one at each end, (1 + 2 + 3 + 4 + 5) / 5 stays.
    assert trimmed(0.25, [-60, 1, 2, 3, 4, 5, 70]) == 3.0
    assert trimmed(0.25, [-60, -60, 1, 2, 3, 4, 5]) == pytest.approx((-60 + 1 + 2 + 3 + 4) / 5)


def test_three_or_more_clients_lose_at_least_one_at_each_end():
    assert trimmed(0.1, [1, 2, 900]) == 2.0
    assert trimmed(0.1, [-900, 1, 3, 900]) == 2.0


@pytest.mark.parametrize(("values", "expected"), [([4], 4.0), ([4, 6], 5.0)])
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.4999999999])
def test_one_or_two_clients_are_all_kept(trim, values, expected):
    assert trimmed(trim, values) == expected


def test_zero_trim_is_the_mean():
    assert trimmed(0.0, [1, 2, 900]) == 301.0


def test_binary_fractions_cost_no_client():
    assert 0.29 * 100 < 29
    assert TrimmedMean(trim=0.29)._cut(100) == 29


@pytest.mark.parametrize("clients", range(1, 40))
def test_something_is_always_left(clients):
    assert 2 * TrimmedMean(trim=0.4999999999)._cut(clients) < clients


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="no update"):
        trimmed(0.1, [])


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_impossible_shares_are_refused(trim):
    with pytest.raises(ValidationError):
        TrimmedMean(trim=trim)
