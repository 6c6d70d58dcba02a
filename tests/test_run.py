"""The round loop: records, evaluation, early stop, heads, poison, and what a run directory holds."""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch

import federa as package
from federa import run
from federa.cpu import native
from federa.environment import environment
from federa.evaluation import Evaluator
from federa.experiment import Experiment
from federa.run import Observer
from federa.server import make_jobs
from federa.state import load_state, num_bytes
from federa.types import FederaError, RoundFailedError, Update
from running import build, configure, federa, kept_files, loop, same, short_reports, steady, tree

FAST = {"client__max_steps": 2, "rounds": 3}


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    short_reports(monkeypatch)


def outputs_of(experiment, params, rows, local=None):
    """The outputs of evaluation rows, one call of the model a row: no batches, no padding, no order."""
    trainer = experiment.trainer
    each = [
        next(iter(trainer.predict(params, experiment.evaluation, [np.array([row])], local)))[0]
        for row in rows
    ]
    return np.stack(each)


# what is recorded


def test_a_run_directory_holds_what_scripts_rely_on(recipe, tmp_path):
    config = configure(recipe, evaluate_every=2, device="cpu")
    result = run(config, tmp_path / "run")
    folder = result.folder
    assert sorted(os.listdir(folder)) == [
        "checkpoint", "config.yaml", "environment.json", "init.safetensors", "labels.json", "metrics.jsonl",
        "partition.json", "report.html", "result.json",
    ]  # fmt: skip
    assert package.load_config(folder / "config.yaml") == config
    experiment = build(recipe)
    init, metadata = load_state(folder / "init.safetensors")
    assert same(init, experiment.params) and metadata["fingerprint"] == experiment.fingerprint
    tensors, metadata = load_state(folder / "checkpoint" / "state.safetensors")
    assert same(tensors, {f"params/{n}": p for n, p in result.state.params.items()}) and metadata == {
        "round": "3"
    }

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == result.records and [r["round"] for r in records] == [1, 2, 3]
    assert [{"accuracy", "macro_f1"} <= set(r) for r in records] == [False, True, True], (
        "every second, and the last"
    )
    size, sizes, met, joined = num_bytes(init), [len(part) for part in experiment.parts], set(), 0
    for record in records:
        jobs = make_jobs(config, record["round"], sizes)
        assert record["examples"] == sum(sizes[job.client_id] for job in jobs)
        assert (record["clients"], record["rejected"]) == (3, 0)
        assert record["verdicts"] == {str(job.client_id): "ok" for job in jobs}
        assert record["bytes_up"] == 3 * size
        new = {job.client_id for job in jobs} - met
        met |= new  # late ones are sent the round-0 factors beside the current state
        late = len(new) if record["round"] > 1 else 0
        joined += late
        assert record["bytes_down"] == 3 * size + late * 4 * 1024
        assert math.isfinite(record["loss"]) and 0 < record["seconds_train"] <= 1.1 * record["seconds_round"]

    summary = json.loads((folder / "result.json").read_text())
    assert summary == result.summary
    scored = [r["accuracy"] for r in records if "accuracy" in r]
    assert (summary["final"], summary["best"]) == (scored[-1], max(scored))
    assert summary["best_round"] == (2 if scored[0] >= scored[1] else 3)
    assert (summary["metric"], summary["rounds"], summary["head"], summary["target"]) == (
        "accuracy",
        3,
        "train",
        None,
    )
    assert joined and summary["bytes_up"] == 9 * size == summary["bytes_down"] - joined * 4 * 1024
    assert summary["seconds_rounds"] == pytest.approx(sum(r["seconds_round"] for r in records))
    assert summary["seconds_train"] == pytest.approx(sum(r["seconds_train"] for r in records))
    assert summary["trainable_parameters"] == sum(t.numel() for t in init.values()) == size // 4
    assert set(summary["seconds_start"]) == {"read", "load", "tokenise", "partition", "prepare"}

    held = json.loads((folder / "partition.json").read_text())
    assert held["client_sizes"] == sizes and sum(sizes) == 240 and held["groups"] == ["food", "sport", "tech"]
    assert np.array_equal(held["counts"], experiment.counts)
    texts, trained_on = (held["evaluation_examples"], held["evaluation_examples_trained_on"])
    assert texts == experiment.evaluation.num_examples and trained_on < 0.01 * texts
    assert json.loads((folder / "labels.json").read_text()) == {"labels": ["food", "sport", "tech"]}


