"""`--dry-run`: what would be done, without doing it."""

import os
from types import SimpleNamespace

import pytest
import torch

from federa.plan import make_plan
from federa.state import num_bytes
from running import build, configure, same


def test_bytes_are_exact_and_nothing_is_trained_or_written(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(configure(recipe))
    assert plan.bytes_round == 2 * 3 * num_bytes(plan.experiment.params)
    assert same(plan.experiment.params, build(recipe).params)
    assert os.listdir(tmp_path) == []


def test_seconds_grow_with_what_is_asked_for(recipe, monkeypatch):
    """With a clock that shows a second a step, the estimate can be counted."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("federa.plan.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    plan = make_plan(configure(recipe, rounds=3, cohort=3, client__epochs=1, evaluate_every=1))
    middle = sorted(len(part) for part in plan.experiment.parts)[3]
    # A client of `middle` examples takes a second, so does a batch of 64 evaluation rows (of 90).
    training = 3 * 3 * (240 / 6) / min(middle, 64)
    assert plan.seconds == pytest.approx(training + 3 * 90 / 64)
    twice = make_plan(configure(recipe, rounds=3, cohort=3, client__epochs=2, evaluate_every=0))
    assert twice.seconds == pytest.approx(2 * 3 * 3 * 40 / (2 * min(middle, 64)) + 90 / 64)
    few = make_plan(configure(recipe, rounds=3, cohort=3, client__max_steps=1, evaluate_every=0))
    assert few.seconds == pytest.approx(3 * 3 * 8 / 8 + 90 / 64)
    shared = make_plan(
        configure(recipe, evaluate_every=0, client__max_steps=1, engine={"name": "processes", "workers": 2})
    )
    assert shared.seconds == pytest.approx(few.seconds / 2)


def test_auto_is_resolved_and_local_heads_work(recipe):
    plan = make_plan(configure(recipe, client__precision="auto", method__head="local"))
    assert plan.experiment.config.client.precision in ("fp32", "bf16")
    assert plan.bytes_round == 2 * 3 * num_bytes(plan.experiment.params)
    assert torch.is_grad_enabled()
