"""On a GPU: the CPU's numbers, clients side by side, a plan of its memory, and steps that wait for nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

from federa import run
from federa.engines import Serial, Stacked, stacked, stacking
from federa.local_optimizer import LocalOptimizer
from federa.run import Observer
from federa.seeds import torch_seeded
from federa.state import load_state
from running import build, configure, federa, jobs_of, same, steady
from small import FAMILIES, TASKS, write_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA's")
METHODS = {
    "federa": {"name": "federa", "rank": 4},
    "lora": {"name": "lora", "rank": 4, "targets": "all-linear"},
    "adapter": {"name": "adapter", "width": 8},
    "bitfit": {"name": "bitfit"},
    "ft": {"name": "ft"},
}
# Steps of SGD: AdamW would make whole steps of rounding where a gradient is zero.
PLAIN = {
    "client__dropout": 0.0,
    "client__optimizer": "sgd",
    "client__lr": 0.1,
    "client__max_steps": 3,
    "cohort": 4,
}


def on(device, recipe, **changes):
    return build(recipe, device=device, **{**PLAIN, **changes})


def updates(experiment, engine=None):
    with (engine or Serial()).open(experiment) as session:
        return list(session.train(experiment.params, jobs_of(experiment)))


def check_close(found, expected, head, tolerance):
    """Compare head and encoder apart: a head's updates are the larger by far."""
    assert [u.job for u in found] == [u.job for u in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=tolerance)
        for part in (head, other.delta.keys() - head):
            off = sum(float((one.delta[n] - other.delta[n]).double().square().sum()) for n in part)
            assert off < tolerance**2 * sum(float(other.delta[n].double().square().sum()) for n in part)
        assert all(t.device.type == "cpu" for t in one.delta.values())


