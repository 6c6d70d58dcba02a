"""Clients side by side: serial's updates to rounding, whatever the method, the family and the sizes."""

import dataclasses
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from federa import gpu, run
from federa.client import ClientConfig
from federa.config import parse_config
from federa.cpu import fused, native
from federa.cpu.plain import PlainDropout, Stackable
from federa.engines import Serial, Stacked, stacked, stacking
from federa.engines.stacked import clients_that_fit
from federa.machine import free_main_memory
from federa.methods import METHODS
from federa.methods.lora import _LowRankLinear
from federa.registry import load_plugins
from federa.seeds import torch_seeded
from federa.server import OK, finish_round
from federa.state import load_state
from federa.types import FederaError, Job, RoundFailedError, ServerState
from running import as_on_an_accelerator, build, configure, furthest, jobs_of, kept_files, same, steady

METHOD_CASES = {
    "federa": {"name": "federa", "rank": 4},
    "federa, frozen head": {"name": "federa", "rank": 4, "head": "freeze"},
    "lora": {"name": "lora", "rank": 4, "targets": "all-linear"},
    "rslora": {"name": "lora", "rank": 4, "alpha": 8, "rslora": True},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "adapter": {"name": "adapter", "width": 8, "activation": "tanh"},
    "adapter, houlsby": {"name": "adapter", "width": 8, "placement": "houlsby"},
    "bitfit": {"name": "bitfit"},
    "ft": {"name": "ft"},
    "probe": {"name": "probe"},
}


def prepare(recipe, parts=None, **changes):
    """An experiment without dropout; `parts` are the sizes of clients, who hold the rows in turn."""
    changes = {"client__dropout": 0.0, "client__max_steps": 3, "cohort": 4, **changes}
    experiment = build(recipe, **changes)
    if parts is None:
        return experiment
    ends = np.cumsum(parts)
    rows = np.random.default_rng(0).permutation(240)
    return dataclasses.replace(experiment, parts=[np.sort(rows[e - n : e]) for n, e in zip(parts, ends)])


def train(experiment, jobs=None, engine=None, params=None):
    """All updates of a round, side by side unless another engine is given."""
    with (engine or Stacked(threads=1)).open(experiment) as session:
        return list(session.train(params or experiment.params, jobs or jobs_of(experiment)))


def distance(update, expected):
    """How far a delta is from another one, relative to that one's length."""
    assert update.delta.keys() == expected.delta.keys()
    off = sum(float((update.delta[n] - d).double().square().sum()) for n, d in expected.delta.items())
    return (off / sum(float(d.double().square().sum()) for d in expected.delta.values())) ** 0.5


def check_close(found, expected, tolerance=1e-5):
    assert [u.job for u in found] == [u.job for u in expected]
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < tolerance, one.job
        assert one.weight == other.weight
        assert all(t.dtype == torch.float32 for t in one.delta.values())
        assert one.metrics.keys() == other.metrics.keys()
        for key in ("steps", "examples"):
            assert one.metrics[key] == other.metrics[key]
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=10 * tolerance)


def check_as_serial(experiment, jobs=None, tolerance=1e-5, clients=None):
    expected = train(experiment, jobs, Serial(threads=1))
    found = train(experiment, jobs, Stacked(threads=1, clients=clients))
    check_close(found, expected, tolerance)
    return found


# Methods, families


@pytest.mark.parametrize("case", METHOD_CASES)
def test_every_method_gives_serials_updates(recipe, case):
    """With SGD: a bias of keys has no gradient but rounding, which AdamW would scale to whole steps."""
    check_as_serial(prepare(recipe, method=METHOD_CASES[case], client__optimizer="sgd", client__lr=0.1))


@pytest.mark.parametrize("family", ["roberta", "deberta-v2", "distilbert", "electra", "modernbert"])
def test_every_family_gives_serials_updates(recipe, encoder, family):
    """All parameters at once: no gradient of any layer can be wrong."""
    experiment = prepare(
        recipe, model__name=str(encoder(family)), method={"name": "ft"}, client__optimizer="sgd", cohort=3
    )
    check_as_serial(experiment)


