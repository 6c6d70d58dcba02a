"""Several workers: the same bits as one, whatever happens to them, and nothing left behind."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from federa import run
from federa.engines import Processes, Serial, base, processes
from federa.engines.processes import MAX_DEATHS, ProcessesSession, SharedState
from federa.experiment import Experiment
from federa.run import Observer
from federa.server import OK, verdict
from federa.types import FederaError, RoundFailedError, Update
from running import (
    alive,
    build,
    check_equal,
    configure,
    die,
    forked,
    jobs_of,
    kept_bytes,
    play_on,
    same,
    steady,
)

pytestmark = pytest.mark.timeout(120)  # a worker that is waited for in vain


@pytest.fixture(autouse=True)
def _cores(monkeypatch):
    """As if there were four cores: more workers than cores are slow, not wrong."""
    monkeypatch.setattr(base, "available_cores", lambda: 4)
    monkeypatch.setattr(processes, "available_cores", lambda: 4)
    yield
    assert multiprocessing.active_children() == [], "a worker was left behind"


@pytest.mark.parametrize(("precision", "workers"), [("fp32", (1, 3)), ("bf16", (2,))])
@pytest.mark.parametrize("method", ["federa", "lora", "adapter", "bitfit", "ft"])
def test_same_bits_as_serial(recipe, method, precision, workers):
    few = {"client__max_steps": 3, "evaluate_batch_size": 8}
    experiment = build(recipe, method__name=method, client__precision=precision, **few)
    expected = play_on(experiment, Serial(threads=1))
    assert set(expected[1][1][2].values()) == {OK}
    for number in workers:
        check_equal(play_on(experiment, Processes(workers=number)), expected)


def test_a_whole_run_is_the_same_and_the_number_of_the_parents_threads_does_not_matter(recipe, tmp_path):
    results = []
    for engine, threads in (({"name": "serial", "threads": 1}, 1), ({"name": "processes", "workers": 2}, 2)):
        torch.set_num_threads(threads)  # as in a fresh process, where torch takes all cores
        result = run(configure(recipe, rounds=2, engine=engine), tmp_path / engine["name"])
        results.append(result)
    serial, parallel = results
    assert same(serial.state.params, parallel.state.params)
    assert steady(serial.records) == steady(parallel.records)
    assert serial.summary["per_client"] == parallel.summary["per_client"]
    one, other = (r.folder / "checkpoint" / "state.safetensors" for r in results)
    assert one.read_bytes() == other.read_bytes()


def test_heads_that_clients_keep_are_the_same(recipe, tmp_path):
    changes = {"method__head": "local", "rounds": 2}
    one = run(configure(recipe, **changes), tmp_path / "serial")
    other = run(
        configure(recipe, **changes, engine={"name": "processes", "workers": 2}), tmp_path / "processes"
    )
    assert same(one.state.params, other.state.params)
    assert steady(one.records) == steady(other.records)
    assert one.summary["per_client"] == other.summary["per_client"]
    kept = [kept_bytes(tmp_path / engine) for engine in ("serial", "processes")]
    assert kept[0] == kept[1] and kept[0]


def test_a_method_of_which_nothing_travels(recipe):
    """A probe whose head every client keeps: deltas of no tensor at all."""
    experiment = build(recipe, method={"name": "probe", "head": "local"})
    assert experiment.params == {}
    check_equal(
        play_on(experiment, Processes(workers=2)),
        play_on(build(recipe, method={"name": "probe", "head": "local"}), Serial()),
    )


# workers that die


def once(flag, action):
    """Return an action that only the first process that comes by does."""

    def act():
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        action()

    return act


@pytest.mark.parametrize(
    "moment", ["before training", "inside the delta", "after the delta", "before the answer"]
)
def test_a_worker_killed_in_the_middle_of_a_round_is_replaced(recipe, tmp_path, monkeypatch, moment):
    experiment = build(recipe, client__max_steps=3)
    expected = play_on(experiment, Serial(threads=1))
    victim = jobs_of(experiment, 2)[1].client_id
    kill, parent = once(tmp_path / "flag", die), os.getpid()
    train, write, answer = Experiment.train_client, SharedState.write, ProcessesSession._answer

    def killing_train(self, params, job):
        if moment == "before training" and (job.round, job.client_id) == (2, victim):
            kill()
        return train(self, params, job)

    def killing_write(self, state):
        if os.getpid() != parent and moment == "inside the delta":
            next(iter(self.views().values())).fill_(1e9)
            kill()
        write(self, state)
        if os.getpid() != parent and moment == "after the delta":
            kill()

    def killing_answer(self, request):
        parts = answer(self, request)
        if moment == "before the answer" and request.get("job", {}).get("round") == 2:
            kill()
        return parts

    monkeypatch.setattr(Experiment, "train_client", killing_train)
    monkeypatch.setattr(SharedState, "write", killing_write)
    monkeypatch.setattr(ProcessesSession, "_answer", killing_answer)
    check_equal(play_on(experiment, Processes(workers=2)), expected)
    assert (tmp_path / "flag").exists(), "nobody was killed"


def test_workers_killed_from_outside_between_and_during_rounds(recipe):
    """All of them, again and again, as the kernel's out-of-memory killer would."""

    class Killer(Observer):
        kills = 0

        def _kill(self):
            workers = multiprocessing.active_children()
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
                self.kills += 1
            return workers

        def finished_round(self, record):
            for worker in self._kill():
                worker.join()  # dead while idle, and known to be before the next job

        def updated(self, update, of):
            if update.job.round == 2:
                self._kill()

    plain = run(configure(recipe))
    for workers in (1, 2):
        killer = Killer()
        result = run(configure(recipe, engine={"name": "processes", "workers": workers}), observer=killer)
        assert same(result.state.params, plain.state.params)
        assert steady(result.records) == steady(plain.records)
        assert killer.kills >= 4 * workers