def test_the_environment_says_what_ran_where():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert (
        found["cores"] >= 1 and found["processor"] and found["platform"] and found["python"].startswith("3.")
    )
    assert found["kernels"] == native.status()
    known = {"python", "platform", "processor", "cores", "kernels", "gpu", "commit", "versions"}
    assert set(found) == known


def test_loss_and_accuracy_are_those_of_the_clients_and_of_the_state(recipe):
    """One round by hand: jobs, updates, weighted means, and a count of right answers."""
    config = configure(recipe, rounds=1, client__dropout=0.0)
    result = run(config)
    experiment = build(recipe, rounds=1, client__dropout=0.0)
    updates = []
    for job in make_jobs(config, 1, [len(part) for part in experiment.parts]):
        updates.append(experiment.train_client(experiment.params, job))
    weights = [float(len(experiment.parts[u.job.client_id])) for u in updates]
    for name, start in experiment.params.items():
        mean = sum(w * u.delta[name].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert torch.allclose(result.state.params[name].double(), start.double() + mean, rtol=0, atol=1e-7), (
            name
        )
    loss = sum(w * u.metrics["loss"] for w, u in zip(weights, updates, strict=True)) / sum(weights)
    (record,) = result.records
    assert record["loss"] == pytest.approx(loss)
    guesses = outputs_of(experiment, result.state.params, range(90)).argmax(axis=1)
    assert record["accuracy"] == pytest.approx(np.mean(guesses == experiment.evaluation.targets["labels"]))


def test_per_client_numbers(recipe, monkeypatch):
    """Mean, 10th percentile and worst over clients, written out with lists; a model that guesses tells them apart."""
    guesses = np.random.default_rng(0).integers(0, 3, 90)
    monkeypatch.setattr(Evaluator, "predictions", lambda *args: [(int(guess), 1.0) for guess in guesses])
    result = run(configure(recipe, **FAST))
    experiment = build(recipe)
    truth, scores = experiment.evaluation.targets["labels"], []
    for client in range(6):
        right = [int(guesses[row] == truth[row]) for row in experiment.client_examples(client)]
        scores.append(sum(right) / len(right))
    low, next_, *_ = sorted(scores)
    assert low < next_, "clients that are all alike show nothing"
    expected = {
        "mean": sum(scores) / 6,
        "p10": low + 0.5 * (next_ - low),
        "worst": low,
    }  # 0.1 * (6 - 1) = 0.5
    assert result.summary["per_client"] == pytest.approx(expected)
    assert result.summary["final"] == pytest.approx(np.mean(guesses == truth))


def test_per_client_numbers_are_of_the_last_state(recipe):
    result = run(configure(recipe, rounds=2))
    experiment, scores = build(recipe), []
    for client in range(6):
        rows = experiment.client_examples(client)
        guesses = outputs_of(experiment, result.state.params, rows).argmax(axis=1)
        scores.append(np.mean(guesses == experiment.evaluation.targets["labels"][rows]))
    assert result.summary["per_client"]["mean"] == pytest.approx(np.mean(scores))
    assert result.summary["per_client"]["worst"] == pytest.approx(min(scores))


def test_observer_is_told_in_order(recipe):
    heard = []

    class Listener(Observer):
        def started(self, experiment, records):
            assert isinstance(experiment, Experiment)
            heard.append(("started", len(records)))

        def updated(self, update, of):
            heard.append(("updated", update.job.round, of))

        def evaluating(self, done, of):
            heard.append(("evaluating", done, of))

        def finished_round(self, record):
            heard.append(("finished", record["round"]))

    run(
        configure(recipe, **{**FAST, "rounds": 2}, evaluate_every=0, evaluate_batch_size=45),
        observer=Listener(),
    )
    first = [("updated", 1, 3)] * 3
    halves = [("evaluating", 1, 2), ("evaluating", 2, 2)]
    second = [("updated", 2, 3)] * 3
    assert heard == [("started", 0), *first, ("finished", 1), *second, *halves, ("finished", 2)]


def test_without_a_folder_nothing_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(configure(recipe, **FAST))
    assert result.folder is None and result.state.round == 3 and os.listdir(tmp_path) == []


def test_seeds_decide_everything(recipe):
    one, again, other = (run(configure(recipe, **FAST, seed=seed)) for seed in (1, 1, 2))
    assert same(one.state.params, again.state.params) and steady(one.records) == steady(again.records)
    assert not same(one.state.params, other.state.params)
    assert [set(r["verdicts"]) for r in one.records] != [set(r["verdicts"]) for r in other.records]


# early stop


def scripted(monkeypatch, values):
    """Let the rounds have these accuracies."""
    left = iter(values)
    monkeypatch.setattr(Evaluator, "score", lambda *args: {"accuracy": next(left)})


def test_early_stop_at_a_target_says_when_and_at_what_price(recipe, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.79, 0.8, 0.9, 0.1])
    result = run(
        configure(recipe, **{**FAST, "rounds": 5}, target=0.8, method__name="lora"), tmp_path / "run"
    )
    assert [r["round"] for r in result.records] == [1, 2, 3] and result.state.round == 3
    at = result.summary["target"]
    assert (at["value"], at["round"]) == (0.8, 3)
    assert at["bytes"] == sum(r["bytes_up"] + r["bytes_down"] for r in result.records)
    assert at["bytes"] >= 3 * 2 * 3 * num_bytes(result.state.params)
    assert at["seconds"] == pytest.approx(sum(r["seconds_round"] for r in result.records))
    assert (result.summary["final"], result.summary["best"], result.summary["best_round"]) == (0.8, 0.8, 3)
    before = tree(tmp_path)
    assert run(None, tmp_path / "run", resume=True).state.round == 3, (
        "a resume does not go on after the target"
    )
    assert tree(tmp_path) == before