def test_a_mean_over_tokens_is_over_each_examples_own(recipe, encoder):
    """ModernBERT's published checkpoints pool so: the head wants the mask of tokens itself."""
    experiment = prepare(recipe, model__name=str(encoder("modernbert")), client__optimizer="sgd", cohort=3)
    experiment.trainer.model.config.classifier_pooling = "mean"
    check_as_serial(experiment)


def test_without_the_cpus_own_kernels(recipe, monkeypatch):
    """As on an accelerator: transformers' modules and torch's attention."""
    monkeypatch.setattr("federa.experiment.speed_up", lambda model: model.set_attn_implementation("sdpa"))
    for name in ("ft", "lora"):
        check_as_serial(prepare(recipe, method={"name": name}, client__optimizer="sgd", cohort=3))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("bert", case) for case in METHOD_CASES),
        *product(("roberta", "electra", "deberta-v2"), ("lora", "ft")),
    ],
)
def test_with_a_gpus_modules(recipe, encoder, monkeypatch, family, case):
    """What `gpu.speed_up` puts in, on the CPU; clients of unequal texts, so that each has its own padding."""
    as_on_an_accelerator(monkeypatch, ready=True)
    changes = {"client__optimizer": "sgd", "client__lr": 0.1, "client__max_steps": 2, "cohort": 3}
    experiment = prepare(recipe, model__name=str(encoder(family)), method=METHOD_CASES[case], **changes)
    assert any(type(module) is gpu.SharedLinear for module in experiment.trainer.model.modules())
    check_as_serial(experiment)


def test_a_third_partys_method(recipe):
    plugin = Path(__file__).parents[2] / "examples" / "plugin_method.py"
    load_plugins([str(plugin)], Path())
    try:
        check_as_serial(prepare(recipe, method={"name": "ffa_lora", "rank": 4}))
    finally:
        METHODS._classes.pop("ffa_lora")
        sys.modules.pop("federa_plugin_plugin_method")


# What a client does


CLIENTS = {
    "adamw": {},
    "weight decay": {"weight_decay": 0.5},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "momentum and decay": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "the head's own rate": {"head_lr": 0.05, "weight_decay": 0.1},
    "proximal": {"proximal": 5.0},
    "no clipping": {"clip_norm": 0.0},
    "two epochs": {"epochs": 2},
}


@pytest.mark.parametrize("case", CLIENTS)
def test_clients_of_any_size_under_every_setting(recipe, case):
    """One example, less than a batch, exactly one, several and a rest: each stops when it is done."""
    changes = {f"client__{key}": value for key, value in CLIENTS[case].items()}
    experiment = prepare(recipe, parts=(1, 5, 8, 20, 33), cohort=5, client__max_steps=None, **changes)
    found = check_as_serial(experiment, tolerance=3e-5)
    epochs = experiment.config.client.epochs
    assert [u.metrics["steps"] for u in found] == [5 * epochs, 3 * epochs, epochs, epochs, epochs]


def test_steps_are_counted_as_batches_are_cut(recipe):
    for changes in ({"epochs": 2}, {"epochs": 3, "max_steps": 4}, {"max_steps": 1}, {"batch_size": 3}):
        trainer = prepare(
            recipe, **{f"client__{k}": v for k, v in {"max_steps": None, **changes}.items()}
        ).trainer
        data, job = prepare(recipe).train, Job(1, 0, 9, 0.1)
        for size in (1, 7, 8, 9, 64, 65, 130):
            batches = list(trainer.batches(data, np.arange(size), job))
            assert stacking.num_steps(trainer.config, size) == len(batches)


