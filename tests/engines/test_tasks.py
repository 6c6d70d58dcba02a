"""Tasks whose examples are several rows: the same updates and predictions from every engine."""

import dataclasses

import numpy as np
import pytest

from federa import run
from federa.config import parse_config
from federa.data.batches import Ragged
from federa.engines import Processes, Serial, Stacked
from federa.engines.stacked import memory_of_a_client
from federa.experiment import build_experiment
from federa.plan import make_plan
from running import federa, furthest, jobs_of, same, steady
from small import TASKS, write_task

SPLIT = ("ner", "qa")


@pytest.fixture(params=SPLIT)
def split(request, encoder, tmp_path):
    """A recipe of a task whose texts are longer than its windows."""
    return {
        "rounds": 2,
        "cohort": 3,
        "model": {"name": str(encoder("bert"))},
        "data": {"train": str(write_task(tmp_path / "data", request.param))},
        "task": TASKS[request.param],
        "method": {"name": "lora", "rank": 4},
        "partition": {"name": "dirichlet", "clients": 3},
        "client": {"batch_size": 4, "lr": 0.05, "optimizer": "sgd", "dropout": 0.0, "precision": "fp32"},
        "engine": {"name": "serial", "threads": 1},
        "evaluate_batch_size": 4,
    }


def play_all(experiment, engine):
    """Play a round, and predict every row of the evaluation set."""
    with engine.open(experiment) as session:
        updates = list(session.train(experiment.params, jobs_of(experiment)))
        rows = experiment.batches(np.arange(len(experiment.evaluation)))
        return updates, [row for batch in session.predict(experiment.params, rows) for row in batch]


def test_examples_are_longer_than_windows(split):
    experiment = build_experiment(parse_config(split))
    assert len(experiment.train) > experiment.train.num_examples


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_weigh_by_what_they_are_trained_on(split, size):
    """A mean over labelled tokens, or over windows: rows differ in how many they have, and one has none."""
    whole, parts = (
        build_experiment(parse_config(split).replace(**{"client.micro_batch": micro}))
        for micro in (None, size)
    )
    data, rows = without_targets(whole.train, 0), np.arange(12)
    for experiment in (whole, parts):
        experiment.trainer.flat.load_(experiment.params)
    expected, found = (experiment.trainer.gradient_(data, rows) for experiment in (whole, parts))
    counts = [whole.trainer.task.terms(data, rows[i : i + 1]) for i in rows]
    assert counts[0] == 0 and sum(counts) == whole.trainer.task.terms(data, rows)
    assert len(set(counts)) > (2 if split["task"]["name"] == "ner" else 1), "else a plain mean would do"
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    one, other = whole.trainer.flat.gradient, parts.trainer.flat.gradient
    assert float((one - other).norm() / one.norm()) < 1e-4
    nothing = without_targets(data, *range(4))
    assert np.isnan(float(parts.trainer.gradient_(nothing, rows[:4]))), "a mean of nothing, as without parts"


def without_targets(data, *rows):
    """The same data set, with rows that count in no loss."""
    targets = {}
    for name, held in data.targets.items():
        values = (held.values if isinstance(held, Ragged) else held).copy()
        targets[name] = Ragged(values, held.offsets) if isinstance(held, Ragged) else values
        for row in rows:
            own = targets[name].row(row) if isinstance(held, Ragged) else values[row : row + 1]
            own[:] = data.pad[name]
    return dataclasses.replace(data, targets=targets)


def test_stacked_gives_serials_updates(split):
    experiment = build_experiment(parse_config(split))
    serial, rows = play_all(experiment, Serial(threads=1))
    stacked, others = play_all(experiment, Stacked(threads=1))
    for one, other in zip(serial, stacked, strict=True):
        assert one.job == other.job and one.weight == other.weight
        length = max(float(t.abs().max()) for t in one.delta.values())
        assert furthest(one.delta, other.delta) < 1e-4 * length
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
    for one, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_processes_give_serials_bits(split):
    experiment = build_experiment(parse_config(split))
    serial, rows = play_all(experiment, Serial(threads=1))
    parallel, others = play_all(experiment, Processes(workers=2))
    for one, other in zip(serial, parallel, strict=True):
        assert one.job == other.job and same(one.delta, other.delta)
    assert all(np.array_equal(one, other) for one, other in zip(rows, others, strict=True))


def test_metrics_do_not_depend_on_the_engine(split):
    one = run(parse_config(split))
    other = run(parse_config({**split, "engine": {"name": "processes", "workers": 2}}))
    assert steady(one.records) == steady(other.records)
    assert one.summary["per_client"] == other.summary["per_client"]


def test_a_clients_memory_is_that_of_windows(split):
    """The plan of the stacked engine, and that of `federa run --dry-run`."""
    experiment = build_experiment(parse_config(split))
    assert memory_of_a_client(experiment) > 4 * experiment.trainer.flat.master.numel()
    plan = make_plan(parse_config(split))
    assert plan.bytes_round > 0 and 0 < plan.seconds < 600


@pytest.mark.parametrize("split", ["qa"], indirect=True)
def test_bench_takes_steps_of_the_task(split, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(parse_config(split).to_yaml())
    assert federa("bench", path, "--repeats", 1) == 0
    out = capsys.readouterr().out
    assert "engine stacked" in out and "cannot" not in out
