"""What is trained: the settings, and the plan files that every contender reads.

A plan settles all that a framework would draw for itself: the initial tensors, who holds which rows, who is
drawn in which round, and in which order a client sees its rows. `plan.py` writes it, with federa; what reads
it needs NumPy and safetensors alone.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """The settings of a comparison.

    Attributes:
        clients: in all; `cohort` of them train in a round.
        examples: of each client, a multiple of `batch`.
        tokens: of every example, so that everybody does the same work whatever their padding.
        rounds: that the plan covers.
        model: the embedded MiniLM, or a folder.
    """

    clients: int = 100
    cohort: int = 10
    examples: int = 64
    tokens: int = 64
    batch: int = 16
    rounds: int = 10
    rank: int = 16
    labels: int = 5
    lr: float = 1e-3
    seed: int = 0
    model: str = "minilm"

    def check(self) -> None:
        """Raise ValueError for what not every contender can do in the same way."""
        if self.examples % self.batch:
            raise ValueError("examples must be a multiple of batch: a short batch may come anywhere")
        if self.cohort % 2:
            raise ValueError("cohort must be even: pfl draws clients for all of its processes at a time")
        if self.cohort > self.clients:
            raise ValueError("cohort exceeds clients")


class Plan:
    """A plan folder, read.

    Attributes:
        workload: its settings.
        inputs: `(rows, tokens)` int64 token ids, `labels` `(rows,)`.
        cohorts: `(rounds, cohort)` client ids, in the order in which federa's jobs come.
        orders: `(rounds, cohort, examples)` row numbers, batch after batch.
        model: the folder of the pretrained model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = json.loads((folder / "plan.json").read_text())
        self.workload = Workload(**settings["workload"])
        self.model = settings["model_folder"]
        with np.load(folder / "plan.npz") as arrays:
            self.inputs = arrays["inputs"]
            self.labels = arrays["labels"]
            self.cohorts = arrays["cohorts"]
            self.orders = arrays["orders"]

    def cohort(self, round_number: int) -> list[int]:
        """Return the clients of a round, counted from 1."""
        return [int(client) for client in self.cohorts[round_number - 1]]

    def order(self, round_number: int, client: int) -> np.ndarray:
        """Return a client's rows in the order in which it sees them in a round."""
        place = self.cohort(round_number).index(client)
        return self.orders[round_number - 1, place]

    def batches(self, round_number: int, client: int) -> np.ndarray:
        """Return a client's batches of a round, `(steps, batch)` row numbers."""
        return self.order(round_number, client).reshape(-1, self.workload.batch)

    def initial(self) -> dict[str, Any]:
        """Return the round-0 tensors, by federa's names."""
        from safetensors.torch import load_file

        return load_file(self.folder / "init.safetensors")


class Marks:
    """What a run writes down: the moments at which rounds ended, on the clock that all processes share.

    Args:
        out: the folder for `run.json` and `final.safetensors`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rounds: list[float] = []
        self.train_seconds: list[float] = []

    def finished_round(self, train_seconds: float) -> None:
        """Note the end of a round, and the seconds that its clients trained for, summed."""
        self.rounds.append(time.monotonic())  # CLOCK_MONOTONIC: the driver's clock as well
        self.train_seconds.append(train_seconds)

    def write(self, final: dict[str, Any], **more: Any) -> None:
        """Write the final tensors (by federa's names) and the marks."""
        from safetensors.torch import save_file

        self.out.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().float().contiguous() for name, t in final.items()}, self.final)
        marks = {"round_ends": self.rounds, "train_seconds": self.train_seconds, **more}
        (self.out / "run.json").write_text(json.dumps(marks))

    @property
    def final(self) -> Path:
        """The file of the final tensors."""
        return self.out / "final.safetensors"


@dataclass(frozen=True)
class Order:
    """The command line that every `run_*.py` understands."""

    plan: Path
    out: Path
    rounds: int
    workers: int
    threads: int
    dropout: float | None
    precision: str

    def to_json(self) -> str:
        """Return the order for a process that the framework starts."""
        return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Return what `to_json` gave."""
        fields = json.loads(text)
        return cls(**{**fields, "plan": Path(fields["plan"]), "out": Path(fields["out"])})


def _absolute(path: str) -> Path:
    """Return a path that stays right where a framework changes the directory."""
    return Path(path).resolve()


def order_from_command_line() -> Order:
    """Return the command line of a `run_*.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=_absolute, required=True)
    parser.add_argument("--out", type=_absolute, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--precision", default="fp32")
    return Order(**vars(parser.parse_args()))