def test_each_clients_gradient_is_clipped_by_its_own_length(recipe):
    one_step = {
        "client__optimizer": "sgd",
        "client__lr": 1.0,
        "client__max_steps": 1,
        "client__momentum": 0.0,
    }
    plain = train(prepare(recipe, client__clip_norm=0.0, **one_step))
    lengths = sorted(sum(float(d.square().sum()) for d in u.delta.values()) ** 0.5 for u in plain)
    limit = (lengths[0] + lengths[-1]) / 2
    assert lengths[-1] > 1.05 * lengths[0]
    found = check_as_serial(prepare(recipe, client__clip_norm=limit, **one_step))
    clipped = [sum(float(d.square().sum()) for d in u.delta.values()) ** 0.5 for u in found]
    assert max(clipped) == pytest.approx(limit, rel=1e-4)
    assert min(clipped) == pytest.approx(lengths[0], rel=1e-5)


def test_bfloat16_computes_and_float32_keeps(recipe):
    settings = {"client__optimizer": "sgd", "client__lr": 0.1}
    experiment = prepare(recipe, client__precision="bf16", **settings)
    found = check_as_serial(experiment, tolerance=5e-2)
    exact = train(prepare(recipe, client__precision="fp32", **settings))
    assert all(distance(one, other) > 1e-5 for one, other in zip(found, exact, strict=True))
    steps = torch.cat([d.flatten() for d in found[0].delta.values()])
    assert not torch.equal(steps, steps.bfloat16().float()), "the masters moved in bfloat16"


def test_each_job_has_its_own_learning_rate(recipe):
    experiment = prepare(recipe, client__head_lr=1e-2, client__weight_decay=0.1)
    jobs = [dataclasses.replace(job, lr=job.lr * 2**i) for i, job in enumerate(jobs_of(experiment))]
    check_as_serial(experiment, jobs, tolerance=3e-5)


# Groups


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_a_cohort_may_be_split(recipe, monkeypatch, clients):
    experiment = prepare(recipe, cohort=5)
    sizes, together = [], stacked.train_together

    def noting(trainer, params, data, parts, jobs, own):
        sizes.append(len(jobs))
        return together(trainer, params, data, parts, jobs, own)

    monkeypatch.setattr(stacked, "train_together", noting)
    whole = train(experiment)
    check_close(train(experiment, engine=Stacked(threads=1, clients=clients)), whole)
    assert sizes == [5, *{1: [1] * 5, 2: [1, 2, 2], 3: [2, 3]}[clients]]


def test_a_group_starts_when_its_first_update_is_asked_for(recipe, monkeypatch):
    experiment, ran, together = prepare(recipe), [], stacked.train_together
    monkeypatch.setattr(stacked, "train_together", lambda *args: (ran.append(args[4]), together(*args))[1])
    jobs = jobs_of(experiment)
    with Stacked(threads=1, clients=2).open(experiment) as session:
        updates = session.train(experiment.params, jobs)
        assert ran == []
        first = next(updates)
        kept = {name: t.clone() for name, t in first.delta.items()}
        assert ran == [jobs[:2]]
        assert [u.job for u in (first, *updates)] == jobs
    assert same(first.delta, kept), "a later group has changed an update"


def test_jobs_in_any_order(recipe):
    experiment = prepare(recipe, parts=(1, 30, 9, 20), client__max_steps=None)
    jobs = jobs_of(experiment)
    for order in (jobs[::-1], [jobs[2], jobs[0], jobs[3], jobs[1]]):
        check_as_serial(experiment, order, tolerance=3e-5)


def test_as_many_clients_as_fit(recipe, monkeypatch):
    experiment = prepare(recipe)
    assert clients_that_fit(experiment) > 4
    free = free_main_memory()
    assert 0 < free < 1 << 50
    large, small = (
        clients_that_fit(prepare(recipe, client__batch_size=size, method__name=name))
        for size, name in ((2, "probe"), (16, "ft"))
    )
    assert large > 3 * small
    monkeypatch.setattr(stacked, "free_memory", lambda _: 0)
    assert clients_that_fit(experiment) == 1


