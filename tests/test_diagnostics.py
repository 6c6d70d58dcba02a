"""How updates lie to each other: thin products against full matrices, and cases worked out by hand."""

import json
import math

import numpy as np
import pytest
import torch

from federa import diagnostics
from federa.diagnostics import diagnose
from federa.engines import Serial
from running import build, federa, jobs_of, loop

A, B = "layer.q.lora_A", "layer.q.lora_B"


def factors(seed, rank=3, width=7, height=5):
    rng = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, width, generator=rng), B: torch.randn(height, rank, generator=rng)}


def by_hand(params, deltas, weights, scale):
    """The definition, with full matrices."""
    share = np.array(weights) / np.sum(weights)
    a, b = (params[name].double().numpy() for name in (A, B))
    full = [
        scale * ((b + d[B].double().numpy()) @ (a + d[A].double().numpy()) - b @ a).ravel() for d in deltas
    ]
    mean = sum(p * w for p, w in zip(share, full, strict=True))
    averaged_a, averaged_b = (
        params[n].double().numpy()
        + sum(p * d[n].double().numpy() for p, d in zip(share, deltas, strict=True))
        for n in (A, B)
    )
    lost = mean - scale * (averaged_b @ averaged_a - b @ a).ravel()
    norms = [np.linalg.norm(w) for w in full]
    return {
        "cosine": np.mean([w @ mean / np.linalg.norm(w) / np.linalg.norm(mean) for w in full]),
        "norm_mean": np.mean(norms),
        "norm_spread": np.std(norms) / np.mean(norms),
        "aggregation_error": np.linalg.norm(lost) / np.linalg.norm(mean),
    }


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 1, 2]])
def test_thin_products_give_what_full_matrices_give(scale, weights):
    params, deltas = factors(0), [factors(seed) for seed in (1, 2, 3)]
    found = diagnose(params, deltas, weights, frozenset(), {"layer.q": scale})
    for key, value in by_hand(params, deltas, weights, scale).items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
        assert found["layers"]["layer.q"][key] == pytest.approx(value, rel=1e-6)
    assert found["clients"] == 3


def test_small_steps_from_large_factors_keep_their_digits():
    params = {name: 1e3 * t for name, t in factors(0).items()}
    deltas = [{name: 1e-5 * t for name, t in factors(seed).items()} for seed in (1, 2)]
    found, expected = diagnose(params, deltas, [1, 1], frozenset(), {}), by_hand(params, deltas, [1, 1], 1.0)
    assert found["cosine"] == pytest.approx(expected["cosine"], rel=1e-6)
    assert 0 < found["aggregation_error"] < 1e-6


def test_equal_updates_agree_and_lose_nothing():
    found = diagnose(factors(0), [factors(1)] * 4, [1, 2, 3, 4], frozenset(), {})
    assert found["cosine"] == pytest.approx(1)
    assert found["norm_spread"] == pytest.approx(0, abs=1e-9)
    assert found["aggregation_error"] == pytest.approx(0, abs=1e-7)


def test_a_method_without_factors_is_compared_as_it_is():
    params = {"a.weight": torch.zeros(1, 2), "a.bias": torch.zeros(1), "head.weight": torch.zeros(1)}
    deltas = [
        {
            "a.weight": torch.tensor([[1.0, 0]]),
            "a.bias": torch.tensor([0.0]),
            "head.weight": torch.tensor([9.0]),
        },
        {
            "a.weight": torch.tensor([[0.0, 1]]),
            "a.bias": torch.tensor([0.0]),
            "head.weight": torch.tensor([-5.0]),
        },
    ]
    found = diagnose(params, deltas, [1, 1], frozenset({"head.weight"}), {})
    assert found["cosine"] == pytest.approx(math.sqrt(0.5))
    assert found["norm_mean"] == pytest.approx(1)
    assert found["aggregation_error"] is None
    assert list(found["layers"]) == ["a"], "the head is left out"


