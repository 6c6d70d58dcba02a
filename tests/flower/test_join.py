"""When a node's SuperNode is started again: soon after the server is back, and ever later where it is in vain."""

import itertools
import subprocess
import sys
import threading

import pytest

from federa.flower import join
from federa.machine import die_with_parent

UNKNOWN, THERE = "terminated gracefully", "[code: 2004]"


class Hours:
    """An event that nobody waits for: it writes the waits down, and is set after some of them."""

    def __init__(self, waits):
        self.left, self.waited = waits, []

    def wait(self, seconds):
        self.waited.append(seconds)
        return self.is_set()

    def is_set(self):
        return len(self.waited) >= self.left


class Server:
    """A server of which one look after the other says something; then nothing keeps anybody from it."""

    def __init__(self, *looks):
        self.looks = list(looks)

    def trouble(self):
        return self.looks.pop(0) if self.looks else None


@pytest.fixture()
def watch(tmp_path, monkeypatch):
    """Return a function that watches a SuperNode which ends at once, and gives its starts and the lines.

    A start is the number of looks' waits since the one before.
    """
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def watched(server, waits, lived=0.0, word=UNKNOWN):
        clock, starts, told = itertools.count(), [], []
        over = Hours(waits)
        monkeypatch.setattr(join, "start", lambda *_: starts.append(over.waited.count(3.0)) or ended)
        monkeypatch.setattr(join.time, "monotonic", lambda: next(clock) * lived)
        keeper = join._Keeper(server, [], 0, tmp_path, told.append)
        (tmp_path / "supernode.log").write_text(f"Starting Flower SuperNode\n{word}\n")
        keeper._process, keeper._over = ended, over
        keeper._watch()
        return [after - before for before, after in itertools.pairwise([0, *starts])], told

    return watched


def test_who_is_turned_away_asks_less_and_less_often(watch):
    starts, told = watch(Server(), 80)
    assert starts[:6] == [1, 2, 4, 8, 16, 20] and set(starts[5:]) == {20}
    assert told[1] == f"{join.MEANINGS[UNKNOWN]}; the SuperNode is started again in 6 s, or when this is over"


def test_who_had_work_asks_soon_and_so_does_who_is_taken_to_be_there(watch):
    assert set(watch(Server(), 20, lived=61.0)[0]) == {1}
    assert set(watch(Server(), 20, word=THERE)[0]) == {1}


def test_a_supernode_is_started_when_the_server_is_back(watch):
    looks = [
        None,
        None,
        None,
        None,
        None,
        "away",
        "away",
        "another CA",
        "another CA",
    ]  # turned away twice before
    starts, told = watch(Server(*looks), 30)
    assert starts[:4] == [1, 2, 4, 1], "two waits, then four looks until it is back, and then it asks soon"
    assert told[2].startswith("away; ") and told[3] == "another CA" and "in 3 s" in told[4]


def test_an_outage_within_a_wait_is_noticed(watch):
    looks = [*[None] * 7, "away"]  # at the second of the third wait's four looks
    starts, told = watch(Server(*looks), 30)
    assert starts[:4] == [1, 2, 3, 1] and told[3] == "away"


def test_whom_only_a_proxy_reaches_is_started_all_the_same(watch):
    assert watch(Server(*["no connection"] * 90), 70)[0][:2] == [20, 20]


def test_it_is_ended_gently_though_another_thread_has_started_it(tmp_path, monkeypatch):
    """The kernel kills what a thread has started when that thread ends."""
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
    started, ready = [], threading.Event()

    def start(*_):
        code = "" if not started else script
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, preexec_fn=die_with_parent
        )
        process.stdout.readline()
        started.append(process)
        if len(started) == 2:
            ready.set()
        return process

    monkeypatch.setattr(join, "start", start)
    monkeypatch.setattr(join, "await_port", lambda *_: None)
    monkeypatch.setattr(join, "RESTART_SECONDS", 0.05)
    (tmp_path / "supernode.log").write_text("")
    keeper = join._Keeper(Server(), [], 0, tmp_path, lambda line: None)
    keeper.start()
    assert ready.wait(60)
    keeper.stop()
    assert started[1].wait(30) == 7
    assert not keeper._thread.is_alive()
