"""A guard against losing speed: ratios inside one run, with room for a noisy machine, never seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import numpy as np
import pytest
import torch
import transformers

from federa.cpu import native, speed_up
from federa.engines import Serial
from federa.seeds import torch_seeded
from running import build, jobs_of


def ratio(slow: Callable[[], float], fast: Callable[[], float], repeats: int = 7) -> float:
    """Return the median of slow / fast, taking turns."""
    slow(), fast()
    return median(slow() / fast() for _ in range(repeats))


def test_fused_kernels_make_a_step_faster() -> None:
    """A quarter faster or more where it was measured; a tenth is asked for."""
    if native.load() is None:
        pytest.skip(native.status())
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("measured on processors with bf16 matrix tiles")
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536, vocab_size=100
    )
    with torch_seeded(0):
        model = transformers.BertForSequenceClassification(config)
    speed_up(model)
    model = model.bfloat16().train()
    ids = torch.randint(0, 100, (16, 64))

    def step(context: Callable[[], object]) -> float:
        with context():
            began = time.perf_counter()
            model(input_ids=ids, labels=torch.zeros(16, dtype=torch.long)).loss.backward()
            return time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert ratio(lambda: step(native.without), lambda: step(nullcontext)) > 1.1
    finally:
        torch.set_num_threads(threads)


def test_a_round_costs_little_more_than_its_training(recipe) -> None:
    """Handing out jobs and taking updates; what the serial engine adds to its clients' own time."""
    experiment = build(recipe, cohort=6, client__epochs=4)
    jobs = jobs_of(experiment)
    shares = []
    with Serial(threads=1).open(experiment) as session:
        for _ in range(5):
            began = time.perf_counter()
            inside = sum(update.metrics["seconds_train"] for update in session.train(experiment.params, jobs))
            shares.append((time.perf_counter() - began) / inside)
    assert median(shares) < 1.1


def test_a_tables_tokens_are_made_once(recipe, monkeypatch) -> None:
    from federa.data import tokenised
    from federa.tasks.classification import Classification

    monkeypatch.setattr(tokenised, "_kept", {})
    calls, encode = [], Classification.encode

    def counting(self, table, *rest):
        calls.append(len(table))
        return encode(self, table, *rest)

    monkeypatch.setattr(Classification, "encode", counting)
    first, second = build(recipe), build(recipe, seed=5, client__lr=0.1)
    assert len(calls) == 2
    assert first.train is second.train
    assert np.array_equal(first.train.targets["labels"], second.train.targets["labels"])
    build(recipe, task__max_length=8)
    assert len(calls) == 4
    build(recipe, data__max_train=30)
    assert len(calls) == 6
