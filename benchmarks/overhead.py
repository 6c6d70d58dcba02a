"""What federation costs beside the local steps, and what a second worker brings.

    python benchmarks/overhead.py [KEY=VALUE ...]     # keys of measured_run.py, for example cohort=20

Ratios of rounds that take turns in one process, one thread a worker:
- a whole round of `federa.run` with the serial engine (jobs, training, checks, sum, checkpoint, record) over
  nothing but the steps of the same clients on batches that lie ready;
- the same round over the time that it spent inside its own steps (batches made, and all else, is overhead),
  which does not know how the machine's speed moves from one round to the next;
- clients a second of `processes` with two workers over those of `serial`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_run import recipe

import federa
from federa.client import Trainer
from federa.config import RunConfig
from federa.data.batches import Encoded
from federa.engines import Processes, Serial
from federa.experiment import Experiment, build_experiment
from federa.local_optimizer import LocalOptimizer
from federa.run import Observer
from federa.seeds import torch_seeded
from federa.server import finish_round, make_jobs
from federa.types import Job, Record, ServerState


def steps_alone(experiment: Experiment, jobs: Sequence[Job]) -> float:
    """Return the seconds of the jobs' steps: forward, backward, clipping, optimizer."""
    trainer: Trainer = experiment.trainer
    flat, config, data = trainer.flat, trainer.config, experiment.train
    optimizer = LocalOptimizer(flat, config)
    batches = [
        data.batch(rows, trainer.device)
        for job in jobs
        for rows in trainer.batches(data, experiment.parts[job.client_id], job)
    ]
    flat.load_(experiment.params)
    optimizer.restart(config.lr or 0.0, config.lr or 0.0)
    trainer.model.train()
    with torch_seeded(0):
        began = time.perf_counter()
        for batch in batches:
            flat.backward_(trainer.model(**batch).loss)
            optimizer.step()
        return time.perf_counter() - began


class Inside:
    """Adds up the time that a trainer spends in its steps, without that of making their batches."""

    def __init__(self, experiment: Experiment) -> None:
        self.seconds = 0.0
        self._batches, self._make = experiment.trainer.batches, Encoded.batch
        experiment.trainer.batches = self.batches
        Encoded.batch = lambda *args, **options: self.batch(*args, **options)

    def batches(self, *args: Any) -> Iterator[Any]:
        """Yield batches; until the next one is asked for, a step runs."""
        for rows in self._batches(*args):
            began = time.perf_counter()
            yield rows
            self.seconds += time.perf_counter() - began

    def batch(self, *args: Any, **options: Any) -> Any:
        """Make a batch."""
        began = time.perf_counter()
        made = self._make(*args, **options)
        self.seconds -= time.perf_counter() - began
        return made

    def close(self) -> None:
        """Leave the data sets as they were."""
        Encoded.batch = self._make


class TakingTurns(Observer):
    """Times a round of the run, then its steps alone, and so on."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.ratios: list[tuple[float, float]] = []

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:
        self.experiment = experiment
        self.inside = Inside(experiment)
        self.mark = time.perf_counter()

    def finished_round(self, record: Record) -> None:
        whole, within = time.perf_counter() - self.mark, self.inside.seconds
        sizes = [len(part) for part in self.experiment.parts]
        alone = steps_alone(self.experiment, make_jobs(self.experiment.config, record["round"], sizes))
        if record["round"] > 1:  # the first warms up
            self.ratios.append((whole / alone, whole / within))
        self.inside.seconds = 0.0
        self.mark = time.perf_counter()


def overhead(config: RunConfig, folder: Path) -> list[tuple[float, float]]:
    """Return, for each round, its seconds over those of its steps alone, and over those inside its own."""
    turns = TakingTurns(config)
    # The last round is evaluated: it is left out.
    federa.run(config.replace(rounds=config.rounds + 2), folder, observer=turns)
    turns.inside.close()
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


def show(name: str, ratios: Sequence[float]) -> None:
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
        alone, inside = zip(*overhead(config, Path(folder) / "run"), strict=True)
        show("a serial round over its steps alone", alone)
        show("over the time inside its own steps", inside)
        show("two workers over one", scaling(config))


if __name__ == "__main__":
    main()