def test_early_stop_counts_only_rounds_that_were_evaluated(recipe, monkeypatch):
    scripted(monkeypatch, [0.9, 0.95])
    result = run(configure(recipe, **{**FAST, "rounds": 5}, target=0.8, evaluate_every=2))
    assert result.state.round == 2 and result.summary["target"]["round"] == 2


@pytest.mark.parametrize(("every", "of", "final"), [(1, 1, 0.6), (1, 3, 0.7), (2, 2, 0.65)])
def test_the_final_score_is_the_mean_of_the_last_evaluations(recipe, monkeypatch, every, of, final):
    scripted(monkeypatch, [0.8, 0.9, 0.6, 0.6] if every == 1 else [0.9, 0.7, 0.6])
    fast = {**FAST, "rounds": 4 if every == 1 else 5}
    summary = run(configure(recipe, **fast, evaluate_every=every, final_mean_of=of)).summary
    assert summary["final"] == pytest.approx(final) and summary["best"] == 0.9


def test_a_target_that_is_not_reached(recipe, monkeypatch):
    scripted(monkeypatch, [0.7, 0.79, 0.6])
    result = run(configure(recipe, **FAST, target=0.8))
    assert result.state.round == 3 and result.summary["target"] is None
    assert (result.summary["final"], result.summary["best"], result.summary["best_round"]) == (0.6, 0.79, 2)