def test_a_cohort_that_fits_is_never_split_and_one_that_does_not_is_split_with_a_word(
    recipe, monkeypatch, caplog
):
    """Who is trained with whom settles the dropout masks."""
    experiment = prepare(recipe, client__dropout=0.3)
    needed = stacked.memory_of_a_client(experiment)
    found = []
    for room in (4, 40):
        monkeypatch.setattr(stacked, "free_memory", lambda _: (room + 0.5) * needed / stacked.SHARE)
        with Stacked(threads=1).open(experiment) as session:
            assert session.clients == 4
        found.append(train(experiment))
    assert all(same(one.delta, two.delta) for one, two in zip(*found, strict=True))
    monkeypatch.setattr(stacked, "free_memory", lambda _: 3.5 * needed / stacked.SHARE)
    with Stacked(threads=1).open(experiment) as session:
        assert session.clients == 3
    assert "trains 3 of a cohort's 4 clients at a time" in caplog.text and "engine.clients=3" in caplog.text
    for clients in (3, 5):
        with Stacked(threads=1, clients=clients).open(experiment) as session:
            assert session.clients == clients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [*METHOD_CASES, "lora, top layer"])
def test_a_groups_estimate_is_not_below_what_it_takes(recipe, case, precision):
    """Of a whole step: buffers, what is saved for the backward pass, gradients and scratch; and not far off.

    Where little trains little is saved, and the highest point is in the forward pass.
    """
    top = {"name": "lora", "rank": 4, "targets": ["layer.1.attention.self.query"]}
    settings = {"client__precision": precision, "client__batch_size": 16, "client__dropout": 0.3}
    check_estimate(prepare(recipe, method=METHOD_CASES.get(case, top), **settings))


@pytest.mark.parametrize("method", ["ft", "probe"])
@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_the_estimate_of_other_families(recipe, encoder, family, method):
    settings = {"client__precision": "bf16", "client__batch_size": 16, "client__dropout": 0.3}
    check_estimate(prepare(recipe, model__name=str(encoder(family)), method={"name": method}, **settings))


def check_estimate(experiment, clients=4):
    """Require that what is planned for some clients is between what torch's profiler finds and twice that."""
    trainer, data = experiment.trainer, experiment.train
    rows = np.argsort(-data.lengths(), kind="stable")[:16]
    trainer.model.train()

    def step():
        lanes = stacking.Lanes(trainer, clients)
        lanes.load_(experiment.params, [{}] * clients, [0.1] * clients)
        batch = stacking.stacked_batch(data, [rows] * clients, trainer.device)
        with stacking.attention_of_all(trainer.model), torch_seeded(0):
            lanes.step_(lanes.losses(batch, clients))

    step()  # what the first one loads stays
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
    planned = clients * stacked.memory_of_a_client(experiment)
    assert peak < planned < 2 * peak


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 64, False, False)]),
        ({"weight_decay": 0.1}, [(0, 10, False, True), (10, 20, False, False), (20, 30, False, True)]),
        ({"lr": 0.1, "head_lr": 0.2}, [(0, 20, False, False), (20, 30, True, False)]),
    ],
)
def test_what_an_optimizer_treats_alike_is_one_span(settings, expected):
    segments = [(slice(0, 10), False, True), (slice(10, 20), False, False), (slice(20, 30), True, True)]
    found = stacking._spans(segments, ClientConfig(**settings), 64)
    assert [(span.start, span.stop, *kind) for span, *kind in found] == expected


# Isolation


def test_a_client_that_diverges_leaves_the_others_alone_to_the_bit(recipe):
    experiment = prepare(recipe, client__clip_norm=0.0, client__optimizer="sgd", client__lr=0.1)
    jobs = jobs_of(experiment)
    fine = train(experiment, jobs)
    wild = [dataclasses.replace(job, lr=1e38 if i == 1 else job.lr) for i, job in enumerate(jobs)]
    updates = train(experiment, wild)
    for i, (one, other) in enumerate(zip(updates, fine, strict=True)):
        finite = all(bool(t.isfinite().all()) for t in one.delta.values())
        assert finite == (i != 1)
        assert same(one.delta, other.delta) == (i != 1)
    state = ServerState(0, experiment.params)
    after, summary = finish_round(experiment.config, state, wild, updates)
    assert [v == OK for v in summary.verdicts.values()] == [True, False, True, True]
    assert all(bool(t.isfinite().all()) for t in after.params.values())


