"""Randomness is a function of (seed, purpose, round, client), on every machine and in every process."""

import numpy as np
import pytest
import torch

from federa.seeds import generator, seed_for, torch_seeded


def test_seeds_are_the_same_everywhere():
    """Written out, so that another machine, Python or release that draws otherwise is noticed."""
    assert seed_for(0) == 7896617691693857887
    assert seed_for(3, "client", 2, 5) == 2750261654682203765


def test_seeds_of_different_purposes_differ():
    paths = [
        (),
        ("cohort",),
        ("batches",),
        ("cohort", 1),
        ("cohort", 2),
        ("client", 1, 2),
        ("client", 2, 1),
        (1,),
        (12,),
    ]
    seeds = {seed_for(root, *path) for root in (0, 1, 2**40) for path in paths}
    assert len(seeds) == 3 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_many_clients_have_seeds_of_their_own():
    assert len({seed_for(0, "client", r, c) for r in range(30) for c in range(300)}) == 9000


def test_generators():
    first, again = (generator(5, "batches", 1).random(4) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, generator(5, "batches", 2).random(4))


def test_torch_is_seeded_inside_and_left_alone_outside():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with torch_seeded(9):
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    with torch_seeded(9):
        assert torch.equal(torch.rand(3), first)


def test_torch_is_left_alone_after_an_error_too():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), torch_seeded(9):
        torch.rand(3)
        _ = 1 / 0
    assert torch.equal(torch.rand(2), expected)