def test_a_job_that_kills_every_worker_fails_cleanly(recipe, tmp_path, monkeypatch):
    config = configure(recipe, engine={"name": "processes", "workers": 2})
    experiment = build(recipe)
    victim = jobs_of(experiment, 2)[0].client_id
    train, deaths = Experiment.train_client, tmp_path / "deaths"

    def killing(self, params, job):
        if (job.round, job.client_id) == (2, victim):
            with deaths.open("a") as file:
                file.write("x")
            die()
        return train(self, params, job)

    monkeypatch.setattr(Experiment, "train_client", killing)
    with pytest.raises(RoundFailedError) as raised:
        run(config, tmp_path / "run")
    assert f"round 2: client {victim}: {MAX_DEATHS} workers died on it" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(deaths.read_text()) == MAX_DEATHS == 3
    assert multiprocessing.active_children() == []
    monkeypatch.undo()
    assert [r["round"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())] == [1]


def test_an_evaluation_that_kills_every_worker_fails_cleanly(recipe, monkeypatch):
    experiment = build(recipe)
    monkeypatch.setattr(Experiment, "predict", lambda *args: die())
    with (
        pytest.raises(RoundFailedError, match="evaluation: 3 workers died"),
        Processes(workers=2).open(experiment) as s,
    ):
        next(s.predict(experiment.params, experiment.batches(np.arange(30))))


def parent_that_dies(experiment, folder, *, busy):
    """Open workers, say who they are, and die: with all of them at work, or with all of them idle."""
    with Processes(workers=2).open(experiment) as session:
        updates = session.train(experiment.params, jobs_of(experiment))
        next(updates)
        if not busy:
            list(updates)
        pids = [worker.pid for worker in multiprocessing.active_children()]
        (folder / "pids").write_text(json.dumps(pids))
        die()


@pytest.mark.parametrize("prctl", [True, False], ids=["prctl", "pipes alone"])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_workers_do_not_outlive_a_killed_parent(recipe, tmp_path, monkeypatch, prctl, busy):
    experiment = build(recipe)
    if not prctl:
        monkeypatch.setattr(processes, "die_with_parent", lambda: None)
    assert forked(lambda: parent_that_dies(experiment, tmp_path, busy=busy)) == signal.SIGKILL
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, pids))


