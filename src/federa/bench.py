"""`federa bench`: how fast this machine trains a recipe, and what makes it faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from federa.client import scheduled_lr
from federa.config import RunConfig
from federa.cpu import native
from federa.engines import ENGINES, Session
from federa.experiment import Experiment, build_experiment, resolve
from federa.machine import available_cores
from federa.types import FederaError, Job

STEPS = 3  # of a timed client: enough to outlast its start, few enough to wait for
GEMM_SIDE = 2048
BATCH_SIZES = (8, 16, 32, 64)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """One thing that was timed several times, taking turns with its rivals.

    Attributes:
        name: what.
        changes: the dotted keys of a recipe that choose it.
        rates: of each repeat; examples a second, or for a matrix product floating-point operations.
    """

    name: str
    changes: Mapping[str, Any]
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The median."""
        return median(self.rates)


@dataclass(slots=True)
class Bench:
    """What was measured.

    Attributes:
        cores: that this process may use.
        kernels: `fused`, or why the compiled kernels are not in use.
        peaks: of matrix products, by precision, on one thread.
        step_flops: floating-point operations in matrix products of one local step.
        step_seconds: of that step, on one thread.
        precisions: examples a second of one worker.
        engines: examples a second of all workers.
        batches: examples a second by batch size, of one worker; another batch size trains differently.
    """

    cores: int
    kernels: str
    peaks: list[Timing] = field(default_factory=list)
    step_flops: float = 0.0
    step_seconds: float = 0.0
    precisions: list[Timing] = field(default_factory=list)
    engines: list[Timing] = field(default_factory=list)
    batches: list[Timing] = field(default_factory=list)

    def peak(self, precision: str) -> float:
        """Return the measured peak of a precision, in floating-point operations a second."""
        return next(timing.rate for timing in self.peaks if timing.name == precision)

    def best(self) -> dict[str, Any]:
        """Return the dotted keys of the fastest precision and engine."""
        found: dict[str, Any] = {}
        for timings in (self.precisions, self.engines):
            found.update(max(timings, key=lambda timing: timing.rate).changes)
        return found


def bench(config: RunConfig, say: Say, repeats: int = 5) -> Bench:
    """Measure a recipe on this machine; nothing is written.

    Args:
        config: the recipe; its client settings are kept but for what is being chosen.
        say: is told what is measured next.
        repeats: of everything; rivals take turns.

    Raises:
        FederaError: anything wrong with the recipe.
    """
    if repeats < 1:
        raise FederaError(f"--repeats {repeats}: expected 1 or more")
    config = resolve(config)
    out = Bench(available_cores(), native.status() if config.device == "cpu" else "not used on this device")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        say("matrix products")
        out.peaks = _peaks(torch.device(config.device), repeats)
        say("local steps, both precisions")
        experiments = {
            precision: build_experiment(config.replace(**{"client.precision": precision}))
            for precision in ("fp32", "bf16")
        }
        out.precisions = _interleaved(
            {p: ({"client.precision": p}, _worker(e, _rows(e, config))) for p, e in experiments.items()},
            repeats,
        )
        chosen = experiments[max(out.precisions, key=lambda timing: timing.rate).name]
        precision = chosen.config.client.precision
        out.step_flops = _step_flops(chosen)
        rate = next(timing.rate for timing in out.precisions if timing.name == precision)
        out.step_seconds = config.client.batch_size / rate
        say("batch sizes")
        out.batches = _interleaved(
            {
                str(size): ({"client.batch_size": size}, _worker(chosen, _rows(chosen, config, size), size))
                for size in BATCH_SIZES
                if size <= len(chosen.train)
            },
            repeats,
        )
        say("engines")
        out.engines = _engines(chosen, repeats)
    finally:
        torch.set_num_threads(threads)
    return out


def _peaks(device: torch.device, repeats: int) -> list[Timing]:
    def product(dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device).to(dtype) for _ in range(2))

        def run() -> float:
            began = time.perf_counter()
            (a @ b)[0, 0].item()
            return 2.0 * GEMM_SIDE**3 / (time.perf_counter() - began)

        return run

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return _interleaved({name: ({}, product(dtype)) for name, dtype in dtypes.items()}, repeats)