def test_a_resume_after_a_crash_at_the_target_stops_too(recipe, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.9])
    config, summarise = configure(recipe, **{**FAST, "rounds": 5}, target=0.8), loop._summarise
    monkeypatch.setattr(loop, "_summarise", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path / "run")
    monkeypatch.setattr(loop, "_summarise", summarise)
    result = run(None, tmp_path / "run", resume=True)
    assert result.state.round == 2 and result.summary["target"]["round"] == 2


# heads


def test_local_heads_stay_with_their_clients(recipe, tmp_path):
    config = configure(recipe, method__head="local", cohort=2)
    result = run(config, tmp_path / "run")
    experiment = build(recipe, method__head="local")
    head = set(experiment.kept.start)
    assert (
        head
        == {n for n in experiment.trainer.flat.names if "pooler" in n or n.startswith("classifier")}
        != set()
    )
    assert not head & set(result.state.params), "a local head travels"
    assert result.summary["head"] == "local"
    assert result.summary["travelling_parameters"] < result.summary["trainable_parameters"]
    assert result.records[0]["bytes_up"] == 2 * num_bytes(experiment.params)

    took_part = Counter(int(c) for record in result.records for c in record["verdicts"])
    last = {int(c): r["round"] for r in result.records for c in r["verdicts"]}
    files = kept_files(tmp_path / "run")
    assert {f"client-{c:06d}/round-{r:06d}.safetensors" for c, r in last.items()} <= {*files}
    assert len(files) == sum(min(times, 2) for times in took_part.values()), (
        "the last two of each client are kept"
    )

    scores = []  # each client that has trained, with its own head, on its own rows
    for client in sorted(last):
        name = f"client-{client:06d}/round-{last[client]:06d}.safetensors"
        own, _ = load_state(files[name])
        assert set(own) == head and not same(own, experiment.kept.start)
        rows = experiment.client_examples(client)
        guesses = outputs_of(experiment, result.state.params, rows, own).argmax(axis=1)
        scores.append(np.mean(guesses == experiment.evaluation.targets["labels"][rows]))
    record = result.records[-1]
    assert record["clients_evaluated"] == len(last) < 6 and "macro_f1" not in record
    assert record["accuracy"] == pytest.approx(np.mean(scores)) == result.summary["final"]
    assert result.summary["per_client"]["worst"] == pytest.approx(min(scores))


def test_a_local_head_goes_on_from_where_its_client_left_it(recipe):
    experiment = build(recipe, method__head="local", client__dropout=0.0)
    first, second, stranger = (package.Job(n, c, 5, 3e-3) for n, c in ((1, 0), (2, 0), (2, 1)))
    assert same(experiment.kept.load(first), experiment.kept.start)
    experiment.train_client(experiment.params, first)
    kept = experiment.kept.load(second)
    assert not same(kept, experiment.kept.start)
    assert same(experiment.kept.load(first), experiment.kept.start), "round 1 again starts as it did"
    assert same(experiment.kept.load(stranger), experiment.kept.start)
    one = experiment.train_client(experiment.params, second)
    again = experiment.train_client(experiment.params, second)
    assert same(one.delta, again.delta), "a round that is run again finds what it found the first time"
    fresh, _ = experiment.trainer.train(
        experiment.params, experiment.train, experiment.parts[0], second, experiment.kept.start
    )
    assert not same(one.delta, fresh.delta), "the head that the client kept has no influence"


def test_of_many_local_heads_a_drawn_part_is_evaluated(recipe, monkeypatch):
    monkeypatch.setattr("federa.evaluation.MAX_CLIENTS_WITH_OWN_HEAD", 2)
    asked = []
    rows = Experiment.client_examples
    monkeypatch.setattr(
        Experiment, "client_examples", lambda self, client: (asked.append(client), rows(self, client))[1]
    )
    result = run(configure(recipe, method__head="local", rounds=1, client__max_steps=1))
    assert result.records[0]["clients_evaluated"] == 2
    assert len(set(asked)) == 2 and asked[:2] == asked[2:] == sorted(asked[:2])
    assert set(map(str, asked)) < set(result.records[0]["verdicts"])
    assert all(type(client) is int for client in asked)