def test_opposite_updates_have_no_mean():
    params = {"a.weight": torch.zeros(2)}
    deltas = [{"a.weight": torch.tensor([1.0, 0])}, {"a.weight": torch.tensor([-1.0, 0])}]
    assert diagnose(params, deltas, [1, 1], frozenset(), {})["cosine"] == 0


@pytest.mark.parametrize(
    ("method", "factored"), [("federa", True), ("lora", True), ("bitfit", False), ("probe", False)]
)
def test_a_run_writes_a_line_a_round(recipe, tmp_path, method, factored):
    out = tmp_path / "run"
    config = build(recipe, method__name=method, diagnostics=True).config
    loop.run(config, out)
    lines = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert -1 <= line["cosine"] <= 1 and line["norm_mean"] > 0 and line["clients"] == 3
        assert (line["aggregation_error"] is not None) == factored
        assert all(
            set(layer) == {"cosine", "norm_mean", "norm_spread", "aggregation_error"}
            for layer in line["layers"].values()
        )
        heads = [name for name in line["layers"] if "classifier" in name]
        assert bool(heads) == (method == "probe")


def test_doras_update_is_no_product_of_factors(recipe, tmp_path):
    out = tmp_path / "run"
    loop.run(build(recipe, method={"name": "lora", "rank": 4, "dora": True}, diagnostics=True).config, out)
    for line in (out / "diagnostics.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert found["aggregation_error"] is None and found["norm_mean"] > 0


def test_means_are_weighted_as_the_aggregator_weights(recipe, tmp_path, monkeypatch):
    seen = []
    real = diagnostics.diagnose

    def noting(params, deltas, weights, *rest):
        seen.append(weights)
        return real(params, deltas, weights, *rest)

    monkeypatch.setattr(loop, "diagnose", noting)
    for weighted in (True, False):
        config = build(recipe, diagnostics=True, rounds=1, aggregator={"name": "mean", "weighted": weighted})
        loop.run(config.config, tmp_path / str(weighted))
    assert len(set(seen[0])) > 1, "clients of different sizes"
    assert seen[1] == [1.0] * 3


def test_without_being_asked_a_run_writes_none(recipe, tmp_path):
    loop.run(build(recipe).config, tmp_path / "run")
    assert not (tmp_path / "run" / "diagnostics.jsonl").exists()


def test_rejected_updates_are_left_out(recipe, tmp_path, monkeypatch):
    seen = []
    real = diagnostics.diagnose
    monkeypatch.setattr(
        loop,
        "diagnose",
        lambda params, deltas, *rest: seen.append(len(deltas)) or real(params, deltas, *rest),
    )
    experiment = build(recipe, diagnostics=True, rounds=1, min_success=0.1)
    with Serial().open(experiment) as session:
        updates = list(session.train(experiment.params, jobs_of(experiment)))
    norms = sorted(
        math.sqrt(sum(float(t.double().square().sum()) for t in u.delta.values())) for u in updates
    )
    between = (norms[-2] + norms[-1]) / 2  # the longest update is refused
    config = experiment.config.replace(max_update_norm=between)
    result = loop.run(config, tmp_path / "run")
    assert seen == [result.records[0]["clients"]] == [len(updates) - 1]


def test_a_resumed_run_has_the_same_lines(recipe, tmp_path, monkeypatch):
    config = build(recipe, diagnostics=True).config
    loop.run(config, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    stop = KeyboardInterrupt()

    class Stops(loop.Observer):
        def finished_round(self, record):
            if record["round"] == 2:
                raise stop

    with pytest.raises(KeyboardInterrupt):
        loop.run(config, tmp_path / "cut", observer=Stops())
    with (tmp_path / "cut" / "diagnostics.jsonl").open("a") as file:
        file.write('{"round": 3, "cosi')  # as a crash leaves it
    assert federa("run", "--resume", "--out", tmp_path / "cut", "--quiet") == 0
    one, other = ((tmp_path / name / "diagnostics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == other
