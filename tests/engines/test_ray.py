"""Workers on a Ray cluster: the same bits as serial, whatever happens to them, and nothing left behind."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from federa import run
from federa.engines import Ray, Serial
from federa.engines import ray as engine
from federa.experiment import build_experiment
from federa.server import OK, verdict
from federa.types import FederaError, RoundFailedError
from running import (
    alive,
    build,
    check_equal,
    configure,
    jobs_of,
    kept_bytes,
    play,
    play_on,
    same,
    short_reports,
    steady,
)
from small import small_recipe

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
)

os.environ.update(
    RAY_worker_niceness="0"
)  # Ray's own is 15: beside other tests its workers would get no core

# A recipe's plugin that does in a worker what a file of the folder `orders` asks for.
PLUGIN = """
import os, signal
from dataclasses import replace
from pathlib import Path

from federa.types import FederaError

orders = Path({orders!r})

def train_client(self, params, job, train):
    about = f"{{job.round}}-{{job.client_id}}"
    if (orders / f"die-{{about}}").exists():
        (orders / f"die-{{about}}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (orders / f"mistake-{{about}}").exists():
        raise FederaError("a mistake of yours")
    if (orders / f"bug-{{about}}").exists():
        raise KeyError("a bug of ours")
    update = train(self, params, job)
    if (orders / f"odd-{{about}}").exists():
        bias = update.delta["classifier.bias"].double()
        update = replace(update, delta={{**update.delta, "classifier.bias": bias}})
    (orders / f"done-{{about}}").touch()
    return update

if os.getpid() != {driver}:
    from federa.experiment import Experiment
    train = Experiment.train_client
    Experiment.train_client = lambda self, params, job: train_client(self, params, job, train)
    (orders / f"worker-{{os.getpid()}}").touch()
"""


def rays():
    """The processes of any Ray on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if any(mark in line for mark in (b"ray::", b"raylet", b"gcs_server", b"site-packages/ray/")):
            found.add(int(folder.name))
    return {pid for pid in found if alive(pid)}


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


# without ray, or without a cluster


def test_without_the_package_the_engine_is_named_and_asks_for_it(recipe, tmp_path):
    script = (
        "import sys; sys.modules['ray'] = None; from federa.cli import main; sys.argv[1:] = ['list']; main()"
    )
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "  ray            Workers on a Ray cluster" in listed


def test_a_run_without_the_package_says_what_to_install(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FederaError, match=r'needs its package: pip install "federa\[ray\]"$'):
        run(configure(recipe, engine="ray"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys(recipe):
    assert configure(recipe, engine="ray").engine == Ray(workers=None, threads=1, address=None)
    assert (
        configure(recipe, engine={"name": "ray", "address": "10.0.0.7:6379"}).engine.address
        == "10.0.0.7:6379"
    )
    for wrong in ("10.0.0.7", "ray://head:10001", "head:", ""):
        with pytest.raises(FederaError, match=r"engine\.address"):
            configure(recipe, engine={"name": "ray", "address": wrong})
    # What another engine's recipe carries over; what it leaves open is this one's default.
    moved = configure({**recipe, "engine": {"name": "serial", "threads": None}}, engine__name="ray")
    assert moved.engine.threads == 1


@needs_ray
@pytest.mark.parametrize("where", ["127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there(recipe, tmp_path, monkeypatch, where):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = rays()
    with pytest.raises(FederaError, match=f"no Ray answers at engine.address={where}: .*refused") as raised:
        run(configure(recipe, engine={"name": "ray", "address": where}), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    assert rays() <= before


@needs_ray
def test_more_than_this_machine_has_is_refused_before_anything_starts(recipe, monkeypatch):
    experiment = build(recipe)
    monkeypatch.setattr(engine, "_connect", lambda address: pytest.fail("it starts"))
    for fields in ({"workers": 10_000}, {"workers": 1, "threads": 10_000}, {"threads": 10_000}):
        with pytest.raises(FederaError, match="need more than the"), Ray(**fields).open(experiment):
            pass


# a Ray of its own


@needs_ray
@pytest.mark.timeout(300)
def test_a_whole_run_with_heads_that_clients_keep(recipe, tmp_path, monkeypatch):
    """Full fine-tuning, from the recipe to the report; afterwards nothing of Ray is left."""
    short_reports(monkeypatch)
    monkeypatch.setattr(engine, "available_cores", lambda: 2)
    monkeypatch.setattr("federa.engines.base.available_cores", lambda: 2)
    before = rays()
    changes = {"method": {"name": "ft", "head": "local"}, "rounds": 2, "client__max_steps": 3}
    one = run(configure(recipe, **changes), tmp_path / "serial")
    other = run(configure(recipe, **changes, engine={"name": "ray"}), tmp_path / "ray")
    assert same(one.state.params, other.state.params)
    assert steady(one.records) == steady(other.records)
    assert one.summary["per_client"] == other.summary["per_client"]
    kept = [kept_bytes(tmp_path / engine) for engine in ("serial", "ray")]
    assert kept[0] == kept[1] and kept[0]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert until(lambda: rays() <= before), "a process of Ray was left behind"


# two nodes


@needs_ray
@pytest.mark.timeout(300)
def test_a_node_that_is_lost_in_the_middle_of_a_round(recipe):
    """Its worker has no room elsewhere: the others do its job."""
    from ray.cluster_utils import Cluster

    experiment = build(recipe, method={"name": "adapter"}, client__max_steps=3)
    expected, before = play_on(experiment, Serial(threads=1)), rays()
    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 2,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other, nodes = cluster.add_node(num_cpus=1), []
        with Ray(address=cluster.address).open(experiment) as session:
            assert len(session._idle) == 2, "a worker a CPU"
            ask = session._hand_out

            def removing(requests, todo, wanted):
                ask(requests, todo, wanted)
                busy = [index for _, index, _ in session._owing.values() if index is not None]
                if session._version == 1 and len(busy) == 2 and not nodes:
                    nodes.append(other)
                    cluster.remove_node(other, allow_graceful=False)

            session._hand_out = removing
            got = play(experiment, session)
        assert nodes == [other]
        check_equal(got, expected)
    finally:
        cluster.shutdown()
    assert until(lambda: rays() <= before), "a process of Ray was left behind"


# workers on a Ray that this process is connected to


@pytest.fixture(scope="class")
def connected():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    assert ray.is_initialized(), "the connection is not the engine's"
    ray.shutdown()


@pytest.fixture(scope="class")
def orders(tmp_path_factory):
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="class")
def experiment(connected, orders, encoder, train_csv, test_csv):
    (orders / "faults.py").write_text(PLUGIN.format(orders=str(orders), driver=os.getpid()))
    recipe = small_recipe(encoder("bert"), train_csv, test_csv)
    return build(recipe, plugins=[str(orders / "faults.py")], client__max_steps=3, evaluate_batch_size=8)


@pytest.fixture(scope="class")
def session(experiment):
    with Ray(workers=2).open(experiment) as session:
        yield session


def workers(orders):
    return [pid for pid in (int(f.name.split("-")[1]) for f in orders.glob("worker-*")) if alive(pid)]


@needs_ray
@pytest.mark.timeout(300)
class TestWorkers:
    def test_same_bits_as_serial(self, experiment, session):
        expected = play_on(experiment, Serial(threads=1))
        assert set(expected[1][1][2].values()) == {OK}
        check_equal(play(experiment, session), expected)

    def test_killed_while_idle_and_in_the_middle_of_a_round(self, experiment, session, orders):
        expected = play_on(experiment, Serial(threads=1))
        first = workers(orders)
        assert len(first) == 2

        def kill_one():
            if not killed:
                killed.append(first[0])
                os.kill(first[0], signal.SIGKILL)

        killed = []
        victim = orders / f"die-2-{jobs_of(experiment, 2)[1].client_id}"
        victim.touch()
        check_equal(play(experiment, session, between=kill_one), expected)
        assert killed and not victim.exists()
        assert until(lambda: len(workers(orders)) == 2) and first[0] not in workers(orders)

    def test_an_abandoned_round_leaves_nothing_to_the_next(self, experiment, session):
        jobs = jobs_of(experiment)
        with Serial(threads=1).open(experiment) as serial:
            expected = list(serial.train(experiment.params, jobs))
        next(session.train({name: p + 1.0 for name, p in experiment.params.items()}, jobs))
        updates = list(session.train(experiment.params, jobs))
        for update, like in zip(updates, expected, strict=True):
            assert same(update.delta, like.delta) and update.weight == like.weight
            assert list(update.delta) == list(like.delta), "a norm adds in this order"

    def test_updates_are_fresh_and_workers_run_ahead_by_a_bounded_number(self, experiment, session, orders):
        for file in orders.glob("done-*"):
            file.unlink()
        jobs = (jobs_of(experiment) + jobs_of(experiment, 2) + jobs_of(experiment, 3))[:7]
        updates = session.train(experiment.params, jobs)
        first = next(updates)
        kept = {name: t.clone() for name, t in first.delta.items()}
        time.sleep(0.5)
        assert len(list(orders.glob("done-*"))) <= 3, "more than the buffer holds"
        rest = list(updates)
        assert same(first.delta, kept)
        assert [u.job for u in (first, *rest)] == jobs

    def test_an_update_of_any_form_reaches_the_server_as_it_is(self, experiment, session, orders):
        jobs = jobs_of(experiment)
        odd = orders / f"odd-1-{jobs[1].client_id}"
        odd.touch()
        verdicts = [verdict(u, experiment.params, 1e4) for u in session.train(experiment.params, jobs)]
        odd.unlink()
        assert verdicts[::2] == [OK, OK] and verdicts[1].startswith(
            "wrong dtype ('classifier.bias': torch.float64"
        )

    @pytest.mark.parametrize(("what", "kind"), [("mistake", FederaError), ("bug", RuntimeError)])
    def test_what_a_client_raises_comes_out_in_the_driver(self, experiment, session, orders, what, kind):
        jobs = jobs_of(experiment)
        order = orders / f"{what}-1-{jobs[1].client_id}"
        order.touch()
        with pytest.raises(kind, match=f"a {what} of"):
            list(session.train(experiment.params, jobs))
        order.unlink()
        assert len(list(session.train(experiment.params, jobs))) == 3

    def test_a_client_that_fails_is_named_with_its_round(self, experiment, session):
        jobs = jobs_of(experiment, 3)
        broken = {**experiment.params, "classifier.weight": torch.zeros(2, 2)}
        with pytest.raises(RoundFailedError, match=r"^round 3: client \d+ failed: RuntimeError: .* is kept$"):
            list(session.train(broken, jobs))

    def test_what_does_not_fit_on_the_cluster(self, experiment):
        for fields in ({"workers": 5}, {"workers": 2, "threads": 3}, {"threads": 5}):
            with pytest.raises(FederaError, match="do not fit on the 4 CPUs"), Ray(**fields).open(experiment):
                pass

    @pytest.mark.parametrize("how", ["gone", "changed"])
    def test_data_that_a_node_does_not_have(self, experiment, test_csv, tmp_path, how):
        copy = tmp_path / "copy.csv"
        copy.write_bytes(test_csv.read_bytes())
        other = build_experiment(experiment.config.replace(**{"data.test": str(copy), "plugins": []}))
        copy.unlink()
        if how == "changed":
            copy.write_bytes(test_csv.read_bytes().replace(b"the", b"a"))
        reason = r"data\.test: .*copy\.csv does not exist" if how == "gone" else "the data are not those"
        with (
            pytest.raises(FederaError, match=rf"^engine: node [\d.]+: {reason}[^\n]*$"),
            Ray(workers=1).open(other),
        ):
            pass

    def test_a_job_that_kills_every_worker_fails_cleanly(self, experiment, session, orders, monkeypatch):
        monkeypatch.setattr(engine, "MAX_DEATHS", 1)  # three would be waited for long
        jobs = jobs_of(experiment, 2)
        (orders / f"die-2-{jobs[0].client_id}").touch()
        with pytest.raises(
            RoundFailedError, match=f"^round 2: client {jobs[0].client_id}: 1 workers died on it"
        ):
            list(session.train(experiment.params, jobs))