def test_a_frozen_head_stays_as_drawn(recipe):
    config = configure(recipe, method__head="freeze", **FAST)
    result = run(config)
    assert not [n for n in result.state.params if n.startswith("classifier")]
    assert result.summary["head"] == "freeze"
    experiment, trained = build(recipe, method__head="freeze"), build(recipe)
    frozen = dict(experiment.trainer.model.named_parameters())
    before = frozen["classifier.weight"].clone()
    experiment.train_client(experiment.params, package.Job(1, 0, 5, 0.1))
    assert torch.equal(frozen["classifier.weight"], before)
    assert torch.equal(before, trained.params["classifier.weight"]), "all modes start from the same head"


# poison

POISON = {
    "nan": lambda d: {n: t * math.nan for n, t in d.items()},
    "inf": lambda d: {n: t + math.inf for n, t in d.items()},
    "norm": lambda d: {n: torch.full_like(t, 1e6) for n, t in d.items()},
    "shape": lambda d: {n: t[:1] for n, t in d.items()},
    "missing": lambda d: dict(list(d.items())[1:]),
    "extra": lambda d: {**d, "backdoor": torch.zeros(1)},
    "double": lambda d: {n: t.double() for n, t in d.items()},
}


def poisoned(monkeypatch, number, clients, change, weight=None):
    """Let the given places of a round's cohort send something else than what they trained."""
    train = Experiment.train_client

    def sends(self, params, job):
        update = train(self, params, job)
        cohort = make_jobs(self.config, number, [len(part) for part in self.parts])
        if job.round == number and job.client_id in [cohort[place].client_id for place in clients]:
            return Update(
                job, change(update.delta), update.weight if weight is None else weight, update.metrics
            )
        return update

    monkeypatch.setattr(Experiment, "train_client", sends)


SERIAL, TWO = {"name": "serial", "threads": 1}, {"name": "processes", "workers": 2, "threads": 1}


