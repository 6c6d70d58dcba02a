"""The server's part of a round: cohorts, verdicts, sums."""

import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from federa.config import RunConfig
from federa.server import OK, finish_round, make_jobs, verdict
from federa.types import Job, RoundFailedError, ServerState, Update
from running import same

PARAMS = {"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "b": torch.tensor([0.5, -0.5, 0.0])}
SIZES = [5, 50, 20, 20, 7, 90, 1, 33]


def config(**fields):
    return RunConfig.model_validate({"cohort": 4, "partition": {"name": "iid", "clients": 8}, **fields})


def update(client, *, scale=0.1, weight=None, seed=None, **changes):
    rng = torch.Generator().manual_seed(100 + (client if seed is None else seed))
    delta = {name: scale * torch.randn(p.shape, generator=rng) for name, p in PARAMS.items()}
    metrics = {"loss": 1.0 + client, "examples": 10.0 * (client + 1), "seconds_train": 0.25}
    fields = {"delta": delta, "weight": weight or float(client + 1), "metrics": metrics, **changes}
    return Update(job=Job(1, client, 7, 1e-3), **fields)


def jobs_of(updates):
    return [u.job for u in updates]


# cohorts


def test_the_cohort_is_a_function_of_seed_and_round_alone():
    def drawn(number, **fields):
        np.random.seed(number + 5)
        return [job.client_id for job in make_jobs(config(**fields), number, SIZES)]

    rounds = [drawn(number, seed=1) for number in range(1, 9)]
    assert [drawn(number, seed=1) for number in reversed(range(1, 9))] == rounds[::-1]
    assert [drawn(n, seed=1, method="ft", client={"lr": 1.0}, rounds=99) for n in range(1, 9)] == rounds
    assert len({tuple(sorted(c)) for c in rounds}) > 4
    assert [drawn(number, seed=2) for number in range(1, 9)] != rounds


def test_a_cohort_has_nobody_twice_and_everybody_has_a_turn():
    times = Counter()
    for number in range(1, 201):
        clients = [job.client_id for job in make_jobs(config(), number, SIZES)]
        assert len(set(clients)) == 4
        times.update(clients)
    assert set(times) == set(range(8))
    assert all(70 < count < 130 for count in times.values()), times  # 100 expected, deviation 7
    everybody = make_jobs(config(cohort=8), 1, SIZES)
    assert [job.client_id for job in everybody] == [5, 1, 7, 2, 3, 4, 0, 6], "largest first, then by number"


def test_jobs_carry_the_rounds_learning_rate_and_seeds_of_their_own():
    recipe = config(rounds=4, client={"lr": 0.4, "schedule": "linear"})
    jobs = [job for number in (1, 2, 3, 4) for job in make_jobs(recipe, number, SIZES)]
    assert [job.lr for job in jobs[::4]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [job.round for job in jobs[::4]] == [1, 2, 3, 4]
    assert len({job.seed for job in jobs}) == len(jobs)
    assert make_jobs(recipe, 3, SIZES) == jobs[8:12]
    assert not {j.seed for j in make_jobs(config(seed=9), 1, SIZES)} & {j.seed for j in jobs}


# sums


def test_the_next_state_is_the_weighted_mean_written_out():
    updates = [update(client) for client in (3, 0, 2)]
    state = ServerState(4, PARAMS)
    after, summary = finish_round(config(), state, jobs_of(updates), iter(updates))
    for name, start in PARAMS.items():
        total = sum(u.weight * u.delta[name].double() for u in updates)
        expected = start.double() + total / (4 + 1 + 3)
        assert torch.allclose(after.params[name].double(), expected, rtol=0, atol=1e-6)
        assert after.params[name].dtype == torch.float32
    assert (after.round, after.opt) == (5, {})
    assert summary.verdicts == {3: OK, 0: OK, 2: OK}
    assert summary.loss == pytest.approx((4 * 4.0 + 1 * 1.0 + 3 * 3.0) / 8)
    assert summary.examples == 40 + 10 + 30
    assert summary.seconds_train == 0.75
    assert summary.accepted == 3


def test_aggregator_and_server_optimizer_are_the_recipes():
    updates = [update(client) for client in (0, 1, 2)]
    recipe = config(aggregator="median", server_optimizer={"name": "momentum", "momentum": 0.5, "lr": 2.0})
    opt = recipe.server_optimizer.init(PARAMS)
    after, _ = finish_round(recipe, ServerState(0, PARAMS, opt), jobs_of(updates), updates)
    middle = torch.stack([u.delta["b"] for u in updates]).median(dim=0).values
    assert torch.allclose(after.params["b"], PARAMS["b"] + 2.0 * middle)
    assert torch.allclose(after.opt["momentum/b"], middle)
    further, _ = finish_round(recipe, after, jobs_of(updates), updates)
    assert torch.allclose(further.params["b"], after.params["b"] + 2.0 * 1.5 * middle)


def test_updates_are_summed_as_they_come():
    seen, most = weakref.WeakSet(), 0

    class Holder(dict):
        __hash__ = object.__hash__

    def stream():
        nonlocal most
        for client in range(6):
            made = update(client)
            delta = Holder(made.delta)
            seen.add(delta)
            most = max(most, len(seen))
            yield Update(made.job, delta, made.weight, made.metrics)
            del made, delta

    finish_round(config(), ServerState(0, PARAMS), [update(c).job for c in range(6)], stream())
    assert most <= 2, "an update outlived its turn"


# verdicts

BAD = {
    "nan": ({"delta": {**PARAMS, "w": torch.full((2, 3), math.nan)}}, "not finite"),
    "one nan": ({"delta": {**PARAMS, "b": torch.tensor([0.0, math.nan, 0.0])}}, "not finite"),
    "inf": ({"delta": {**PARAMS, "b": torch.tensor([0.0, math.inf, 0.0])}}, "not finite"),
    "minus inf": ({"delta": {**PARAMS, "b": torch.tensor([0.0, -math.inf, 0.0])}}, "not finite"),
    "wrong shape": ({"delta": {**PARAMS, "w": torch.zeros(3, 2)}}, "wrong shape ('w': (3, 2), expected (2, 3))"),
    "broadcastable": ({"delta": {**PARAMS, "w": torch.zeros(3)}}, "wrong shape ('w': (3,), expected (2, 3))"),
    "scalar": ({"delta": {**PARAMS, "b": torch.tensor(1.0)}}, "wrong shape ('b': (), expected (3,))"),
    "one more axis": ({"delta": {**PARAMS, "b": torch.zeros(1, 3)}}, "wrong shape"),
    "missing key": ({"delta": {"w": PARAMS["w"]}}, "wrong keys ('b' is missing)"),
    "extra key": ({"delta": {**PARAMS, "x": torch.zeros(1)}}, "wrong keys ('x' is unknown)"),
    "renamed key": ({"delta": {"w": PARAMS["w"], "B": PARAMS["b"]}}, "wrong keys ('B' is unknown)"),
    "no keys": ({"delta": {}}, "wrong keys"),
    "float64": ({"delta": {**PARAMS, "b": torch.zeros(3, dtype=torch.float64)}}, "wrong dtype ('b': torch.float64"),
    "bfloat16": ({"delta": {**PARAMS, "b": torch.zeros(3, dtype=torch.bfloat16)}}, "wrong dtype ('b': torch.bfl"),
    "integers": ({"delta": {**PARAMS, "b": torch.zeros(3, dtype=torch.int64)}}, "wrong dtype"),
    "weight 0": ({"weight": 0.0}, "weight 0.0 is not a positive number"),
    "weight -1": ({"weight": -1.0}, "weight -1.0 is not a positive number"),
    "weight nan": ({"weight": math.nan}, "weight nan is not a positive number"),
    "weight inf": ({"weight": math.inf}, "weight inf is not a positive number"),
    "norm 1e6": ({"delta": {n: torch.full(p.shape, 1e6 / 3) for n, p in PARAMS.items()}}, "norm 1e+06 exceeds"),
    "overflow": ({"delta": {n: torch.full(p.shape, 3e38) for n, p in PARAMS.items()}}, "exceeds max_update_norm"),
    "loss nan": ({"metrics": {"loss": math.nan, "examples": 3.0}}, "metric 'loss' is nan"),
    "examples nan": ({"metrics": {"loss": 1.0, "examples": math.nan}}, "metric 'examples' is nan"),
    "seconds inf": ({"metrics": {"loss": 1.0, "seconds_train": math.inf}}, "metric 'seconds_train' is inf"),
}  # fmt: skip


def bad_update(client, fields):
    good = update(client)
    weight = fields.get("weight", good.weight)
    return Update(good.job, fields.get("delta", good.delta), weight, fields.get("metrics", good.metrics))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_rejected_and_named_and_the_round_goes_on_without_it(kind):
    fields, reason = BAD[kind]
    honest = [update(client) for client in (3, 0, 2)]
    bad = bad_update(5, fields)
    expected, plain = finish_round(config(), ServerState(0, PARAMS), jobs_of(honest), honest)
    for place in range(4):
        updates = [*honest[:place], bad, *honest[place:]]
        after, summary = finish_round(config(), ServerState(0, PARAMS), jobs_of(updates), updates)
        assert reason in summary.verdicts[5]
        assert "\n" not in summary.verdicts[5]
        assert {c: v for c, v in summary.verdicts.items() if c != 5} == {3: OK, 0: OK, 2: OK}
        assert same(after.params, expected.params), "not the round without that client, to the bit"
        assert (summary.loss, summary.examples, summary.accepted) == (plain.loss, plain.examples, 3)
        assert math.isfinite(summary.seconds_train)


def test_a_weight_cannot_exceed_what_the_client_holds():
    updates = [update(client) for client in (3, 0, 2)]
    sizes = [1, 0, 3, 4]
    after, summary = finish_round(config(), ServerState(0, PARAMS), jobs_of(updates), updates, sizes)
    assert summary.accepted == 3
    greedy = update(0, weight=1.01)
    after, summary = finish_round(
        config(), ServerState(0, PARAMS), jobs_of(updates), [updates[0], greedy, updates[2]], sizes
    )
    assert summary.verdicts == {3: OK, 0: "weight 1.01 exceeds the client's 1 examples", 2: OK}
    expected, _ = finish_round(config(), ServerState(0, PARAMS), jobs_of(updates), updates[::2])
    assert same(after.params, expected.params)


def test_the_norm_limit_is_the_recipes_and_counts_all_tensors_together():
    delta = {"w": torch.full((2, 3), 3.0 / math.sqrt(6)), "b": torch.full((3,), 4.0 / math.sqrt(3))}
    five = Update(Job(1, 0, 0, 0.1), delta, 1.0, {"loss": 1.0})
    assert verdict(five, PARAMS, 5.01) == OK
    assert verdict(five, PARAMS, 4.99) == "norm 5 exceeds max_update_norm 4.99"
    assert verdict(five, PARAMS, config(max_update_norm=4.0).max_update_norm) != OK


@pytest.mark.parametrize(
    ("share", "good", "fails"),
    [(0.5, 2, False), (0.5, 1, True), (1.0, 3, True), (1.0, 4, False), (0.3, 1, True), (0.3, 2, False),
     (0.0, 1, False), (0.0, 0, True)],
)  # fmt: skip
def test_min_success(share, good, fails):
    updates = [update(c) if c < good else bad_update(c, {"weight": 0.0}) for c in range(4)]
    state = ServerState(2, {n: p.clone() for n, p in PARAMS.items()}, {"m/w": torch.ones(2)})
    recipe = config(min_success=share)
    if not fails:
        after, summary = finish_round(recipe, state, jobs_of(updates), updates)
        assert (after.round, summary.accepted) == (3, good)
        return
    with pytest.raises(RoundFailedError) as raised:
        finish_round(recipe, state, jobs_of(updates), updates)
    message = str(raised.value)
    assert f"round 3: {good} of 4 updates counted" in message
    assert f"client {good}: weight 0.0 is not a positive number" in message and "\n" not in message
    assert state.round == 2 and same(state.params, PARAMS) and torch.equal(state.opt["m/w"], torch.ones(2))


def test_an_answer_that_never_comes_counts_as_one_that_failed():
    updates = [update(client) for client in range(4)]
    jobs = jobs_of(updates)
    after, summary = finish_round(config(), ServerState(0, PARAMS), jobs, updates[:2])
    assert (after.round, summary.accepted, len(summary.verdicts)) == (1, 2, 2)
    with pytest.raises(RoundFailedError, match="1 of 4 updates counted"):
        finish_round(config(), ServerState(0, PARAMS), jobs, updates[:1])
    with pytest.raises(RoundFailedError, match="no update came"):
        finish_round(config(), ServerState(0, PARAMS), jobs, [])


def test_nothing_that_went_in_is_changed():
    updates = [update(client) for client in range(3)]
    before = [{n: t.clone() for n, t in u.delta.items()} for u in updates]
    params = {n: p.clone() for n, p in PARAMS.items()}
    for aggregator in ("mean", "median", "trimmed_mean", "clipped_mean"):
        finish_round(config(aggregator=aggregator), ServerState(0, params), jobs_of(updates), updates)
    assert same(params, PARAMS)
    assert all(same(u.delta, b) for u, b in zip(updates, before, strict=True))
