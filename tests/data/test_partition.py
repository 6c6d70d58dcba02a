import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federa.data.partition import (
    PARTITIONERS,
    Dirichlet,
    FedNLP,
    Iid,
    Natural,
    Partitioner,
    Pathological,
    Quantity,
    _cut,
    _dirichlet,
    group_counts,
    partition_examples,
)
from federa.seeds import generator
from federa.types import FederaError


def sizes(parts):
    return [len(part) for part in parts]


def effective_classes(parts, groups, num_groups):
    """Mean over clients of exp(entropy of the client's class shares)."""
    counts = group_counts(parts, groups, num_groups)
    shares = counts[counts.sum(1) > 0] / counts[counts.sum(1) > 0].sum(1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float(np.exp(-(shares * logs).sum(1)).mean())


@st.composite
def problems(draw):
    """A partitioner and groups that it can split."""
    clients = draw(st.integers(1, 12))
    least = draw(st.integers(1, 3))
    rows = draw(st.integers(clients * least, clients * least + 80))
    num_groups = draw(st.integers(1, 9))
    groups = np.random.default_rng(draw(st.integers(0, 99))).integers(0, num_groups, rows)
    found = len(np.unique(groups))
    alpha = draw(st.sampled_from([1e-3, 0.01, 0.5, 100.0]))
    base = {"clients": clients, "min_examples": least}
    partitioner = draw(
        st.sampled_from(
            [
                Iid(**base),
                Dirichlet(**base, alpha=alpha),
                FedNLP(**base, alpha=alpha),
                Quantity(**base, beta=alpha),
                Pathological(**base, classes_per_client=-(-found // clients)),
                Natural(column="c", min_examples=1),
                Natural(column="c", clients=min(clients, found), min_examples=least),
            ]
        )
    )
    return partitioner, groups


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 5))
def test_every_row_is_held_once_and_no_client_falls_short(problem, seed):
    partitioner, groups = problem
    parts = partition_examples(partitioner, groups, seed)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(groups)))
    assert min(sizes(parts)) >= partitioner.min_examples
    assert len(parts) == (partitioner.clients or len(np.unique(groups)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(0, 200))
def test_cut_adds_up_and_never_exceeds_whole_weights_that_suffice(weights, total):
    weights = np.array(weights)
    total = min(total, int(weights.sum()))
    cut = _cut(total, weights)
    assert cut.sum() == total and (cut >= 0).all() and (cut <= weights).all()
    if total:
        assert (abs(cut - total * weights / weights.sum()) < 1).all()


def test_cut_rounds_the_cumulative_shares():
    # Cumulative 10 * (0.25, 0.5, 1) = 2.5, 5, 10 are rounded to 3, 5, 10.
    assert _cut(10, np.array([0.25, 0.25, 0.5])).tolist() == [3, 2, 5]


@pytest.mark.parametrize("alpha", [1e-320, 1e-3, 0.01])
def test_dirichlet_draws_stay_finite_where_gamma_variables_underflow(alpha):
    rng = np.random.default_rng(0)
    draws = np.array([_dirichlet(np.full(100, alpha), rng) for _ in range(200)])
    assert np.isfinite(draws).all()
    assert np.allclose(draws.sum(1), 1)
    assert draws.max(1).mean() > 0.6


def test_dirichlet_draws_have_the_means_and_variances_of_the_distribution():
    alphas = np.array([0.5, 1.0, 2.5])
    rng = np.random.default_rng(0)
    draws = np.array([_dirichlet(alphas, rng) for _ in range(5000)])
    mean = alphas / 4
    assert np.allclose(draws.mean(0), mean, atol=0.01)
    assert np.allclose(draws.var(0), mean * (1 - mean) / 5, rtol=0.1)  # variance m(1-m)/(sum + 1)


def test_seed_decides_the_split():
    groups = np.arange(300) % 6
    for partitioner in (Iid(), Dirichlet(), FedNLP(), Quantity(), Pathological()):
        first, again, other = (partition_examples(partitioner, groups, seed) for seed in (1, 1, 2))
        assert all(map(np.array_equal, first, again))
        assert not all(map(np.array_equal, first, other))


def test_iid_is_shuffled_and_equal():
    parts = partition_examples(Iid(clients=4), np.zeros(10, dtype=np.int64), 0)
    assert sizes(parts) == [3, 3, 2, 2]
    assert not all((np.diff(part) == 1).all() for part in parts)


def test_dirichlet_cuts_each_class_at_the_cumulative_draw():
    groups = np.array([7] * 100 + [3] * 50)
    parts = Dirichlet(clients=3, alpha=0.7).assign(groups, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    expected = [_cut(size, _dirichlet(np.full(3, 0.7), rng)) for size in (50, 100)]  # ascending: class 3, 7
    assert group_counts(parts, groups, 8)[:, [3, 7]].T.tolist() == [list(cut) for cut in expected]


def test_dirichlet_takes_rows_of_a_class_at_random():
    parts = Dirichlet(clients=2, alpha=100).assign(np.zeros(100, dtype=np.int64), np.random.default_rng(0))
    assert parts[0].max() > 90 and parts[1].min() < 10


def test_dirichlet_skew_of_twenty_balanced_classes():
    groups = np.arange(20_000) % 20
    seen = [
        effective_classes(partition_examples(Dirichlet(clients=100, alpha=0.1), groups, s), groups, 20)
        for s in range(3)
    ]
    assert np.mean(seen) == pytest.approx(4.2, abs=0.6)


def test_fednlp_skew_of_twenty_balanced_classes():
    groups = np.arange(20_000) % 20
    runs = [partition_examples(FedNLP(clients=100, alpha=0.1), groups, seed) for seed in range(3)]
    # The first clients draw from full pools and show the mixes themselves: 1.20 in theory.
    assert np.mean([effective_classes(run[:20], groups, 20) for run in runs]) == pytest.approx(1.2, abs=0.2)
    # The last ones get what is left (over all clients 2.8 to 3.2 for these seeds).
    assert 2.3 < np.mean([effective_classes(run, groups, 20) for run in runs]) < 3.7


def test_fednlp_sizes_are_equal_and_the_remainder_goes_to_the_first():
    parts = partition_examples(FedNLP(clients=4, alpha=0.05), np.arange(23) % 3, 0)
    assert sizes(parts) == [6, 6, 6, 5]


def test_fednlp_with_a_large_alpha_follows_the_global_prior():
    groups = np.array([0] * 600 + [1] * 300 + [2] * 100)
    counts = group_counts(partition_examples(FedNLP(clients=10, alpha=1e6), groups, 0), groups, 3)
    assert (abs(counts - [60, 30, 10]) <= 1).all()


def test_fednlp_refills_a_deficit_in_proportion_to_what_is_left(monkeypatch):
    # Everybody wants class 0 only. The first client takes 12 of its 16 rows; the second takes the 4 left
    # and 8 more from classes 1 and 2, that have 24 and 8 rows: 6 and 2.
    monkeypatch.setattr("federa.data.partition._dirichlet", lambda alphas, rng: np.array([1.0, 0.0, 0.0]))
    groups = np.array([0] * 16 + [1] * 24 + [2] * 8)
    counts = group_counts(FedNLP(clients=4).assign(groups, np.random.default_rng(0)), groups, 3)
    assert counts[:2].tolist() == [[12, 0, 0], [4, 6, 2]]


def test_fednlp_concentration_is_alpha_times_the_prior(monkeypatch):
    seen = []
    monkeypatch.setattr("federa.data.partition._dirichlet", lambda alphas, rng: seen.append(alphas) or alphas)
    FedNLP(clients=2, alpha=4.0).assign(np.array([0, 0, 0, 1]), np.random.default_rng(0))
    assert [list(alphas) for alphas in seen] == [[3.0, 1.0], [3.0, 1.0]]


def test_quantity_skews_sizes_but_not_mixes():
    groups = np.arange(20_000) % 2
    parts = partition_examples(Quantity(clients=10, beta=1.0), groups, 0)
    assert max(sizes(parts)) > 3 * min(sizes(parts))
    counts = group_counts(parts, groups, 2)
    large = counts.sum(1) > 500
    assert large.any() and (abs(counts[large, 0] / counts[large].sum(1) - 0.5) < 0.08).all()
    assert all(part[-1] - part[0] > 10_000 for part in parts if len(part) > 500)  # rows at random, no runs
    even = sizes(partition_examples(Quantity(clients=10, beta=1e6), groups, 0))
    assert max(even) - min(even) < 50


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 15), st.integers(1, 4), st.integers(0, 60), st.integers(0, 9))
def test_pathological_clients_hold_few_classes_and_nobody_is_empty(clients, k, extra, seed):
    groups = np.random.default_rng(seed).geometric(0.3, size=clients + extra)
    groups = np.minimum(groups, clients * k)  # as many classes as can be held, very unequal
    parts = Pathological(clients=clients, classes_per_client=k).assign(groups, np.random.default_rng(seed))
    counts = group_counts(parts, groups, clients * k + 1)
    assert ((counts > 0).sum(1) <= k).all() and (counts.sum(1) >= 1).all()
    assert counts.sum() == len(groups)


