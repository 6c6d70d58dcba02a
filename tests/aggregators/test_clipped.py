import pytest
import torch
from pydantic import ValidationError

from federa.aggregators import ClippedMean
from federa.aggregators.clipped import clipped
from federa.types import Job, Update


def aggregate(max_norm, *pairs):
    aggregator = ClippedMean(max_norm=max_norm)
    accumulator = aggregator.init({"a": torch.zeros(1), "b": torch.zeros(1)})
    for client, ((a, b), weight) in enumerate(pairs):
        delta = {"a": torch.tensor([a]), "b": torch.tensor([b])}
        accumulator = aggregator.accumulate(accumulator, Update(Job(0, client, 0, 0.1), delta, weight, {}))
    result = aggregator.finish(accumulator)
    return [float(result["a"]), float(result["b"])]


def test_the_norm_is_over_all_tensors_and_keeps_the_direction():
    # (3, 4) has norm 5 over both tensors, though neither is longer than 4.5 alone.
    assert aggregate(2.5, ((3.0, 4.0), 1.0)) == pytest.approx([1.5, 2.0])
    assert aggregate(4.5, ((3.0, 4.0), 1.0)) == pytest.approx([2.7, 3.6])


def test_a_short_update_is_left_alone():
    assert aggregate(5.0, ((3.0, 4.0), 1.0)) == [3.0, 4.0]
    assert aggregate(1.0, ((0.0, 0.0), 1.0)) == [0.0, 0.0]


def test_clipping_comes_before_the_weighted_mean():
    # (30, 40) is clipped to (3, 4): (1 * (3, 4) + 3 * (1, 0)) / 4.
    assert aggregate(5.0, ((30.0, 40.0), 1.0), ((1.0, 0.0), 3.0)) == pytest.approx([1.5, 1.0])


def test_huge_values_do_not_overflow_and_the_update_is_not_changed():
    # The norm of the two is 4.2e38, more than float32 can hold.
    delta = {"a": torch.full((2,), 3e38)}
    assert clipped(delta, 1.0)["a"].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert torch.equal(delta["a"], torch.full((2,), 3e38))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf")])
def test_impossible_norms_are_refused(max_norm):
    with pytest.raises(ValidationError):
        ClippedMean(max_norm=max_norm)