def test_lanes_that_are_used_again_are_as_new_ones(recipe):
    """As where steps are recorded, here after clients that diverged: NaN gets between the parameters too."""
    experiment = prepare(recipe)
    jobs, own = jobs_of(experiment), [{}] * 4
    parts = [experiment.parts[job.client_id] for job in jobs]
    wild = {n: torch.full_like(p, torch.nan) for n, p in experiment.params.items()}

    def trained(lanes, params, count):
        some = (parts[:count], jobs[:count], own[:count])
        return [u for u, _ in stacking.train_together(lanes, params, experiment.train, *some)]

    lanes = stacking.Lanes(experiment.trainer, 4)
    assert not any(t.isfinite().all() for u in trained(lanes, wild, 4) for t in u.delta.values())
    for count in (4, 2, 3):
        fresh = trained(stacking.Lanes(experiment.trainer, count), experiment.params, count)
        again = trained(lanes, experiment.params, count)
        assert all(same(one.delta, two.delta) for one, two in zip(fresh, again, strict=True))


def test_what_a_round_before_left_has_no_influence(recipe):
    experiment = prepare(recipe)
    jobs, other = jobs_of(experiment), {n: p + 1.0 for n, p in experiment.params.items()}
    with Stacked(threads=1).open(experiment) as session:
        first = list(session.train(experiment.params, jobs))
        next(session.train(other, jobs))  # and abandoned
        again = list(session.train(experiment.params, jobs))
        wild = {n: torch.full_like(p, torch.nan) for n, p in experiment.params.items()}
        assert not any(t.isfinite().all() for u in session.train(wild, jobs) for t in u.delta.values())
        last = list(session.train(experiment.params, jobs))
    assert all(same(one.delta, two.delta) for one, two in zip(first, again, strict=True))
    assert all(same(one.delta, two.delta) for one, two in zip(first, last, strict=True))


def test_heads_that_clients_keep(recipe, tmp_path):
    changes = {
        "method__head": "local", "rounds": 2, "client__dropout": 0.0, "client__optimizer": "sgd", "client__lr": 0.1
    }  # fmt: skip
    results = [
        run(configure(recipe, **changes, engine={"name": name, "threads": 1}), tmp_path / name)
        for name in ("serial", "stacked")
    ]
    assert furthest(*(r.state.params for r in results)) < 1e-5
    kept = [kept_files(r.folder) for r in results]
    assert list(kept[0]) == list(kept[1]) and kept[0]
    for files in zip(*(found.values() for found in kept), strict=True):
        assert furthest(*(load_state(file)[0] for file in files)) < 1e-5
    assert results[0].summary["per_client"] == results[1].summary["per_client"]


def test_a_method_of_which_nothing_travels(recipe):
    experiment = prepare(recipe, method={"name": "probe", "head": "local"})
    updates = train(experiment)
    assert all(u.delta == {} for u in updates)
    job = dataclasses.replace(updates[0].job, round=2)
    head = experiment.kept.load(job)
    assert furthest(head, experiment.kept.start) > 0


# Dropout


def test_dropout_is_drawn_for_each_client_and_from_the_seed(recipe):
    experiment = prepare(recipe, client__dropout=0.3)
    alike = dataclasses.replace(experiment, parts=[experiment.parts[0]] * 3)
    jobs = [Job(1, client, 7, 0.01) for client in range(3)]
    first, again = train(alike, jobs), train(alike, jobs)
    assert all(same(one.delta, two.delta) for one, two in zip(first, again, strict=True))
    assert not same(first[0].delta, first[1].delta), "clients share a mask"
    other = train(alike, [dataclasses.replace(job, seed=8) for job in jobs])
    assert not same(first[0].delta, other[0].delta)
    still = train(dataclasses.replace(prepare(recipe), parts=alike.parts), jobs)
    assert furthest(still[0].delta, still[1].delta) < 1e-6, "without dropout the same job is the same"