def test_pathological_shards_are_of_equal_size_and_mostly_two_classes():
    groups = np.arange(6000) % 10
    counts = group_counts(partition_examples(Pathological(clients=100), groups, 0), groups, 10)
    assert (counts.sum(1) == 60).all()  # 200 shards of 30 rows, two a client
    assert ((counts > 0).sum(1) == 2).mean() > 0.8
    assert set(counts[counts > 0]) <= {30, 60}


def test_pathological_deals_the_shards_at_random():
    groups = np.arange(6000) % 10
    first, other = (
        group_counts(partition_examples(Pathological(), groups, seed), groups, 10) for seed in (0, 1)
    )
    assert (first != other).any()


def test_pathological_says_how_many_classes_a_client_would_need():
    with pytest.raises(FederaError, match="set classes_per_client to 4 or more"):
        partition_examples(Pathological(clients=3, classes_per_client=2), np.arange(30) % 10, 0)
    assert len(partition_examples(Pathological(clients=3, classes_per_client=4), np.arange(30) % 10, 0)) == 3


def test_natural_gives_one_client_a_value():
    parts = partition_examples(Natural(column="author"), np.array([2, 0, 2, 5, 0]), 0)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]


def test_natural_deals_the_largest_value_to_the_least_loaded_client():
    # Values of 5, 4, 3, 3 rows: client 0 gets 5, client 1 gets 4 and 3 (load 7), client 0 the last 3 (load 8).
    groups = np.repeat([10, 11, 12, 13], [3, 5, 3, 4])
    counts = group_counts(partition_examples(Natural(column="c", clients=2), groups, 0), groups, 14)
    assert counts[:, 10:].tolist() == [[0, 5, 3, 0], [3, 0, 0, 4]]


