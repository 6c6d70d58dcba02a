"""Central differential privacy: sensitivity, noise, the accountant's figure, and where none could be given."""

import math
import re

import numpy as np
import pytest
import torch

from federa import run
from federa.aggregators import Mean
from federa.config import parse_config
from federa.privacy import Privacy
from federa.server import OK, finish_round
from federa.state import norm
from federa.types import FederaError, Job, ServerState, Update
from running import configure, same, steady

PRIVATE = {"clip": 0.5, "noise_multiplier": 1.0, "noise": "seeded"}
PLAIN = {"name": "mean", "weighted": False}


def private(recipe, **changes):
    return {**recipe, "aggregator": PLAIN, "privacy": {**PRIVATE, **changes}}


def update(client, *numbers, weight=1.0):
    return Update(Job(1, client, 0, 0.1), {"w": torch.tensor(numbers)}, weight, {"loss": 1.0})


@pytest.mark.parametrize(
    ("numbers", "length"), [((3.0, 4.0), 0.5), ((0.3, 0.4), 0.5), ((0.03, 0.04), 0.05), ((0.0, 0.0), 0.0)]
)
def test_long_updates_are_scaled_down_and_short_ones_left(numbers, length):
    found = Privacy(**PRIVATE).clipped(update(0, *numbers))
    assert norm(found.delta) == pytest.approx(length, rel=1e-6)
    if length:
        assert found.delta["w"][0] / found.delta["w"][1] == pytest.approx(0.75)


def sums(recipe, updates, monkeypatch, cohort=4):
    """The noiseless numerator of a round, which is what must not move far."""
    monkeypatch.setattr(
        "federa.privacy._normal", lambda like, _: torch.zeros(like.shape, dtype=torch.float64)
    )
    config = parse_config(private({**recipe, "cohort": cohort, "min_success": 0.0, "max_update_norm": 100.0}))
    jobs = [Job(1, client, 0, 0.1) for client in range(cohort)]
    state = ServerState(0, {"w": torch.zeros(2)})
    after, summary = finish_round(config, state, jobs, updates)
    return after.params["w"] * cohort, summary


@pytest.mark.parametrize("other", [(50.0, -9.0), (-3.0, -4.0), (float("nan"), 0.0), (1e30, 0.0), (0.0, 0.0)])
def test_one_clients_data_move_the_sum_by_twice_the_clip_at_most(recipe, monkeypatch, other):
    """Whatever it sends, refused or not, and whatever weight it claims."""
    rest = [update(client, 0.1 * client, 0.2) for client in range(1, 4)]
    one, _ = sums(recipe, [update(0, 3.0, 4.0), *rest], monkeypatch)
    moved, _ = sums(recipe, [update(0, *other, weight=1e6), *rest], monkeypatch)
    assert float((one - moved).norm()) <= 2 * 0.5 + 1e-6


def test_a_refused_update_counts_as_zeros_not_as_nobody(recipe, monkeypatch):
    rest = [update(client, 0.1, 0.2) for client in range(1, 4)]
    found, summary = sums(recipe, [update(0, float("nan"), 0.0), *rest], monkeypatch)
    assert summary.verdicts[0] != OK
    torch.testing.assert_close(found, torch.tensor([0.3, 0.6]))


