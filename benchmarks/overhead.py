"""What federation costs beside the local steps, and what a second worker brings.

    python benchmarks/overhead.py [KEY=VALUE ...]     # keys of measured_run.py, for example cohort=20

Two ratios, each from rounds that take turns in one process, one thread a worker:
- a whole round of `federa.run` with the serial engine (jobs, training, checks, sum, checkpoint, record) over
  nothing but the steps of the same clients on batches that lie ready;
- clients a second of `processes` with two workers over those of `serial`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measured_run import recipe

import federa
from federa.client import Trainer
from federa.config import RunConfig
from federa.engines import Processes, Serial
from federa.experiment import Experiment, build_experiment
from federa.run import Observer
from federa.seeds import torch_seeded
from federa.server import finish_round, make_jobs
from federa.types import Job, Record, ServerState


def steps_alone(experiment: Experiment, jobs: Sequence[Job]) -> float:
    """Return the seconds of the jobs' steps: forward, backward, clipping, optimizer."""
    trainer: Trainer = experiment.trainer
    flat, config, data = trainer.flat, trainer.config, experiment.train
    batches = [
        data.batch(rows, trainer.device)
        for job in jobs
        for rows in trainer.batches(data, experiment.parts[job.client_id], job)
    ]
    flat.load_(experiment.params)
    optimizer = trainer._optimizer(config.lr or 0.0)
    trainer.model.train()
    with torch_seeded(0):
        began = time.perf_counter()
        for batch in batches:
            flat.backward_(trainer.model(**batch).loss)
            length = torch.linalg.vector_norm(flat.gradient)
            flat.gradient.mul_((config.clip_norm / (length + 1e-6)).clamp(max=1.0))
            optimizer.step()
            flat.push_()
        return time.perf_counter() - began


class TakingTurns(Observer):
    """Times a round of the run, then its steps alone, and so on."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.ratios: list[float] = []

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:
        self.experiment = experiment
        self.mark = time.perf_counter()

    def finished_round(self, record: Record) -> None:
        seconds = time.perf_counter() - self.mark
        sizes = [len(part) for part in self.experiment.parts]
        alone = steps_alone(self.experiment, make_jobs(self.experiment.config, record["round"], sizes))
        if record["round"] > 1:  # the first warms up
            self.ratios.append(seconds / alone)
        self.mark = time.perf_counter()


def overhead(config: RunConfig, folder: Path) -> list[float]:
    """Return, for each round, its seconds over those of its steps alone."""
    turns = TakingTurns(config)
    # The last round is evaluated: it is left out.
    federa.run(config.replace(rounds=config.rounds + 2), folder, observer=turns)
    return turns.ratios[:-1]


def scaling(config: RunConfig) -> list[float]:
    """Return, for each round, clients a second of two workers over those of one."""
    experiment = build_experiment(config)
    sizes = [len(part) for part in experiment.parts]
    ratios = []
    with Serial(threads=1).open(experiment) as one, Processes(workers=2).open(experiment) as two:
        for number in range(1, config.rounds + 2):
            seconds = []
            for session in (one, two):
                began = time.perf_counter()
                state, jobs = ServerState(0, experiment.params), make_jobs(config, number, sizes)
                finish_round(config, state, jobs, session.train(state.params, jobs))
                seconds.append(time.perf_counter() - began)
            if number > 1:
                ratios.append(seconds[0] / seconds[1])
    return ratios


def show(name: str, ratios: list[float]) -> None:
    ordered = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    print(f"{name}: median {statistics.median(ratios):.3f} of {len(ratios)} ({ordered})")


def main() -> None:
    changes: dict[str, Any] = {
        key: json.loads(value) for key, value in (w.split("=", 1) for w in sys.argv[1:])
    }
    examples = changes.pop("examples", 64)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(Path(folder), {"rounds": 7, **changes}, examples)
        show("a serial round over its steps alone", overhead(config, Path(folder) / "run"))
        show("two workers over one", scaling(config))


if __name__ == "__main__":
    main()