def test_natural_refuses_more_clients_than_values():
    with pytest.raises(FederaError, match="3 clients but 2 values of column 'author'; set clients to 2"):
        partition_examples(Natural(column="author", clients=3), np.array([0, 0, 1, 1]), 0)


class Lopsided(Partitioner):
    """Everything to client 0 but ten rows to client 1; not registered."""

    name: str = "lopsided"

    def assign(self, groups, rng):
        rows = np.arange(len(groups))
        return [rows[10:], rows[:10], *(rows[:0] for _ in range(self.clients - 2))]


def test_topping_up_takes_from_the_largest_until_it_is_not():
    # 30, 10, 0, 0 rows with at least 8 each: client 0 gives 16 and keeps 14; client 1 is never the largest.
    parts = partition_examples(Lopsided(clients=4, min_examples=8), np.zeros(40, dtype=np.int64), 0)
    assert sizes(parts) == [14, 10, 8, 8]
    assert parts[1].tolist() == list(range(10))
    assert parts[2].max() - parts[2].min() > 8  # random rows, not the last ones


def test_topping_up_makes_givers_take_turns_and_leaves_none_short():
    # 18 and 10 rows, 7 each for four clients: every row above 7 has to move.
    parts = partition_examples(Lopsided(clients=4, min_examples=7), np.zeros(28, dtype=np.int64), 0)
    assert sizes(parts) == [7, 7, 7, 7]


@pytest.mark.parametrize("rows", [0, 19])
@pytest.mark.parametrize("name", ["iid", "dirichlet", "fednlp", "quantity", "pathological"])
def test_too_few_rows_are_refused(name, rows):
    partitioner = PARTITIONERS.parse({"name": name, "clients": 10, "min_examples": 2})
    with pytest.raises(
        FederaError, match=f"fewer rows than clients need: {rows} rows, 10 clients, min_examples 2"
    ):
        partition_examples(partitioner, np.zeros(rows, dtype=np.int64), 0)


def test_too_few_rows_for_the_values_of_a_column_are_refused():
    with pytest.raises(FederaError, match="3 rows, 2 clients, min_examples 2"):
        partition_examples(Natural(column="c", min_examples=2), np.array([0, 0, 1]), 0)


def test_group_counts():
    parts = [np.array([0, 3]), np.array([], dtype=np.int64), np.array([1, 2])]
    assert group_counts(parts, np.array([1, 0, 0, 1]), 3).tolist() == [[0, 2, 0], [0, 0, 0], [2, 0, 0]]
    with pytest.raises(ValueError, match="not in"):
        group_counts(parts, np.array([1, 0, 0, 3]), 3)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "dirichlet", "alpha": 0},
        {"name": "fednlp", "alpha": float("nan")},
        {"name": "quantity", "beta": -1},
        {"name": "pathological", "classes_per_client": 0},
        {"name": "natural"},
        {"name": "iid", "clients": None},
        {"name": "iid", "clients": 0},
    ],
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(FederaError):
        PARTITIONERS.parse(config)


@pytest.mark.parametrize("name", ["dirichlet", "fednlp"])
def test_ten_thousand_clients_take_less_than_two_seconds(name):
    groups = generator(0, "test").integers(0, 20, 100_000)
    partitioner = PARTITIONERS.parse({"name": name, "clients": 10_000, "alpha": 0.01, "min_examples": 5})
    start = time.process_time()
    partition_examples(partitioner, groups, 0)
    assert time.process_time() - start < 2
