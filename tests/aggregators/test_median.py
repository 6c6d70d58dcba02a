import pytest
import torch

from federa.aggregators import Median
from federa.types import Job, Update


def median(*rows, weights=None):
    aggregator = Median()
    accumulator = aggregator.init({"w": torch.zeros(2)})
    for client, row in enumerate(rows):
        weight = weights[client] if weights else 1.0
        update = Update(Job(0, client, 0, 0.1), {"w": torch.tensor(row)}, weight, {})
        accumulator = aggregator.accumulate(accumulator, update)
    return aggregator.finish(accumulator)["w"].tolist()


def test_each_coordinate_has_its_own_median():
    assert median([1.0, 9.0], [3.0, -2.0], [100.0, 5.0]) == [3.0, 5.0]


def test_an_even_number_of_clients_gives_the_mean_of_the_middle_two():
    assert median([1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [1000.0, 8.0]) == [3.0, 0.0]
    assert median([1.0, 2.0], [2.0, 6.0]) == [1.5, 4.0]


def test_weights_play_no_part():
    assert median([1.0, 1.0], [2.0, 2.0], [3.0, 3.0], weights=[1e9, 1.0, 1.0]) == [2.0, 2.0]


def test_two_wrong_clients_of_five_do_not_move_it_out_of_the_right_ones():
    assert median([1.0, 1.0], [1.1, 1.0], [0.9, 1.0], [1e30, -1e30], [1e30, -1e30])[1] == 1.0


def test_nothing_has_no_median():
    with pytest.raises(ValueError, match="no update"):
        median()