@pytest.mark.parametrize("engine", [Serial(), Stacked()], ids=["serial", "stacked"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_cpus_updates(recipe, method, engine):
    there = on("cpu", recipe, method=METHODS[method])
    found = updates(on("cuda", recipe, method=METHODS[method]), engine)
    check_close(found, updates(there), there.trainer.head, 2e-3)


@pytest.mark.parametrize("engine", [Serial(), Stacked()], ids=["serial", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_cpus_updates(recipe, encoder, family, engine):
    changes = {"model__name": str(encoder(family)), "method": {"name": "ft"}}
    there = on("cpu", recipe, **changes)
    check_close(updates(on("cuda", recipe, **changes), engine), updates(there), there.trainer.head, 2e-3)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_side_by_side_and_scored(recipe, tmp_path, task):
    folder = write_task(tmp_path / task, task)
    names = {"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")}
    partition = {"name": "iid", "clients": 4}
    for engine in ("serial", "stacked"):
        changed = {
            **recipe,
            "task": TASKS[task],
            "data": names,
            "partition": partition,
            "cohort": 3,
            "device": "cuda",
            "engine": {"name": engine},
        }
        done = run(configure(changed), tmp_path / f"{task}-{engine}")
        assert np.isfinite(done.summary["final"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_side_by_side_is_one_after_the_other(recipe, precision):
    for method in METHODS.values():
        experiment = on("cuda", recipe, method=method, client__precision=precision)
        tolerance = 2e-3 if precision == "fp32" else 0.3
        check_close(updates(experiment, Stacked()), updates(experiment), experiment.trainer.head, tolerance)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_a_step_waits_for_nothing(recipe, encoder, family, engine):
    """Torch raises where the host would stand still until the GPU has caught up."""
    experiment = build(recipe, device="cuda", model__name=str(encoder(family)), client__dropout=0.1)
    trainer, data = experiment.trainer, experiment.train
    rows, job = experiment.parts[0][:4], jobs_of(experiment)[0]
    trainer.flat.load_(experiment.params, experiment.kept.start)
    optimizer = LocalOptimizer(trainer.flat, trainer.config)
    optimizer.restart(job.lr, job.lr)
    lanes = stacking.Lanes(trainer, 2)
    lanes.load_(experiment.params, [{}] * 2, [0.1] * 2)
    trainer.model.train()

    def alone():
        trainer.gradient_(data, rows)
        optimizer.step()

    def together():
        with stacking.attention_of_all(trainer.model):
            lanes.step_(lanes.losses(stacking.stacked_batch(data, [rows, rows], trainer.device), 2))

    step = alone if engine == "serial" else together
    with torch_seeded(0):
        step()  # the first loads what stays
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_a_group_takes_no_more_than_was_planned(recipe, method):
    settings = {"client__batch_size": 16, "client__dropout": 0.3, "client__cuda_graphs": False}
    experiment = on("cuda", recipe, method=METHODS[method], **settings)
    jobs = jobs_of(experiment)
    room = len(jobs) * stacked.memory_of_a_client(experiment) / stacked.SHARE  # what is asked to be free
    parts = [experiment.parts[job.client_id] for job in jobs]

    def group():
        lanes = stacking.Lanes(experiment.trainer, len(jobs))
        stacking.train_together(lanes, experiment.params, experiment.train, parts, jobs, [{}] * len(jobs))

    group()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    group()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= room


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_steps_are_those_as_they_come(recipe, monkeypatch, method, optimizer, engine):
    """To the bit, dropout's draws among them: three rounds, the same clients, so that every shape is replayed."""
    replays = []
    plain = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), plain(graph))[1]
    )

    def rounds(graphs):
        experiment = on(
            "cuda", recipe, method=METHODS[method], client__dropout=0.3, client__cuda_graphs=graphs,
            client__optimizer=optimizer, client__lr=0.01, client__weight_decay=0.1, client__proximal=0.1,
            client__head_lr=0.02, **({"client__momentum": 0.9} if optimizer == "sgd" else {}),
        )  # fmt: skip
        jobs, found = jobs_of(experiment), []
        with (Serial() if engine == "serial" else Stacked()).open(experiment) as session:
            for number in range(3):
                params = {n: p + 0.01 * number for n, p in experiment.params.items()}
                found += session.train(
                    params, [dataclasses.replace(job, lr=job.lr * (1 + number)) for job in jobs]
                )
        return found

    as_they_come = rounds(False)
    assert not replays
    recorded = rounds(True)
    assert len(set(replays)) < len(replays)
    for one, other in zip(recorded, as_they_come, strict=True):
        assert one.metrics["loss"] == other.metrics["loss"]
        assert same(one.delta, other.delta)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_debertas_steps_are_recorded(recipe, encoder, precision):
    found = {}
    for graphs in (True, False):
        experiment = on(
            "cuda", recipe, model__name=str(encoder("deberta-v2")), client__dropout=0.1, client__cuda_graphs=graphs,
            client__precision=precision,
        )  # fmt: skip
        with Serial().open(experiment) as session:
            for _ in range(4):
                found[graphs] = list(session.train(experiment.params, jobs_of(experiment)))
        recorded = experiment.trainer._graphs
        assert recorded is None if not graphs else len(recorded) > 0
    check_close(found[True], found[False], experiment.trainer.head, 1e-4)


def test_a_step_that_waits_is_not_recorded(recipe, monkeypatch, caplog):
    experiment = on("cuda", recipe)
    loss = type(experiment.trainer.task).loss

    def waiting(task, said, inputs):
        found = loss(task, said, inputs)
        return found * (1.0 if found.item() > -1 else 0.0)

    monkeypatch.setattr(type(experiment.trainer.task), "loss", waiting)
    with caplog.at_level("INFO"), Serial().open(experiment) as session:
        for _ in range(3):
            list(session.train(experiment.params, jobs_of(experiment)))
    assert not len(experiment.trainer._graphs)
    assert "waits for the device" in caplog.text


def test_steps_are_recorded_where_there_is_room_twice(recipe, monkeypatch):
    experiment = on("cuda", recipe)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    with Serial().open(experiment) as session:
        for _ in range(3):
            list(session.train(experiment.params, jobs_of(experiment)))
    assert not len(experiment.trainer._graphs)


class _Stopped(Observer):
    """Cuts a run off after its first round."""

    def finished_round(self, record):
        if record["round"] == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("engine", [{"name": "serial"}, {"name": "stacked", "clients": 3}])
def test_a_resumed_run_is_the_same(recipe, tmp_path, engine):
    config = configure(recipe, device="cuda", engine=engine, client__dropout=0.1)
    run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "parts", observer=_Stopped())
    run(None, tmp_path / "parts", resume=True)
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert len(whole) == config.rounds
    assert steady(whole) == steady(parts)
    states = [
        load_state(tmp_path / name / "checkpoint" / "state.safetensors")[0] for name in ("whole", "parts")
    ]
    assert same(*states)


def test_draws_differ_between_clients_and_repeat(recipe):
    experiment = on("cuda", recipe, client__dropout=0.3)
    alike = dataclasses.replace(experiment, parts=[experiment.parts[0]] * len(experiment.parts))
    jobs = [dataclasses.replace(job, seed=7) for job in jobs_of(experiment)]  # the same batches for all

    def stacked_once():
        with Stacked().open(alike) as session:
            return list(session.train(alike.params, jobs))

    one, two = stacked_once(), stacked_once()
    for first, second in zip(one, two, strict=True):
        assert all(torch.equal(first.delta[n], second.delta[n]) for n in first.delta)
    assert any(not torch.equal(one[0].delta[n], one[1].delta[n]) for n in one[0].delta)


def test_the_command_line(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    assert federa("run", file, "device=cuda", "engine.name=stacked", "--out", out) == 0
    assert "device: cuda" in (out / "config.yaml").read_text()
