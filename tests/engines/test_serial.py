"""The reference engine, and how engines share the cores of a machine."""

import multiprocessing

import pytest
import torch

from federa import run
from federa.config import RunConfig
from federa.engines import ENGINES, Serial, base
from federa.engines.base import available_cores, keep_freed_memory, share_cores
from federa.engines.serial import SerialSession
from federa.types import FederaError, RoundFailedError
from running import build, configure, jobs_of, same, steady


def test_one_update_a_job_in_the_order_of_the_jobs(recipe):
    experiment = build(recipe)
    jobs = jobs_of(experiment)
    with Serial(threads=1).open(experiment) as session:
        forth = list(session.train(experiment.params, jobs))
        back = list(session.train(experiment.params, jobs[::-1]))
    assert [u.job for u in forth] == jobs and [u.job for u in back] == jobs[::-1]
    for one, other in zip(forth, back[::-1], strict=True):
        assert same(one.delta, other.delta) and one.weight == other.weight == len(
            experiment.parts[one.job.client_id]
        )
    assert multiprocessing.active_children() == []


def test_clients_run_only_when_their_update_is_asked_for(recipe, monkeypatch):
    experiment, ran = build(recipe), []
    original = type(experiment).train_client
    monkeypatch.setattr(
        type(experiment),
        "train_client",
        lambda self, params, job: (ran.append(job.client_id), original(self, params, job))[1],
    )
    jobs = jobs_of(experiment)
    with Serial(threads=1).open(experiment) as session:
        updates = session.train(experiment.params, jobs)
        assert ran == []
        next(updates)
        assert ran == [jobs[0].client_id]


def test_a_client_that_fails_is_named_with_its_round(recipe):
    experiment = build(recipe)
    jobs = jobs_of(experiment, 3)
    broken = {**experiment.params, "classifier.weight": torch.zeros(2, 2)}
    with Serial(threads=1).open(experiment) as session, pytest.raises(RoundFailedError) as raised:
        next(session.train(broken, jobs))
    assert f"round 3: client {jobs[0].client_id} failed: RuntimeError: " in str(raised.value)


def test_threads_are_set(recipe, monkeypatch):
    monkeypatch.setattr(base, "available_cores", lambda: 4)
    experiment = build(recipe)
    for asked, given in ((1, 1), (3, 3), (None, 4)):
        with Serial(threads=asked).open(experiment):
            assert torch.get_num_threads() == given
    torch.set_num_threads(1)


def test_cores_are_shared_and_never_more_than_there_are(monkeypatch):
    assert available_cores() >= 1
    monkeypatch.setattr(base, "available_cores", lambda: 8)
    assert [share_cores(n, None) for n in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert share_cores(4, 2) == 2
    for workers, threads in ((9, None), (3, 3), (1, 9)):
        with pytest.raises(FederaError, match="8 cores of this machine; lower engine"):
            share_cores(workers, threads)


def test_keeping_freed_memory_is_harmless_anywhere(monkeypatch):
    keep_freed_memory()
    monkeypatch.setattr(base.sys, "platform", "darwin")
    keep_freed_memory()


def test_engines_are_registered_and_serial_is_the_default():
    assert {"processes", "serial"} <= set(ENGINES.names())
    assert RunConfig().engine == Serial(threads=None)


def test_the_order_in_which_clients_run_does_not_matter_to_the_bit(recipe, monkeypatch):
    """A whole run whose clients train last job first; updates come in job order, as an engine must give them."""
    plain = run(configure(recipe))

    def backwards(self, params, jobs):
        updates = [self._experiment.train_client(params, job) for job in reversed(jobs)]
        yield from reversed(updates)

    monkeypatch.setattr(SerialSession, "train", backwards)
    other = run(configure(recipe))
    assert same(other.state.params, plain.state.params)
    assert steady(other.records) == steady(plain.records)
