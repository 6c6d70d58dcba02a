"""What the tests of runs share: a command line in this process, comparisons of runs, and forked crashes."""

import faulthandler
import hashlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federa import gpu
from federa.cli import main
from federa.config import RunConfig, parse_config
from federa.engines import Engine, Session
from federa.experiment import Experiment, build_experiment
from federa.server import finish_round, make_jobs
from federa.state import write_atomically
from federa.types import Job, Record, ServerState, State

Played = tuple[ServerState, list[Any], np.ndarray]  # final state, what each round said, outputs
loop = importlib.import_module("federa.run")  # the module: the name in the package is the function's


def build(recipe: Mapping[str, Any], **changes: Any) -> Experiment:
    """Return the experiment of a recipe with keys changed; `a__b` stands for the dotted key `a.b`."""
    return build_experiment(configure(recipe, **changes))


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, *, ready: bool) -> None:
    """Build experiments with what a GPU's model has, on the CPU; or with transformers' own modules and masks."""

    def prepare(model: Any) -> None:
        if model._supports_attention_backend:
            model.set_attn_implementation("sdpa")
        if ready:
            gpu.speed_up(model)

    monkeypatch.setattr("federa.experiment.speed_up", prepare)


def configure(recipe: Mapping[str, Any], **changes: Any) -> RunConfig:
    """Return the config of a recipe with keys changed; `a__b` stands for the dotted key `a.b`."""
    return parse_config(dict(recipe)).replace(**{key.replace("__", "."): v for key, v in changes.items()})


def jobs_of(experiment: Experiment, number: int = 1) -> list[Job]:
    """Return the jobs of a round."""
    return make_jobs(experiment.config, number, [len(part) for part in experiment.parts])


def play(
    experiment: Experiment, session: Session, rounds: int = 2, between: Callable[[], object] = lambda: None
) -> Played:
    """Play rounds and an evaluation; return all that must not depend on the engine."""
    state, story = ServerState(0, experiment.params), []
    for number in range(1, rounds + 1):
        jobs = jobs_of(experiment, number)
        state, summary = finish_round(experiment.config, state, jobs, session.train(state.params, jobs))
        story.append((summary.loss, summary.examples, summary.verdicts))
        between()
    outputs = [np.stack(rows) for rows in session.predict(state.params, experiment.batches(np.arange(30)))]
    return state, story, np.concatenate(outputs)


def play_on(experiment: Experiment, engine: Engine, rounds: int = 2) -> Played:
    """Play rounds and an evaluation on an engine that is opened for them alone."""
    with engine.open(experiment) as session:
        return play(experiment, session, rounds)


def check_equal(one: Played, other: Played) -> None:
    """Require that two plays are the same to the bit."""
    assert same(one[0].params, other[0].params)
    assert one[1] == other[1]
    assert np.array_equal(one[2], other[2])


def copy(state: State) -> dict[str, torch.Tensor]:
    """Return a deep copy."""
    return {name: tensor.clone() for name, tensor in state.items()}


def same(state: State, other: State) -> bool:
    """Return whether two states are equal to the bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def furthest(state: State, other: State) -> float:
    """Return the largest difference of two states of the same names."""
    assert state.keys() == other.keys()
    return max(float((state[name] - other[name]).abs().max()) for name in state)


def steady(records: list[Record]) -> list[Record]:
    """Return the records without what varies from run to run."""
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in records]


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the time of change and the hash of every file below a folder, and its folders."""
    out = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        out[str(path.relative_to(folder))] = (path.stat().st_mtime_ns if path.is_file() else 0, content)
    return out


def kept_files(run_folder: Path) -> dict[str, Path]:
    """Return what the clients of a run have kept for themselves: files by their names inside `clients`."""
    folder = run_folder / "clients"
    return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.safetensors"))}


def kept_bytes(run_folder: Path) -> dict[str, bytes]:
    """Return what is in those files."""
    return {name: file.read_bytes() for name, file in kept_files(run_folder).items()}


def federa(*arguments: object) -> int:
    """Run the command line in this process, and return its exit status."""
    before, sys.argv = sys.argv, ["federa", *map(str, arguments)]
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        sys.argv = before
    return 0


def short_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write a word for a report: drawing takes longer than the rest of a small run."""
    monkeypatch.setattr(loop, "_write_report", lambda folder: write_atomically(folder.report, b"drawn"))


def forked(action: Callable[[], object], patience: float = 90) -> int:
    """Run an action in a fork of this process; return the signal that ended it, 0 if it came to its end.

    One that hangs fails the test, after it and all that it forked have said on stderr where they are.
    """
    sys.stdout.flush()
    faulthandler.register(signal.SIGUSR1, file=2)  # before the fork: it may hang before its first line
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    with suppress(OSError):
        os.setpgid(child, child)
    end = time.monotonic() + patience
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    faulthandler.unregister(signal.SIGUSR1)
    if ended == (0, 0):
        for number in (signal.SIGUSR1, signal.SIGKILL):
            os.killpg(child, number)
            time.sleep(2)
        os.waitpid(child, 0)
        pytest.fail(f"the action did not end in {patience:g} s; stderr has where it was")
    _, status = ended
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "the action raised an exception"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def alive(pid: int) -> bool:
    """Return whether a process still runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