@pytest.mark.parametrize(
    ("kind", "engine"),
    [*((kind, SERIAL) for kind in POISON), *((kind, TWO) for kind in ("nan", "norm", "shape", "missing"))],
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
def test_a_poisoned_client_is_named_and_the_run_goes_on(recipe, tmp_path, monkeypatch, kind, engine):
    config = configure(recipe, **FAST, engine=engine)
    poisoned(monkeypatch, 2, [1], POISON[kind])
    result = run(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sizes = json.loads((tmp_path / "run" / "partition.json").read_text())["client_sizes"]
    victim = str(make_jobs(config, 2, sizes)[1].client_id)
    assert [(r["clients"], r["rejected"]) for r in records] == [(3, 0), (2, 1), (3, 0)]
    wrong = {c: v for c, v in records[1]["verdicts"].items() if v != "ok"}
    assert set(wrong) == {victim}
    reason = {"shape": "wrong shape", "missing": "wrong keys", "extra": "wrong keys", "double": "wrong dtype"}
    assert wrong[victim].startswith(reason.get(kind, "norm" if kind == "norm" else "not finite"))
    assert all(torch.isfinite(t).all() for t in result.state.params.values())
    assert records[1]["bytes_up"] == records[0]["bytes_up"], "it was sent, though it did not count"


def test_a_run_without_the_poisoned_client_is_the_same_to_the_bit(recipe, monkeypatch):
    """As if the client had never answered: the engine leaves its job out."""
    config = configure(recipe, **FAST)
    with monkeypatch.context() as patch:
        poisoned(patch, 2, [1], POISON["nan"])
        result = run(config)
    finish = loop.finish_round

    def without(config, state, jobs, updates, sizes):
        kept = (u for i, u in enumerate(updates) if (state.round, i) != (1, 1))
        return finish(config, state, jobs, kept, sizes)

    monkeypatch.setattr(loop, "finish_round", without)
    assert same(run(config).state.params, result.state.params)
    monkeypatch.undo()
    assert not same(run(config).state.params, result.state.params)


def test_a_failing_round_ends_the_run_and_keeps_the_round_before(recipe, tmp_path, monkeypatch, capsys):
    config = configure(recipe, **FAST, min_success=0.5)
    with monkeypatch.context() as patch:
        poisoned(patch, 2, [0, 2], POISON["nan"])
        with pytest.raises(RoundFailedError, match="round 2: 1 of 3 updates counted"):
            run(config, tmp_path / "run")
        (tmp_path / "recipe.yaml").write_text(config.to_yaml())
        assert federa("run", tmp_path / "recipe.yaml", "--out", tmp_path / "by hand", "--quiet") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("federa: round 2: 1 of 3 updates counted") and err.count("\n") == 1
    assert err.count("not finite") == 2
    for name in ("run", "by hand"):
        folder = tmp_path / name
        assert load_state(folder / "checkpoint" / "state.safetensors")[1]["round"] == "1"
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
        assert not (folder / "result.json").exists()
        result = run(None, folder, resume=True)  # the client has come to its senses
        assert same(result.state.params, run(config).state.params)


PLUGIN = '''
"""Somebody else's engine, which sends poison, and an aggregator that counts what it is given."""
from contextlib import contextmanager
from typing import Literal
import torch
from pydantic import Field
from federa.aggregators import AGGREGATORS, Aggregator
from federa.engines import ENGINES, Engine, Serial
from federa.types import Update

class Session:
    def __init__(self, inner, engine):
        self.inner, self.engine, self.predict = inner, engine, inner.predict

    def train(self, params, jobs):
        for place, update in enumerate(self.inner.train(params, jobs)):
            if update.job.round == self.engine.round and place in self.engine.places:
                yield Update(update.job, update.delta, self.engine.weight, update.metrics)
            else:
                yield update

@ENGINES.register
class Hostile(Engine):
    """Serial, but for a few weights."""
    name: Literal["hostile"] = "hostile"
    round: int = 2
    places: tuple[int, ...] = (0,)
    weight: float = -1.0

    @contextmanager
    def open(self, experiment):
        with Serial(threads=self.threads).open(experiment) as inner:
            yield Session(inner, self)

@AGGREGATORS.register
class Last(Aggregator):
    """Takes the last update, whatever the others say."""
    name: Literal["last"] = "last"

    def init(self, params):
        return []

    def accumulate(self, accumulator, update):
        return [update.delta, *accumulator]

    def finish(self, accumulator):
        assert all(torch.isfinite(t).all() for delta in accumulator for t in delta.values())
        return accumulator[0]
'''


def test_plugins_from_one_file_run_and_are_checked_like_our_own(recipe, tmp_path, capsys):
    (tmp_path / "hostile.py").write_text(PLUGIN)
    (tmp_path / "recipe.yaml").write_text(configure(recipe, **FAST).to_yaml())
    common = [
        "run",
        tmp_path / "recipe.yaml",
        "plugins=[hostile.py]",
        "engine.name=hostile",
        "aggregator.name=last",
    ]
    assert federa(*common, "engine.weight=0", "--out", tmp_path / "a", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
    assert [r["rejected"] for r in records] == [0, 1, 0]
    assert sorted(records[1]["verdicts"].values()) == ["ok", "ok", "weight 0.0 is not a positive number"]
    experiment = build(recipe, **FAST)
    last = make_jobs(experiment.config, 1, [len(p) for p in experiment.parts])[-1]
    delta = experiment.train_client(experiment.params, last).delta
    one = run(package.load_config(tmp_path / "a" / "config.yaml").replace(rounds=1))
    assert same(one.state.params, {n: p + delta[n] for n, p in experiment.params.items()})

    refused = [*common, "engine.places=[0,1,2]", "engine.weight=1e9", "--out", tmp_path / "b", "--quiet"]
    assert federa(*refused) == 1
    err = capsys.readouterr().err
    assert "0 of 3 updates counted" in err and "weight 1e+09 exceeds the client's" in err
    assert load_state(tmp_path / "b" / "checkpoint" / "state.safetensors")[1]["round"] == "1"
    assert federa("run", "--resume", "--out", tmp_path / "b", "--quiet") == 1, "config.yaml names the plugin"


def test_a_client_that_fails_ends_the_run_with_one_line(recipe, tmp_path, monkeypatch, capsys):
    train = Experiment.train_client

    def fails(self, params, job):
        return train(
            self, {**params, "classifier.weight": torch.zeros(2, 2)} if job.round == 2 else params, job
        )

    config = configure(recipe, **FAST)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    for engine in ("serial", "processes"):
        arguments = [tmp_path / "recipe.yaml", f"engine.name={engine}", "--out", tmp_path / engine, "--quiet"]
        with monkeypatch.context() as patch:
            patch.setattr(Experiment, "train_client", fails)
            assert federa("run", *arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("federa: round 2: client ") and err.count("\n") == 1
        assert "must match" in err
        assert same(run(None, tmp_path / engine, resume=True).state.params, run(config).state.params)


# mistakes


def test_a_mistake_leaves_no_trace(recipe, tmp_path):
    bad = configure(recipe, method__rank=33)
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for folder in ("new", "deep/er/still", "empty"):
        with pytest.raises(FederaError, match=r"method.rank: 33 is larger"):
            run(bad, tmp_path / folder)
        assert tree(tmp_path) == before
    good = configure(recipe, **FAST)
    (tmp_path / "empty" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    before = tree(tmp_path)
    for folder in ("empty", "file"):
        for resume in (False, True):
            with pytest.raises(
                FederaError, match=r"is there already and is not an empty directory; give another$"
            ):
                run(good, tmp_path / folder, resume=resume)
    assert tree(tmp_path) == before


def test_a_started_run_is_not_started_again(recipe, tmp_path):
    config = configure(recipe, **{**FAST, "rounds": 1})
    run(config, tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(FederaError, match="--resume to go on"):
        run(config, tmp_path / "run")
    assert tree(tmp_path) == before


def test_a_resume_on_other_data_is_refused(recipe, train_csv, tmp_path):
    own = tmp_path / "train.csv"
    own.write_text(train_csv.read_text())
    config = configure(recipe, **FAST, data__train=str(own))
    run(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    lines = own.read_text().splitlines()
    own.write_text("\n".join([lines[0], *lines[2:], lines[1]]) + "\n")  # the same rows, in another order
    with pytest.raises(FederaError, match="the data are not those"):
        run(out=tmp_path / "run", resume=True)
    own.write_text(train_csv.read_text())
    assert run(out=tmp_path / "run", resume=True).state.round == 3


def test_a_recipe_means_the_same_from_anywhere(recipe, train_csv, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text(train_csv.read_text())
    raw = {**recipe, "data": {"train": "data/train.csv"}}
    monkeypatch.chdir(tmp_path)
    run(package.RunConfig.model_validate({**raw, "plugins": ()}), tmp_path / "run")
    monkeypatch.chdir("/")
    (tmp_path / "run" / "result.json").unlink()
    assert run(out=tmp_path / "run", resume=True).state.round == 3
    assert list(package.load(tmp_path / "run").predict(["goal team"]))


def test_a_weight_above_the_clients_examples_is_rejected(recipe, monkeypatch):
    config = configure(recipe, **FAST)
    experiment = build(recipe, **FAST)
    first = make_jobs(config, 1, [len(part) for part in experiment.parts])[0]
    with monkeypatch.context() as patch:
        poisoned(patch, 1, [0], lambda delta: delta, weight=float(len(experiment.parts[first.client_id]) + 1))
        record = run(config).records[0]
    assert "exceeds the client's" in record["verdicts"][str(first.client_id)] and record["rejected"] == 1