def _interleaved(
    rivals: Mapping[str, tuple[Mapping[str, Any], Callable[[], float]]], repeats: int
) -> list[Timing]:
    """Run every rival once to warm up, then all of them in turn, so that a slow minute hits them alike."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, (_, run) in rivals.items():
            rate = run()
            if turn:
                rates[name].append(rate)
    return [Timing(name, changes, tuple(rates[name])) for name, (changes, _) in rivals.items()]


def _rows(experiment: Experiment, config: RunConfig, batch_size: int | None = None) -> np.ndarray[Any, Any]:
    """Return rows for STEPS steps, of ordinary lengths: those in the order of the training set."""
    return np.arange(min(len(experiment.train), STEPS * (batch_size or config.client.batch_size)))


def _worker(
    experiment: Experiment, rows: np.ndarray[Any, Any], batch_size: int | None = None
) -> Callable[[], float]:
    """Return what trains one client of these rows in this process, and gives examples a second."""
    client = experiment.config.client
    changes: dict[str, Any] = {"max_steps": STEPS, "epochs": STEPS}  # few rows are gone over again
    if batch_size is not None:
        changes["batch_size"] = batch_size
    job = Job(1, 0, 0, scheduled_lr(client, 1, experiment.config.rounds))

    def run() -> float:
        with _client(experiment, client.model_copy(update=changes)):
            update, _ = experiment.trainer.train(
                experiment.params, experiment.train, rows, job, experiment.kept.start
            )
        return update.metrics["examples"] / update.metrics["seconds_train"]

    return run


@contextmanager
def _client(experiment: Experiment, changed: Any) -> Iterator[None]:
    """Let the trainer follow other client settings for a while."""
    before = experiment.trainer.config
    experiment.trainer.config = changed
    try:
        yield
    finally:
        experiment.trainer.config = before


def _step_flops(experiment: Experiment) -> float:
    """Count the operations in the matrix products of one step, with torch's own counter.

    It sees torch's operations only, so the step is counted without the compiled kernels.
    """
    rows = np.arange(min(len(experiment.train), experiment.config.client.batch_size))
    counter = FlopCounterMode(display=False)
    with native.without(), counter:
        experiment.trainer.model.train()
        batch = experiment.train.batch(rows, experiment.trainer.device)
        experiment.trainer.model(**batch).loss.backward()
    experiment.trainer.flat.zero_gradient_()
    return float(counter.get_total_flops())


def _candidates(device: str, cores: int) -> list[dict[str, Any]]:
    """Return the engines that are worth a try on a machine."""
    if device != "cpu":
        return [{"name": "serial"}]
    found: list[dict[str, Any]] = [{"name": "serial", "threads": cores}]
    threads = 1
    while cores // threads >= 2:  # one worker is what `serial` is
        found.append({"name": "processes", "workers": cores // threads, "threads": threads})
        threads *= 2
    return found


def _engines(experiment: Experiment, repeats: int) -> list[Timing]:
    config = experiment.config
    sizes = np.array([len(part) for part in experiment.parts])
    largest = np.argsort(-sizes, kind="stable")[: 2 * available_cores()]
    lr = scheduled_lr(config.client, 1, config.rounds)
    jobs = [Job(1, int(client), int(client), lr) for client in largest]

    def trains(session: Session) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            examples = sum(update.metrics["examples"] for update in session.train(experiment.params, jobs))
            return examples / (time.perf_counter() - began)

        return run

    changed = config.client.model_copy(update={"max_steps": STEPS, "epochs": STEPS})
    with ExitStack() as stack, _client(experiment, changed):
        rivals = {}
        # Those that fork come first: a fork does not survive another engine's threads.
        candidates = sorted(_candidates(config.device, available_cores()), key=lambda c: c["name"])
        for candidate in candidates:
            session = stack.enter_context(ENGINES.parse(candidate).open(experiment))
            words = ", ".join(f"{k} {v}" for k, v in candidate.items() if k != "name")
            changes = {f"engine.{key}": value for key, value in candidate.items()}
            rivals[f"{candidate['name']} ({words})" if words else candidate["name"]] = (
                changes,
                trains(session),
            )
        return _interleaved(rivals, repeats)


def lines(result: Bench, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield what was measured as (what, figure) pairs."""
    yield "cores", str(result.cores)
    yield "CPU kernels", result.kernels
    for timing in result.peaks:
        yield f"matrix product {timing.name}, one thread", f"{_spread(timing, 1e9)} GFLOP/s"
    precision = str(result.best()["client.precision"])
    share = result.step_flops / result.step_seconds / result.peak(precision)
    yield (
        f"local step of {config.client.batch_size}, {precision}, one thread",
        f"{1e3 * result.step_seconds:.0f} ms for {result.step_flops / 1e9:.1f} GFLOP:"
        f" {share:.0%} of the peak",
    )
    groups: Sequence[tuple[str, list[Timing]]] = (
        ("precision", result.precisions),
        ("batch of", result.batches),
        ("engine", result.engines),
    )
    for title, timings in groups:
        top = max(timing.rate for timing in timings)
        for timing in timings:
            mark = "  <- fastest" if timing.rate == top else ""
            yield f"{title} {timing.name}", f"{_spread(timing, 1)} examples/s{mark}"


def _spread(timing: Timing, unit: float) -> str:
    low, high = min(timing.rates) / unit, max(timing.rates) / unit
    return f"{timing.rate / unit:.0f} ({low:.0f}-{high:.0f})"
