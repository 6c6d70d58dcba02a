"""`--dry-run`: what a recipe would do, before it does it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from federa.client import scheduled_lr
from federa.config import RunConfig
from federa.experiment import Experiment, build_experiment, resolve
from federa.state import num_bytes
from federa.types import Job


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is expected to take.

    Attributes:
        experiment: built, nothing trained.
        bytes_round: up and down together, of one round.
        seconds: of all rounds, on the engine's workers; from a few steps measured here.
        start: seconds before the first round, here; what a later run finds in a cache is in them.
    """

    experiment: Experiment
    bytes_round: int
    seconds: float
    start: float


def make_plan(config: RunConfig) -> Plan:
    """Build a recipe's experiment and measure a little of it; nothing is written.

    Raises:
        FederaError: anything wrong with the recipe.
    """
    began = time.perf_counter()
    experiment = build_experiment(resolve(config))
    config = experiment.config
    with config.engine.open(experiment):
        pass  # an engine that cannot start says so here
    start = time.perf_counter() - began
    middle = int(np.argsort([len(part) for part in experiment.parts])[len(experiment.parts) // 2])
    job = Job(1, middle, 0, scheduled_lr(config.client, 1, config.rounds))
    seconds = []
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        update, _ = experiment.trainer.train(
            experiment.params, experiment.train, experiment.parts[middle][:64], job, experiment.kept.start
        )
        seconds.append((time.perf_counter() - began) / update.metrics["examples"])
    rows = np.arange(len(experiment.evaluation))
    began = time.perf_counter()
    first = experiment.batches(rows)[:1]
    list(experiment.predict(experiment.params, first))
    evaluation = (time.perf_counter() - began) / len(first[0]) * len(rows)
    mean_size = len(experiment.train) / len(experiment.parts)
    examples = mean_size * config.client.epochs
    if config.client.max_steps is not None:
        examples = min(examples, config.client.max_steps * config.client.batch_size)
    every = config.evaluate_every or config.rounds
    evaluations = -(-config.rounds // every)
    workers = config.engine.num_workers()
    total = (config.rounds * config.cohort * examples * min(seconds) + evaluations * evaluation) / workers
    return Plan(experiment, 2 * config.cohort * num_bytes(experiment.params), total, start)