def test_dropout_has_the_same_distribution_as_serials(recipe):
    """Of one job under many seeds, each engine's mean loss of the first step agrees to four standard errors."""
    experiment = prepare(recipe, client__dropout=0.3, client__max_steps=1)
    experiment = dataclasses.replace(experiment, parts=[experiment.parts[0][:8]] * 64)
    jobs = [Job(1, client, 100 + client, 0.01) for client in range(64)]
    losses = [
        np.array([u.metrics["loss"] for u in train(experiment, jobs, engine)])
        for engine in (Serial(threads=1), Stacked(threads=1, clients=32))
    ]
    spread = np.sqrt(sum(one.var() / 64 for one in losses))
    assert spread > 0 and abs(losses[0].mean() - losses[1].mean()) < 4 * spread
    assert 0.5 < losses[0].std() / losses[1].std() < 2


# Whole runs, and what cannot be


def test_a_whole_run_has_serials_metrics(recipe, tmp_path):
    config = configure(recipe, client__dropout=0.0)
    serial = run(config)
    one, two = (
        run(config.replace(engine={"name": "stacked", "threads": 1}), tmp_path / name) for name in "ab"
    )
    for ours, theirs in zip(steady(one.records), steady(serial.records), strict=True):
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-4)
        assert ours == theirs
    assert same(one.state.params, two.state.params) and steady(one.records) == steady(two.records)
    assert parse_config({"engine": "stacked"}).engine == Stacked()


def test_predictions_are_serials(recipe):
    experiment = prepare(recipe)
    batches = experiment.batches(np.arange(30))
    with Serial(threads=1).open(experiment) as session:
        expected = [np.stack(rows) for rows in session.predict(experiment.params, batches)]
    with Stacked(threads=1).open(experiment) as session:
        list(session.train(experiment.params, jobs_of(experiment)))
        found = [np.stack(rows) for rows in session.predict(experiment.params, batches)]
    assert all(map(np.array_equal, found, expected))