def test_noise_has_the_stated_spread():
    mean = {"w": torch.zeros(200, 300)}
    privacy = Privacy(clip=0.5, noise_multiplier=3.0)
    noise = privacy.noised(mean, counted=10, cohort=10, seed=0, round_number=1)["w"]
    assert float(noise.std()) == pytest.approx(3.0 * 2 * 0.5 / 10, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    assert noise.dtype == torch.float32


def test_secret_noise_is_never_the_same_and_seeded_noise_is_by_round():
    mean = {"w": torch.zeros(50), "b": torch.zeros(50)}

    def draw(noise, seed=0, number=1):
        privacy = Privacy(clip=1.0, noise_multiplier=1.0, noise=noise)
        return privacy.noised(mean, 5, 5, seed, number)

    assert not same(draw("secret"), draw("secret"))
    assert same(draw("seeded"), draw("seeded"))
    assert not same(draw("seeded"), draw("seeded", number=2)) and not same(
        draw("seeded"), draw("seeded", seed=1)
    )
    both = draw("seeded")
    assert not torch.equal(both["w"], both["b"])


def test_epsilon_of_whole_cohorts_is_the_gaussian_mechanisms():
    """Without sampling: Renyi divergence alpha / (2 z^2) a round, and the best order for delta."""
    z, rounds, delta = 4.0, 10, 1e-5
    orders = np.linspace(1.01, 60, 20000)
    spent = rounds * orders / (2 * z * z)
    by_hand = np.min(spent + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))
    found = Privacy(clip=1.0, noise_multiplier=z, delta=delta).epsilon(rounds, 8, 8)
    assert found == pytest.approx(by_hand, rel=0.02) and found >= by_hand * 0.999


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_smaller_cohorts():
    privacy = Privacy(clip=1.0, noise_multiplier=2.0)
    assert privacy.epsilon(10, 5, 100) < privacy.epsilon(20, 5, 100) < privacy.epsilon(20, 50, 100)
    assert Privacy(clip=1.0, noise_multiplier=4.0).epsilon(20, 5, 100) < privacy.epsilon(20, 5, 100)
    assert math.isfinite(privacy.epsilon(1000, 10, 10_000))


@pytest.mark.parametrize(
    "aggregator",
    [{"name": "mean"}, {"name": "mean", "weighted": True}, "median", "trimmed_mean", "clipped_mean"],
)
def test_where_the_accounting_does_not_hold_it_is_refused(recipe, aggregator):
    with pytest.raises(FederaError, match=r"^privacy: the accounting holds for plain means only"):
        parse_config({**private(recipe), "aggregator": aggregator})


@pytest.mark.parametrize(
    "changes", [{"clip": 0}, {"noise_multiplier": 0}, {"delta": 1.5}, {"noise": "none"}, {"epsilon": 3}]
)
def test_bad_keys_are_named(recipe, changes):
    with pytest.raises(FederaError, match=r"^(unknown key .)?privacy\."):
        parse_config(private(recipe, **changes))


def test_a_run_records_what_is_spent_and_resumes_to_the_bit(recipe, tmp_path):
    class Stops:
        def __getattr__(self, name):
            return lambda *_: None

        def finished_round(self, record):
            if record["round"] == 1:
                raise KeyboardInterrupt

    config = parse_config(private(recipe))
    whole = run(config, tmp_path / "whole")
    spent = [record["epsilon"] for record in whole.records]
    assert spent == sorted(spent) and spent[0] > 0
    assert spent[-1] == config.privacy.epsilon(3, 3, 6)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", observer=Stops())
    resumed = run(None, tmp_path / "cut", resume=True)
    assert same(resumed.state.params, whole.state.params)
    assert steady(resumed.records) == steady(whole.records)


def test_a_run_without_it_does_not_go_on_with_it(recipe, tmp_path):
    plain = {**recipe, "aggregator": PLAIN}
    run(parse_config(plain), tmp_path / "run")
    with pytest.raises(FederaError, match=r"was started with privacy\.clip=None, not 0\.5"):
        run(parse_config(private(recipe)), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("key", "other"), [("cohort", 2), ("partition.clients", 5), ("privacy.noise_multiplier", 0.5)]
)
def test_a_run_does_not_go_on_with_changed_sampling_or_noise(recipe, tmp_path, key, other):
    """The accountant takes every round to have been drawn and noised alike."""
    config = parse_config(private(recipe))
    run(config.replace(rounds=1), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FederaError, match=rf"was started with {re.escape(key)}=\d.*, not {other}"):
        run(config.replace(rounds=1, **{key: other}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_without_it_nothing_changes(recipe):
    plain = run(configure(recipe, aggregator=PLAIN))
    assert "epsilon" not in plain.records[0]
    noisy = run(parse_config(private(recipe, noise_multiplier=1e-9, clip=1e6)))
    for name, tensor in plain.state.params.items():
        torch.testing.assert_close(noisy.state.params[name], tensor, atol=1e-2, rtol=0)
    assert Mean(weighted=False) == plain.config.aggregator
