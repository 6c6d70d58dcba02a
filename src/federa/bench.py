"""`federa bench`: how fast this machine trains a recipe, and what makes it faster."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from federa.client import ClientConfig, scheduled_lr
from federa.config import RunConfig
from federa.cpu import native
from federa.engines import ENGINES, Engine, Session, Stacked
from federa.engines.base import keep_freed_memory
from federa.experiment import Experiment, build_experiment, resolve
from federa.machine import available_cores
from federa.models import pick_device
from federa.server import make_jobs
from federa.types import FederaError, Job, RoundFailedError

STEPS = 3  # of a timed client: enough to outlast its start, few enough to wait for
GEMM_SIDE = 2048  # four times that on an accelerator, where the launch of a product must not count
COHORT = 16  # clients of a round that are timed: `stacked` gains by their number and their sizes
PASS_SECONDS = 6.0  # fewer clients where those would take longer: there products are large and gain nothing
PRECISIONS = ("fp32", "bf16")
BATCH_SIZES = (8, 16, 32, 64)
Say = Callable[[str], None]
# A name, the keys that choose it, and a run that gives a rate.
Rival = tuple[str, Mapping[str, Any], Callable[[], float]]


def _product_flops(_: Any, one: Sequence[int], other: Sequence[int], **__: Any) -> int:
    """Count the operations of a matrix product, or one a client, from the shapes of its factors."""
    return 2 * math.prod(one) * other[-1]


# Torch's counter knows the products that add to a new tensor, not those of `methods/lora.py`.
IN_PLACE = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}


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
        device: that was measured.
        kernels: `fused`, or why the compiled kernels are not in use.
        engine: the name of the recipe's own.
        peaks: of matrix products, by precision, on one thread, in turns with the local steps.
        step_flops: floating-point operations in matrix products of a local step, the mean of those timed.
        step_seconds: of such a step, on one thread.
        precisions: examples a second of one worker.
        engines: examples a second of all workers.
        batches: examples a second by batch size, of one worker; another batch size trains differently.
        left_out: why an engine was not measured.
    """

    cores: int
    device: str
    kernels: str
    engine: str
    peaks: list[Timing] = field(default_factory=list)
    step_flops: float = 0.0
    step_seconds: float = 0.0
    precisions: list[Timing] = field(default_factory=list)
    engines: list[Timing] = field(default_factory=list)
    batches: list[Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def shares(self, precision: str) -> list[float]:
        """Return a local step's operations a second over those of the product in the same turn."""
        product, step = (
            next(timing for timing in timings if timing.name == precision)
            for timings in (self.peaks, self.precisions)
        )
        examples = self.step_seconds * step.rate
        pairs = zip(product.rates, step.rates, strict=True)
        return [self.step_flops * step / examples / product for product, step in pairs]

    def best(self, *, batch: bool = False) -> dict[str, Any]:
        """Return the dotted keys of the fastest precision and engine, and perhaps of the fastest batch size.

        Nothing is faster than an engine that was not measured, a cluster say: then it stays.
        """
        measured = any(timing.changes["engine.name"] == self.engine for timing in self.engines)
        found: dict[str, Any] = {}
        for timings in (self.precisions, self.engines if measured else [], self.batches if batch else []):
            if timings:
                found.update(max(timings, key=lambda timing: timing.rate).changes)
        return found


def possible_changes(config: RunConfig, *, batch: bool = False) -> list[dict[str, Any]]:
    """Return all that `Bench.best` can come to for a recipe: whoever writes it can try that before.

    Of batch sizes one stands for all.
    """
    engines = [_keys(engine) for engine in _candidates(config, available_cores())]
    if config.engine.name not in {keys["engine.name"] for keys in engines}:
        engines = [{}]
    more = {"client.batch_size": BATCH_SIZES[0]} if batch else {}
    return [{"client.precision": precision, **keys, **more} for precision in PRECISIONS for keys in engines]


def disturbance() -> str | None:
    """Return a warning if more runs on this machine than it has cores for, else None."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # the load of a container is its machine's
    if load <= cores:
        return None
    return f"the load average is {load:.1f} on {cores} cores: other jobs decide what is measured here"


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
    on_cpu = config.device == "cpu"
    kernels = native.status() if on_cpu else "not used on this device"
    out = Bench(available_cores(), config.device, kernels, config.engine.name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        if on_cpu:
            keep_freed_memory()  # as every engine does: what is timed before the first one opens, too
        say("matrix products and local steps, both precisions")
        experiments = {
            precision: build_experiment(config.replace(**{"client.precision": precision}))
            for precision in PRECISIONS
        }
        products = _products(torch.device(config.device))
        steps = [(p, {"client.precision": p}, _worker(e, _rows(e, config))) for p, e in experiments.items()]
        timings = _interleaved([*products, *steps], repeats)
        out.peaks, out.precisions = timings[: len(products)], timings[len(products) :]
        del products  # and their memory: engines plan with what is free
        chosen = experiments[max(out.precisions, key=lambda timing: timing.rate).name]
        out.step_flops, examples = _step(chosen)
        out.step_seconds = examples / max(timing.rate for timing in out.precisions)
        say("batch sizes")
        out.batches = _interleaved(
            [
                (str(size), {"client.batch_size": size}, _worker(chosen, _rows(chosen, config, size), size))
                for size in sorted({*BATCH_SIZES, config.client.batch_size})
                if size <= len(chosen.train)
            ],
            repeats,
        )
        say("engines")
        out.engines, out.left_out = _engines(chosen, repeats, out.step_seconds)
    finally:
        torch.set_num_threads(threads)
    return out


def _products(device: torch.device) -> list[Rival]:
    """Return a product of matrices in each precision, to be timed."""
    side = GEMM_SIDE if device.type == "cpu" else 4 * GEMM_SIDE

    def product(dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

        def run() -> float:
            began = time.perf_counter()
            (a @ b)[0, 0].item()
            return 2.0 * side**3 / (time.perf_counter() - began)

        return run

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return [(name, {}, product(dtype)) for name, dtype in dtypes.items()]


def _interleaved(rivals: Sequence[Rival], repeats: int, *, warm: bool = False) -> list[Timing]:
    """Run every rival once unless they are warm, then all in turn, so that a slow minute hits them alike."""
    rates: list[list[float]] = [[] for _ in rivals]
    for turn in range(repeats + (not warm)):
        for own, (_, _, run) in zip(rates, rivals, strict=True):
            rate = run()
            if warm or turn:
                own.append(rate)
    return [Timing(name, keys, tuple(own)) for own, (name, keys, _) in zip(rates, rivals, strict=True)]


def _rows(experiment: Experiment, config: RunConfig, batch_size: int | None = None) -> np.ndarray[Any, Any]:
    """Return rows for STEPS steps, of ordinary lengths: those in the order of the training set."""
    return np.arange(min(len(experiment.train), STEPS * (batch_size or config.client.batch_size)))


def _short(client: ClientConfig, batch_size: int | None = None) -> ClientConfig:
    """Return settings for STEPS steps; few rows are gone over again."""
    return client.model_copy(
        update={"max_steps": STEPS, "epochs": STEPS, "batch_size": batch_size or client.batch_size}
    )


def _job(config: RunConfig) -> Job:
    return Job(1, 0, 0, scheduled_lr(config.client, 1, config.rounds))


def _worker(
    experiment: Experiment, rows: np.ndarray[Any, Any], batch_size: int | None = None
) -> Callable[[], float]:
    """Return what trains one client of these rows in this process, and gives examples a second."""
    client, job = _short(experiment.config.client, batch_size), _job(experiment.config)

    def run() -> float:
        with _client(experiment, client):
            update, _ = experiment.trainer.train(
                experiment.params, experiment.train, rows, job, experiment.kept.start
            )
        return update.metrics["examples"] / update.metrics["seconds_train"]

    return run


@contextmanager
def _client(experiment: Experiment, changed: ClientConfig) -> Iterator[None]:
    """Let the trainer follow other client settings for a while."""
    before = experiment.trainer.config
    experiment.trainer.config = changed
    try:
        yield
    finally:
        experiment.trainer.config = before


def _step(experiment: Experiment) -> tuple[float, float]:
    """Return the operations in the matrix products of a step, and its examples: the mean of those timed.

    Torch's own counter sees torch's operations only, so the steps are counted without the compiled kernels.
    """
    trainer, train, config = experiment.trainer, experiment.train, experiment.config
    with _client(experiment, _short(config.client)):
        steps = list(trainer.batches(train, _rows(experiment, config), _job(config)))
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    trainer.model.train()
    with native.without(), counter:
        for rows in steps:
            trainer.loss(train, rows).backward()
    trainer.flat.zero_gradient_()
    return counter.get_total_flops() / len(steps), sum(map(len, steps)) / len(steps)


def _candidates(config: RunConfig, cores: int) -> list[Engine]:
    """Return the engines that are worth a try on a machine, those that fork first.

    A fork does not survive another engine's threads.
    """
    found: list[dict[str, Any]] = []
    on_cpu = pick_device(config.device).type == "cpu"
    each = 1
    while on_cpu and cores // each >= 2:  # one worker is what `serial` is
        found.append({"name": "processes", "workers": cores // each, "threads": each})
        each *= 2
    threads = cores if on_cpu else config.engine.threads
    own = config.engine.clients if isinstance(config.engine, Stacked) else None
    found += [{"name": "serial", "threads": threads}, {"name": "stacked", "threads": threads, "clients": own}]
    return [ENGINES.parse({k: v for k, v in keys.items() if v is not None}) for keys in found]


def _keys(engine: Engine) -> dict[str, Any]:
    return {f"engine.{key}": value for key, value in engine.model_dump(exclude_none=True).items()}


def _engines(
    experiment: Experiment, repeats: int, step_seconds: float
) -> tuple[list[Timing], dict[str, str]]:
    """Return how fast the engines are, and why others were left out."""
    config, cores = experiment.config, available_cores()
    number = config.cohort  # side by side on an accelerator only a whole cohort tells
    if config.device == "cpu":
        in_time = int(PASS_SECONDS * cores / (STEPS * step_seconds))
        number = min(number, max(2 * cores, min(COHORT, in_time)))
    jobs = make_jobs(config.replace(cohort=number), 1, [len(part) for part in experiment.parts])

    def trains(session: Session) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            examples = sum(update.metrics["examples"] for update in session.train(experiment.params, jobs))
            return examples / (time.perf_counter() - began)

        return run

    rivals: list[Rival] = []
    left_out: dict[str, str] = {}
    with ExitStack() as stack, _client(experiment, _short(config.client)):
        for engine in _candidates(config, cores):
            keys = _keys(engine)
            words = ", ".join(
                f"{k.removeprefix('engine.')} {v}" for k, v in keys.items() if k != "engine.name"
            )
            name = f"{engine.name} ({words})" if words else engine.name
            try:
                run = trains(stack.enter_context(engine.open(experiment)))
                run()  # what does not fit says so here
            except (FederaError, RoundFailedError) as error:
                left_out[name] = str(error)
            else:
                rivals.append((name, keys, run))
        if config.engine.name not in {keys["engine.name"] for _, keys, _ in rivals}:
            left_out.setdefault(config.engine.name, "not measured here; --write leaves it in the recipe")
        return _interleaved(rivals, repeats, warm=True), left_out


def lines(result: Bench, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield what was measured as (what, figure) pairs."""
    where = ", one thread" if result.device == "cpu" else ""
    yield "cores", str(result.cores)
    yield "CPU kernels", result.kernels
    for timing in result.peaks:
        yield f"matrix product {timing.name}{where}", f"{_spread(timing, 1e9)} GFLOP/s"
    precision = str(result.best()["client.precision"])
    shares = result.shares(precision)
    yield (
        f"local step of {config.client.batch_size}, {precision}{where}",
        f"{1e3 * result.step_seconds:.0f} ms for {result.step_flops / 1e9:.1f} GFLOP:"
        f" {median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%}) of that product's pace",
    )
    groups: Sequence[tuple[str, list[Timing]]] = (
        ("precision", result.precisions),
        ("batch of", result.batches),
        ("engine", result.engines),
    )
    for title, timings in groups:
        top = max((timing.rate for timing in timings), default=0.0)  # few rows: no batch of 8
        for timing in timings:
            mark = "  <- fastest" if timing.rate == top else ""
            yield f"{title} {timing.name}", f"{_spread(timing, 1)} examples/s{mark}"
    for name, reason in result.left_out.items():
        yield f"engine {name}", f"left out: {reason}"


def _spread(timing: Timing, unit: float) -> str:
    low, high = min(timing.rates) / unit, max(timing.rates) / unit
    return f"{timing.rate / unit:.0f} ({low:.0f}-{high:.0f})"
