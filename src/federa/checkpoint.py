"""A run directory: what is in it, and how it survives a crash at any moment.

config.yaml                    the resolved recipe, written first
environment.json               versions, hardware, commit
init.safetensors               the round-0 state, kept for ever
partition.json, labels.json    who holds what, and the names of the labels
checkpoint/state.safetensors   the last finished round
metrics.jsonl                  one object a round
diagnostics.jsonl              one object a round, where the recipe asks for it
result.json, report.html       at the end
tracker_id                     what trackers know the run by, where it has any
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from federa.state import load_state, save_state, write_atomically
from federa.types import FederaError, Record, ServerState, State


class RunDirectory:
    """The files of one run.

    Args:
        path: of the directory, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.init = path / "init.safetensors"
        self.state = path / "checkpoint" / "state.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.diagnostics = path / "diagnostics.jsonl"
        self.result = path / "result.json"
        self.report = path / "report.html"
        self.kept = path / "clients"

    @property
    def started(self) -> bool:
        """Whether a run has been started here."""
        return self.config.is_file()

    @property
    def free(self) -> bool:
        """Whether a run may start here: nothing is there, or what a crash in the first write left."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(f.name.endswith(".partial") for f in self.path.iterdir())

    def require(self) -> None:
        """Raise unless this is a run directory.

        Raises:
            FederaError: it is not.
        """
        if not self.started:
            raise FederaError(f"{self.path} is not a run directory (it has no config.yaml)")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running here; the lock goes with the process, however it ends.

        Raises:
            FederaError: another process is at it.
        """
        with self.config.open("rb") as file:
            until = time.monotonic() + 1.0  # the workers of a killed run hold its lock while they die
            while not _flock(file):
                if time.monotonic() > until:
                    raise FederaError(f"{self.path}: another process is running this")
                time.sleep(0.02)
            yield

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the JSON files, atomically."""
        write_atomically(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the content of one of the JSON files, or None if it is not there."""
        file = self.path / name
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def save_init(self, params: State, fingerprint: str) -> None:
        """Keep the round-0 state and the fingerprint of the base that it belongs to."""
        save_state(self.init, params, {"fingerprint": fingerprint})

    def save_checkpoint(self, state: ServerState) -> None:
        """Replace the checkpoint: one file, so that params, optimizer and round always belong together."""
        tensors = {f"params/{name}": t for name, t in state.params.items()}
        tensors |= {f"opt/{name}": t for name, t in state.opt.items()}
        save_state(self.state, tensors, {"round": str(state.round)})  # of two keys the order would be random

    def load_checkpoint(self) -> ServerState:
        """Return the state after the last finished round.

        Raises:
            FederaError: there is none, or it is damaged.
        """
        tensors, metadata = load_state(self.state)
        if not metadata.get("round", "").isdigit():
            raise FederaError(f"{self.state} is not a checkpoint of federa (it names no round)")

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return ServerState(int(metadata["round"]), part("params/"), part("opt/"))

    def append(self, record: Record, diagnostics: Record | None = None) -> None:
        """Add a round's line to the metrics, and its diagnostics if there are any, and see it to the disk."""
        if diagnostics is not None:
            _append(self.diagnostics, diagnostics)
        _append(self.metrics, record)

    def records(self) -> list[Record]:
        """Return the metrics of the rounds so far; a line that a crash cut short is left out.

        Raises:
            FederaError: a whole line that is not JSON.
        """
        return _records(self.metrics)

    def rewind(self, rounds: int) -> list[Record]:
        """Drop the metrics after the given number of rounds, and return the rest.

        A line is written before its checkpoint, so a crash between the two leaves one line too many.

        Raises:
            FederaError: a line of a finished round is missing.
        """
        kept = _rewound(self.metrics, rounds)
        if [record["round"] for record in kept] != list(range(1, rounds + 1)):
            raise FederaError(
                f"{self.metrics} does not hold every round up to {rounds}; it was changed by hand"
            )
        if self.diagnostics.is_file():
            _rewound(self.diagnostics, rounds)
        return kept


def _append(file: Path, record: Record) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def _records(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise FederaError(f"{file} holds a line that is not JSON; it was changed by hand") from error


def _rewound(file: Path, rounds: int) -> list[Record]:
    """Keep the lines of the first rounds, and return them."""
    kept = [record for record in _records(file) if record["round"] <= rounds]
    write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def _flock(file: BinaryIO) -> bool:
    """Lock a file if nobody else holds it, and return whether that is so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