@pytest.mark.parametrize("fate", ["hangs", "dies"])
def test_a_worker_that_does_not_come_up_is_forked_anew(recipe, tmp_path, monkeypatch, fate):
    experiment, serve = build(recipe), ProcessesSession._serve
    jobs = jobs_of(experiment)
    with Serial(threads=1).open(experiment) as session:
        expected = list(session.train(experiment.params, jobs))

    def doomed(self, pipe):
        try:
            (tmp_path / "doomed").touch(exist_ok=False)
        except FileExistsError:
            serve(self, pipe)
        die() if fate == "dies" else time.sleep(100)

    monkeypatch.setattr(ProcessesSession, "_serve", doomed)
    monkeypatch.setattr(processes, "START_SECONDS", 3.0)
    with Processes(workers=2).open(experiment) as session:
        assert (tmp_path / "doomed").exists()
        updates = list(session.train(experiment.params, jobs))
    assert all(same(u.delta, e.delta) for u, e in zip(updates, expected, strict=True))


def test_workers_that_never_come_up_are_an_error(recipe, monkeypatch):
    monkeypatch.setattr(ProcessesSession, "_serve", lambda self, pipe: time.sleep(100))
    monkeypatch.setattr(processes, "START_SECONDS", 0.3)
    with pytest.raises(RoundFailedError, match="3 workers, one after the other, did not start"):
        Processes(workers=2).open(build(recipe)).__enter__()


def test_a_fork_that_is_refused_leaves_no_worker_behind(recipe, monkeypatch):
    fork, forks = ProcessesSession._fork, []

    def refused(self):
        if forks:
            raise BlockingIOError("no more processes")
        forks.append(fork(self))
        return forks[0]

    monkeypatch.setattr(ProcessesSession, "_fork", refused)
    with pytest.raises(BlockingIOError):
        Processes(workers=2).open(build(recipe)).__enter__()
    assert not alive(forks[0].process.pid)


def test_updates_name_their_tensors_in_the_order_of_serial(recipe):
    """The last bits of a norm know it."""
    experiment = build(recipe, method__name="ft")
    orders = []
    for engine in (Serial(threads=1), Processes(workers=2)):
        with engine.open(experiment) as session:
            orders.append([list(u.delta) for u in session.train(experiment.params, jobs_of(experiment))])
    assert orders[0] == orders[1]


# mistakes and abandonment


def test_what_a_client_raises_comes_out_in_the_parent(recipe, monkeypatch):
    experiment = build(recipe)
    victim = jobs_of(experiment)[1].client_id
    train = Experiment.train_client

    def failing(self, params, job):
        if job.client_id == victim:
            raise error
        return train(self, params, job)

    monkeypatch.setattr(Experiment, "train_client", failing)
    for error, kind in (
        (FederaError("a mistake of yours"), FederaError),
        (KeyError("a bug of ours"), RuntimeError),
    ):
        with (
            pytest.raises(kind, match=r"a (mistake|bug) of"),
            Processes(workers=2).open(experiment) as session,
        ):
            list(session.train(experiment.params, jobs_of(experiment)))
        assert multiprocessing.active_children() == []


def test_an_abandoned_round_leaves_nothing_to_the_next(recipe):
    experiment = build(recipe)
    jobs = jobs_of(experiment)
    with Serial(threads=1).open(experiment) as session:
        expected = list(session.train(experiment.params, jobs))
    other = {name: p + 1.0 for name, p in experiment.params.items()}
    with Processes(workers=2).open(experiment) as session:
        next(session.train(other, jobs))
        updates = list(session.train(experiment.params, jobs))
    assert all(same(u.delta, e.delta) for u, e in zip(updates, expected, strict=True))


