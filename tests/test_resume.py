"""`kill -9` at any moment, then `--resume`: the same bytes as a run that nobody interrupted."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from federa import run
from federa.checkpoint import RunDirectory
from federa.run import Observer
from federa.types import FederaError
from running import configure, die, federa, forked, kept_bytes, short_reports, steady, tree

FAST = {"cohort": 2, "client__max_steps": 2, "client__schedule": "cosine"}
OWN_HEADS = {"method__head": "local", "cohort": 4, "client__max_steps": 2}


@dataclass
class Disk:
    """Counts what a run does to its disk, and dies at one of these moments.

    Attributes:
        at: the call, the file's name, and which time; a dying `fsync` leaves half of what was to be written.
        log: all calls so far.
    """

    at: tuple[str, str, int] | None = None
    log: list[tuple[str, str, int]] = field(default_factory=list)

    def _note(self, call, path):
        name = Path(path).name.removeprefix(".")
        time_ = 1 + sum(entry[:2] == (call, name) for entry in self.log)
        self.log.append((call, name, time_))
        return self.log[-1] == self.at

    @contextlib.contextmanager
    def watched(self):
        fsync, replace = os.fsync, os.replace

        def watched_fsync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if self._note("fsync", path):
                if os.path.isfile(path):
                    size, line = os.path.getsize(path), Path(path).read_bytes().rstrip(b"\n").rfind(b"\n") + 1
                    os.truncate(path, (line + size) // 2 if path.endswith("jsonl") else size // 2)
                die()
            fsync(fd)

        def watched_replace(old, new):
            if self._note("replace", new):
                die()
            replace(old, new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", watched_fsync)
            patch.setattr(os, "replace", watched_replace)
            yield


class DiesAt(Observer):
    """Dies when a client of a round has answered."""

    def __init__(self, number, client):
        self.left, self.number = client, number

    def updated(self, update, of):
        self.left -= update.job.round == self.number
        if update.job.round == self.number and self.left == 0:
            die()


def outcome(folder):
    """All that must not depend on interruptions."""
    directory = RunDirectory(folder)
    result = {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if "seconds" not in k}
    assert result["target"] is None
    files = [
        "config.yaml",
        "init.safetensors",
        "checkpoint/state.safetensors",
        "partition.json",
        "labels.json",
    ]
    contents = {name: (folder / name).read_bytes() for name in files}
    contents |= kept_bytes(folder)
    assert directory.report.is_file() and directory.read_json("environment.json")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return contents, steady([json.loads(line) for line in lines]), result


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    short_reports(monkeypatch)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function from a config to the outcome of its uninterrupted run, and what that did to the disk."""
    done = {}

    def get(config):
        key = config.to_yaml()
        if key not in done:
            folder, disk = tmp_path_factory.mktemp("whole") / "run", Disk()
            with disk.watched():
                run(config, folder)
            done[key] = outcome(folder), disk.log
        return done[key]

    return get


def crash(config, folder, disk=None, observer=None, *, resume=False):
    """Run until the end that is set, in a process of its own."""

    def doomed():
        with (disk or Disk()).watched():
            run(config, folder, resume=resume, observer=observer)

    return forked(doomed)


POINTS = [
    ("fsync", "config.yaml.partial", 1),
    ("replace", "config.yaml", 1),
    ("replace", "environment.json", 1),
    ("replace", "partition.json", 1),
    ("fsync", "init.safetensors.partial", 1),
    ("replace", "init.safetensors", 1),
    ("replace", "metrics.jsonl", 1),
    ("fsync", "metrics.jsonl", 1),  # half of the first line
    ("fsync", "state.safetensors.partial", 1),  # half of the first checkpoint
    ("replace", "state.safetensors", 1),  # between the line and the checkpoint
    ("fsync", "checkpoint", 1),
    ("fsync", "metrics.jsonl", 2),
    ("fsync", "state.safetensors.partial", 2),
    ("replace", "state.safetensors", 2),
    ("replace", "state.safetensors", 3),
    ("fsync", "checkpoint", 3),  # after the last checkpoint
    ("fsync", "result.json.partial", 1),
    ("replace", "result.json", 1),
    ("replace", "report.html", 1),  # after the result, before the report
]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: "-".join(map(str, p)))
def test_killed_at_the_disk(recipe, tmp_path, uninterrupted, point):
    config = configure(recipe, **FAST)
    expected, log = uninterrupted(config)
    assert point in log, "the run never comes there"
    folder = tmp_path / "run"
    assert crash(config, folder, Disk(point)) == signal.SIGKILL
    assert not (folder / "report.html").exists()
    named = (folder / "config.yaml").exists()
    run(None if named else config, folder, resume=True)
    assert outcome(folder) == expected
    assert not list(folder.rglob("*.partial")), "a later write did not take the place of the broken one"