class Odd(torch.autograd.Function):
    """A function that says nothing of vmap."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def branching(logits):
    return logits if logits.sum() > 0 else logits + 0


@pytest.mark.parametrize(
    "change", [Odd.apply, branching], ids=["a function of its own", "a branch on a value"]
)
def test_a_model_that_cannot_be_batched_is_refused(recipe, monkeypatch, change):
    experiment = prepare(recipe)
    classifier = experiment.trainer.model.classifier
    forward = classifier.forward
    monkeypatch.setattr(classifier, "forward", lambda x: change(forward(x)))
    with pytest.raises(FederaError, match=r"side by side; use engine\.name=serial") as raised:
        train(experiment)
    assert "\n" not in str(raised.value)


def test_a_model_that_mixes_examples_is_refused(recipe, monkeypatch):
    """Rows that only fill up a batch would count."""
    experiment = prepare(recipe)
    classifier = experiment.trainer.model.classifier
    forward = classifier.forward
    monkeypatch.setattr(classifier, "forward", lambda x: forward(x) * x.sum(0).square().mean())
    with pytest.raises(FederaError, match=r"but \[.*\] alone; use engine\.name=serial"):
        train(experiment)


@pytest.mark.parametrize(("key", "value"), [("micro_batch", 4), ("checkpointing", True)])
def test_saving_memory_in_each_client_is_refused(recipe, key, value):
    """A backward pass that computes again would find the model's own parameters, not the clients'."""
    with pytest.raises(FederaError, match=rf"client\.{key}.*use engine\.name=serial") as raised:
        train(prepare(recipe, **{f"client__{key}": value}))
    assert "\n" not in str(raised.value)


def test_a_failure_names_the_round_and_the_clients(recipe, monkeypatch):
    experiment = prepare(recipe)
    jobs = jobs_of(experiment, 3)
    broken = {**experiment.params, "classifier.weight": torch.zeros(2, 2)}
    with pytest.raises(RoundFailedError) as raised:
        train(experiment, jobs, Stacked(threads=1, clients=2), broken)
    first, second = (job.client_id for job in jobs[:2])
    assert f"round 3: clients {first}, {second} failed: RuntimeError: " in str(raised.value)

    def too_large(*args):
        raise torch.OutOfMemoryError("of memory")

    monkeypatch.setattr(stacked, "train_together", too_large)
    with pytest.raises(FederaError, match=r"4 clients at once do not fit into memory; set it to 2"):
        train(experiment)
    with pytest.raises(FederaError, match=r"not even one client's batch"):
        train(experiment, engine=Stacked(threads=1, clients=1))


# The rules of vmap


def check_rule(apply, tensors, in_dims):
    """Check that a function under vmap computes, and has gradients, as of one client after the other."""
    leaves = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    together = torch.func.vmap(apply, in_dims, randomness="different")(*leaves[0])
    lanes = [
        apply(*(t if dim is None else t.select(dim, i) for t, dim in zip(leaves[1], in_dims, strict=True)))
        for i in range(len(together))
    ]
    torch.testing.assert_close(together, torch.stack(lanes), atol=1e-5, rtol=1e-5)
    factor = torch.randn(together.shape)
    for out, own in ((together, leaves[0]), (torch.stack(lanes), leaves[1])):
        (out * factor).sum().backward()
        assert all(t.grad is not None for t in own)
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, 0, 0), (1, None, None, 0, 0), (0, None, None, None, 0), (0, 0, 0, 0, 0),
                (0, None, 0, 0, 0), (None, None, None, 0, None)]
)  # fmt: skip
def test_low_rank_products(in_dims):
    shapes = [(7, 6), (5, 6), (5,), (2, 6), (5, 2)]
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]))
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    check_rule(lambda *t: _LowRankLinear.apply(*t, 0.5)[0], tensors, in_dims)
    with_bias = in_dims[2]
    if with_bias is None:
        check_rule(
            lambda x, w, a, b: _LowRankLinear.apply(x, w, None, a, b, 0.5)[0],
            [t for i, t in enumerate(tensors) if i != 2],
            (*in_dims[:2], *in_dims[3:]),
        )


@pytest.mark.parametrize("own", [False, True], ids=["shared scales", "scales of each client"])
def test_fused_kernels(own):
    library = native.load()
    if library is None:
        pytest.skip(f"no compiled kernels: {native.status()}")
    lanes, vector = (3,) if own else (), 0 if own else None
    h, residual, wide = torch.randn(3, 4, 5, 32), torch.randn(4, 3, 5, 32), torch.randn(4, 5, 3, 32)
    bias, weight, beta = (torch.randn(*lanes, 32) for _ in range(3))

    def norm(h, bias, residual, weight, beta):
        return fused.Norm.apply(library, h, bias, residual, weight, beta, 1e-5, 0.0)

    check_rule(norm, [h, bias, residual, weight, beta], (0, vector, 1, vector, vector))
    check_rule(lambda h, bias: fused.Gelu.apply(library, h, bias), [wide, bias], (2, vector))
    check_rule(lambda h: fused.Gelu.apply(library, h, None), [wide], (2,))


def test_fast_dropout_draws_for_every_client():
    library = native.load()
    functions = [lambda x: PlainDropout.apply(x, 0.5)]
    if library is not None:
        functions.append(lambda x: fused.Dropout.apply(library, x, 0.5))
    for function in functions:
        x = torch.ones(3, 40, 50, requires_grad=True)
        with torch_seeded(3):
            y = torch.func.vmap(function, randomness="different")(x)
        kept = y != 0
        assert all(0.4 < kept[i].float().mean() < 0.6 for i in range(3))
        assert not torch.equal(kept[0], kept[1])
        y.sum().backward()
        assert torch.equal(x.grad != 0, kept)


def test_a_function_of_nobodys_own_is_applied_as_ever():
    """Under vmap, with nothing that differs from client to client."""

    class Twice(Stackable):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(4, requires_grad=True)
    y = torch.func.vmap(lambda lane: Twice.apply(x) + lane)(torch.zeros(3, 4))
    y.sum().backward()
    assert torch.equal(y, torch.full((3, 4), 2.0)) and torch.equal(x.grad, torch.full((4,), 6.0))
