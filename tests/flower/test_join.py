"""When a node's SuperNode is started again: not before the server can be spoken to, and ever later if it refuses."""

import subprocess
import sys

import pytest

from federa.flower import join


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
    """A server that is out of reach for some looks."""

    def __init__(self, away=0):
        self.away = away

    def trouble(self):
        self.away -= 1
        return "no connection to there" if self.away >= 0 else None


@pytest.fixture()
def watch(tmp_path, monkeypatch):
    """Return a function that watches a SuperNode which ends at once, and gives waits, starts and lines."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def watched(server, waits, lived=0.0):
        clock, starts, told = iter(range(10**6)), [], []
        monkeypatch.setattr(join, "start", lambda *words: starts.append(words) or ended)
        monkeypatch.setattr(join.time, "monotonic", lambda: next(clock) * lived)
        keeper = join._Keeper(server, [], 0, tmp_path, told.append)
        (tmp_path / "supernode.log").write_text("Starting Flower SuperNode\n[code: 2004]\n")
        keeper._process, keeper._over = ended, Hours(waits)
        keeper._watch()
        return [s for s in keeper._over.waited if s != 1.0], len(starts), told

    return watched


def test_who_is_turned_away_asks_less_and_less_often(watch):
    waits, starts, told = watch(Server(), 14)
    assert waits == [3, 6, 12, 24, 48, 60, 60] and starts == 6
    assert told[1] == f"{join.MEANINGS['[code: 2004]']}; the SuperNode is started again in 6 s"


def test_who_had_work_asks_soon(watch):
    assert watch(Server(), 8, lived=61.0)[0] == [3, 3, 3, 3]


def test_no_supernode_is_started_while_the_server_is_out_of_reach(watch):
    waits, starts, told = watch(Server(away=5), 8)
    assert waits == [3, 3, 3, 3, 3, 3] and starts == 1
    assert told[0] == "no connection to there; the SuperNode is started again when that is over"
    assert "in 3 s" in told[1] and len(told) == 2