@pytest.mark.parametrize(("number", "client"), [(1, 1), (2, 1), (3, 2)])
def test_killed_while_clients_train(recipe, tmp_path, uninterrupted, number, client):
    config = configure(recipe, **FAST)
    assert crash(config, tmp_path / "run", observer=DiesAt(number, client)) == signal.SIGKILL
    run(None, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == uninterrupted(config)[0]


def test_killed_again_and_again(recipe, tmp_path, uninterrupted):
    """Every attempt dies at its 20th call to the disk, which is about four rounds further."""

    class Short(Disk):
        def _note(self, call, path):
            super()._note(call, path)
            return len(self.log) == 20

    config, folder, deaths = configure(recipe, **FAST, rounds=9), tmp_path / "run", 0
    while crash(config, folder, Short(), resume=True):
        deaths += 1
        assert deaths < 9
    assert deaths >= 3
    assert outcome(folder) == uninterrupted(config)[0]


def test_killed_after_the_end(recipe, tmp_path, uninterrupted):
    config, folder = configure(recipe, **FAST), tmp_path / "run"
    assert forked(lambda: (run(config, folder), die())) == signal.SIGKILL
    assert outcome(folder) == uninterrupted(config)[0]
    before = tree(folder)
    again = run(None, folder, resume=True)
    run(config, folder, resume=True)
    assert federa("run", "--resume", "--out", folder, "--quiet") == 0
    assert tree(folder) == before, "a finished run was changed"
    assert again.state.round == 3 and again.summary == json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("changes", "point"),
    [
        (OWN_HEADS, ("replace", "state.safetensors", 2)),
        (OWN_HEADS, DiesAt(2, 2)),
        (OWN_HEADS, DiesAt(3, 4)),
        ({**FAST, "server_optimizer": {"name": "adam", "lr": 0.1}}, ("replace", "state.safetensors", 2)),
        ({**FAST, "server_optimizer": {"name": "momentum"}, "target": 2.0}, ("fsync", "checkpoint", 1)),
        ({**FAST, "engine": {"name": "processes", "workers": 2}}, DiesAt(2, 1)),
    ],
    ids=["local-disk", "local-client", "local-last", "adam", "momentum", "processes"],
)
def test_what_else_a_run_remembers(recipe, tmp_path, uninterrupted, changes, point):
    config = configure(recipe, **changes)
    expected, _ = uninterrupted(config)
    disk = Disk(point) if isinstance(point, tuple) else None
    observer = point if isinstance(point, DiesAt) else None
    assert crash(config, tmp_path / "run", disk, observer) == signal.SIGKILL
    run(None, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == expected
    if "method__head" in changes:
        assert any(name.startswith("client-") for name in expected[0])


@pytest.mark.slow
def test_killed_at_a_random_moment_through_the_command_line(recipe, tmp_path):
    """Two real processes, killed at random; each may lose the round that it was in, and no more."""
    changes = {"rounds": 60, "cohort": 2, "client__max_steps": 1, "evaluate_every": 20}
    config = configure(recipe, **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    folder, whole = tmp_path / "run", tmp_path / "whole"
    metrics = folder / "metrics.jsonl"

    def lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    for arguments in ([tmp_path / "recipe.yaml"], ["--resume"]):
        had, until = lines(), time.monotonic() + 120
        command = [sys.executable, "-m", "federa.cli", "run", *arguments, "--out", folder, "--quiet"]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while lines() <= had and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(random.random() * 0.6)
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output.decode()
        assert output == b"", "--quiet prints nothing"
        assert had < lines() <= 60
    assert lines() < 60 or not (folder / "report.html").exists()
    assert federa("run", "--resume", "--out", folder, "--quiet") == 0
    run(config, whole)
    assert outcome(folder) == outcome(whole)


def test_a_run_that_was_not_started_starts_with_resume(recipe, tmp_path, uninterrupted):
    config = configure(recipe, **FAST)
    run(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == uninterrupted(config)[0]


def test_metrics_that_were_changed_by_hand_are_refused(recipe, tmp_path):
    config, folder = configure(recipe, **FAST), tmp_path / "run"
    crash(config, folder, Disk(("fsync", "metrics.jsonl", 3)))
    whole = (folder / "metrics.jsonl").read_text()
    first, second, half = whole.split("\n")
    assert half and not half.endswith("}")
    for text in (f"{second}\n", f"{first}\n", f"{second}\n{first}\n", f"{first}\nnot json\n{second}\n"):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(FederaError, match="changed by hand"):
            run(None, folder, resume=True)
    (folder / "metrics.jsonl").write_text(whole)
    assert run(None, folder, resume=True).state.round == 3