def test_no_worker_waits_while_an_update_is_made_use_of(recipe, monkeypatch):
    train = Experiment.train_client

    def slowly(self, params, job):  # or one worker has done the rest while the other is at its first
        time.sleep(0.2 if job.client_id != first else 0.0)
        return train(self, params, job)

    monkeypatch.setattr(Experiment, "train_client", slowly)
    experiment = build(recipe, cohort=6)
    first = jobs_of(experiment)[0].client_id
    with Processes(workers=2).open(experiment) as session:
        updates = session.train(experiment.params, jobs_of(experiment))
        next(updates)
        assert all(worker.busy is not None for worker in session._workers)
        assert len(list(updates)) == 5


def test_updates_are_fresh_and_workers_run_ahead_by_a_bounded_number(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "BUFFER_BYTES", 0)  # room for one update more than there are workers
    experiment = build(recipe, cohort=6)
    train = Experiment.train_client

    def noting(self, params, job):
        update = train(self, params, job)
        (tmp_path / str(job.client_id)).touch()
        return update

    monkeypatch.setattr(Experiment, "train_client", noting)
    jobs = jobs_of(experiment)
    with Processes(workers=2).open(experiment) as session:
        updates = session.train(experiment.params, jobs)
        first = next(updates)
        kept = {name: t.clone() for name, t in first.delta.items()}
        time.sleep(0.3)
        assert len(list(tmp_path.iterdir())) <= 3, "more than the slots hold"
        rest = list(updates)
    assert same(first.delta, kept)
    assert [u.job for u in (first, *rest)] == jobs
    assert len(list(tmp_path.iterdir())) == 6


def test_an_update_of_any_form_reaches_the_server_as_it_is(recipe, monkeypatch):
    """Shared memory would cast and broadcast; the verdict must be that on what the client sent."""
    experiment = build(recipe)
    jobs = jobs_of(experiment)
    ways = {
        jobs[0].client_id: lambda d: {**d, "classifier.weight": torch.zeros(1)},
        jobs[1].client_id: lambda d: {**d, "classifier.bias": d["classifier.bias"].double()},
        jobs[2].client_id: lambda d: {n: t for n, t in d.items() if n != "classifier.bias"},
    }
    train = Experiment.train_client

    def odd(self, params, job):
        update = train(self, params, job)
        return Update(update.job, ways[job.client_id](update.delta), update.weight, update.metrics)

    monkeypatch.setattr(Experiment, "train_client", odd)
    with Serial(threads=1).open(experiment) as session:
        expected = [verdict(u, experiment.params, 1e4) for u in session.train(experiment.params, jobs)]
    assert [text.split(" (")[0] for text in expected] == ["wrong shape", "wrong dtype", "wrong keys"]
    with Processes(workers=2).open(experiment) as session:
        assert [
            verdict(u, experiment.params, 1e4) for u in session.train(experiment.params, jobs)
        ] == expected


# cores and threads


def test_more_workers_and_threads_than_cores_are_refused(recipe, tmp_path):
    for engine in ({"workers": 5}, {"workers": 2, "threads": 3}, {"workers": 1, "threads": 5}):
        with pytest.raises(FederaError, match="need more than the 4 cores"):
            run(configure(recipe, engine={"name": "processes", **engine}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_default_is_one_worker_of_one_thread_a_core(recipe, monkeypatch):
    started = []
    fork = ProcessesSession._fork
    monkeypatch.setattr(
        ProcessesSession, "_fork", lambda self: (started.append(self._threads), fork(self))[1]
    )
    with Processes().open(build(recipe)):
        assert started == [1, 1, 1, 1]
        assert len(multiprocessing.active_children()) == 4


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_worker_of_two_threads_after_the_parent_has_used_its_own(recipe):
    """OpenMP's helpers do not survive a fork: the forked thread would wait for them for ever."""
    experiment = build(recipe, cohort=2)
    torch.set_num_threads(2)
    big = torch.randn(700, 700)
    (big @ big).tanh().sum()
    assert len(os.listdir("/proc/self/task")) > 1
    expected = play_on(experiment, Serial(threads=2), rounds=1)
    check_equal(play_on(experiment, Processes(workers=1, threads=2), rounds=1), expected)
