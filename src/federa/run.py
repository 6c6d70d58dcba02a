"""THE round loop: jobs, updates, the next state, evaluation, record, checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from federa.checkpoint import RunDirectory
from federa.config import RunConfig, parse_config, read_yaml
from federa.diagnostics import diagnose
from federa.engines import Clients
from federa.environment import environment
from federa.evaluation import Evaluator
from federa.experiment import Experiment, build_experiment, resolve
from federa.machine import cache_folder
from federa.methods.lora import lora_layers
from federa.server import OK, finish_round, make_jobs
from federa.state import load_state, num_bytes, write_atomically
from federa.trackers import require_trackers, start_tracker
from federa.types import Absence, FederaError, Job, Record, ServerState, State, Update
from federa.wires import Wired


class Observer:
    """Is told how a run goes; the methods do nothing, override those of interest."""

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """The run is about to do the round after those recorded (none at a fresh start)."""

    def updated(self, update: Update, of: int) -> None:
        """One client of a round of `of` has answered."""

    def evaluating(self, done: int, of: int) -> None:
        """`done` of `of` batches are evaluated."""

    def finished_round(self, record: Record) -> None:
        """A round is recorded (and is in the checkpoint)."""


class Place:
    """Where the clients of a run are: the simulator's are in this process and its workers."""

    def build(
        self, config: RunConfig, init: State | None, kept: Path | None, base: str | None, cache: Path | None
    ) -> Experiment:
        """Return the experiment of a recipe; the arguments are those of `build_experiment`."""
        return build_experiment(config, init, kept, base=base, cache=cache)

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[Clients]:
        """Start what answers the jobs of a round, and stop it at the end of the block."""
        config = experiment.config
        with config.engine.open(experiment) as session:
            yield Wired(session, config.wire, experiment.remainders, config.privacy)


HERE = Place()


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gives back.

    Attributes:
        config: the resolved recipe.
        state: the final state.
        records: one object a round, as in `metrics.jsonl`.
        summary: as in `result.json`.
        folder: the run directory, if there is one.
    """

    config: RunConfig
    state: ServerState
    records: list[Record]
    summary: dict[str, Any]
    folder: Path | None = None


@dataclass(slots=True)
class _Loop:
    """What the round loop works with."""

    experiment: Experiment
    session: Clients
    evaluator: Evaluator
    observer: Observer
    folder: RunDirectory | None
    reached: set[int]  # the clients that any cohort so far held
    seconds_start: dict[str, float]
    records: list[Record] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.experiment.config


def run(
    config: RunConfig | None = None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    place: Place = HERE,
) -> Result:
    """Run a recipe from the start, or go on where it was cut off.

    Args:
        config: the recipe; None for the embedded default, or with `resume` for the directory's own.
        out: the run directory; None keeps nothing.
        resume: go on from the directory's checkpoint; none yet means round 0. A finished run stays as it is.
        observer: is told how it goes.
        place: where the clients are; this machine, unless a federation of several says otherwise.

    Raises:
        FederaError: a mistake in the recipe, the data or the directory; nothing is written then.
        RoundFailedError: too few updates of a round counted; the checkpoint holds the round before.
    """
    folder = RunDirectory(Path(out)) if out is not None else None
    resumed = folder is not None and resume and (folder.started or config is None)
    if resumed:
        assert folder is not None
        config = _stored_config(folder, config)
        done = _finished(folder, config)
        if done is not None:
            return done
    elif folder is not None and not folder.free:
        remedy = "give another, or --resume to go on with it" if folder.started else "give another"
        raise FederaError(f"--out: {folder.path} is there already and is not an empty directory; {remedy}")
    config = resolve(config or RunConfig())
    require_trackers(config.track)
    with ExitStack() as stack:
        if folder is not None:
            clear = None if resumed else _remove_on_mistake(folder)
            if clear is not None:
                write_atomically(folder.config, config.to_yaml().encode())
            stack.enter_context(folder.locked())
            if clear is not None:
                stack.push(clear)
        experiment, state, records = _prepare(config, folder, place)
        session = stack.enter_context(place.open(experiment))
        first_start = (folder.read_json("environment.json") or {}).get("seconds_start") if folder else None
        reached = set(experiment.trained_clients(state.round))
        start = first_start or experiment.seconds
        watching = observer or Observer()
        evaluator = Evaluator(experiment, session, watching.evaluating)
        loop = _Loop(experiment, session, evaluator, watching, folder, reached, start, records)
        loop.observer.started(experiment, tuple(records))
        state = _rounds(loop, state)
        summary = _summarise(loop, state)
    if folder is not None:
        folder.write_json("result.json", summary)
        _write_report(folder)
    return Result(config, state, loop.records, summary, folder.path if folder else None)


def _write_report(folder: RunDirectory) -> None:
    from federa.report.page import write_report  # with matplotlib, half a second of every start

    write_report([folder.path], folder.report)


def _remove_on_mistake(folder: RunDirectory) -> Callable[..., None]:
    """Return an exit callback that removes what a run with a mistake in its recipe has written."""
    missing = [path for path in (folder.path, *folder.path.parents) if not path.exists()]

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, FederaError) and not folder.state.exists():
            for child in folder.path.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            with suppress(OSError):  # somebody else may have put something there
                for made in missing:
                    made.rmdir()

    return leave


def _stored_config(folder: RunDirectory, asked: RunConfig | None) -> RunConfig:
    """Return the directory's recipe; one that is asked for must be the same.

    Raises:
        FederaError: no run directory, or another recipe.
    """
    folder.require()
    stored = parse_config(read_yaml(folder.config))
    if asked is not None:
        if asked.client.precision == "auto":
            asked = asked.replace(**{"client.precision": stored.client.precision})
        if asked.device == "auto":
            asked = asked.replace(device=stored.device)
        had, asks = (dict(_flat(config.model_dump(mode="json"))) for config in (stored, asked))
        # Over the keys of both: an optional section has keys in one of them only.
        for key in {**had, **asks}:
            one, other = had.get(key), asks.get(key)
            if one != other:
                raise FederaError(
                    f"--resume: {folder.path} was started with {key}={one!r}, not {other!r}; "
                    "resume it without a recipe, or start another run"
                )
    return stored


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:  # a section that is not there
            yield f"{prefix}{key}", value


def _finished(folder: RunDirectory, config: RunConfig) -> Result | None:
    """Return the result of a directory whose run is over, else None."""
    summary = folder.read_json("result.json")
    if summary is None or not folder.report.is_file():
        return None
    return Result(config, folder.load_checkpoint(), folder.records(), summary, folder.path)


def _prepare(
    config: RunConfig, folder: RunDirectory | None, place: Place
) -> tuple[Experiment, ServerState, list[Record]]:
    """Build the experiment, and find the state to go on from."""
    if folder is not None and folder.init.is_file():
        init, metadata = load_state(folder.init)
        experiment = place.build(config, init, folder.kept, metadata.get("fingerprint", ""), None)
        held = folder.read_json("partition.json") or {}
        if held.get("fingerprint") != experiment.data_fingerprint():
            raise FederaError(
                f"--resume: the data are not those that {folder.path} was started with; "
                "put the old files back, or start another run"
            )
        if folder.state.is_file():
            state = folder.load_checkpoint()
            return experiment, state, folder.rewind(state.round)
    else:
        experiment = place.build(config, None, folder.kept if folder else None, None, cache_folder())
    state = ServerState(0, experiment.params, config.server_optimizer.init(experiment.params))
    if folder is not None:
        folder.write_json("environment.json", {**environment(), "seconds_start": experiment.seconds})
        folder.write_json("partition.json", partition_summary(experiment))
        folder.write_json("labels.json", {"labels": experiment.labels})
        folder.save_init(experiment.params, experiment.fingerprint)
        folder.rewind(0)
    return experiment, state, []


def _rounds(loop: _Loop, state: ServerState) -> ServerState:
    """Do the rounds that are left, and return the final state."""
    config, experiment = loop.config, loop.experiment
    sizes = [len(part) for part in experiment.parts]
    with ExitStack() as stack:
        trackers = []
        if loop.folder is not None:
            for name in config.track:
                trackers.append(start_tracker(name, loop.folder.path))
                stack.callback(trackers[-1].close)
        while state.round < config.rounds and not _target_reached(loop):
            began = time.perf_counter()
            jobs = make_jobs(config, state.round + 1, sizes)
            seen: list[Update] | None = [] if config.diagnostics else None
            updates, sent = _watched(loop, state.params, jobs, seen), state.params
            state, summary = finish_round(config, state, jobs, updates, sizes)
            new = {job.client_id for job in jobs} - loop.reached
            loop.reached |= new
            # In round 1 the current state is the round-0 state: nothing is sent beside it.
            beside = experiment.sizes["start_bytes"] * len(new) if state.round > 1 else 0
            record: Record = {"round": state.round, "loss": summary.loss}
            every = config.evaluate_every
            if state.round == config.rounds or (every and state.round % every == 0):
                record |= loop.evaluator.score(state.params, loop.reached)
            if config.privacy is not None:
                record["epsilon"] = config.privacy.epsilon(state.round, config.cohort, len(sizes))
            rejected = len(summary.verdicts) - summary.accepted
            record |= {
                "clients": summary.accepted,
                "rejected": rejected,
                "verdicts": {str(client): v for client, v in sorted(summary.verdicts.items())},
                "examples": summary.examples,
                "bytes_up": config.wire.size(state.params) * (len(summary.verdicts) - summary.absent),
                "bytes_down": num_bytes(state.params) * len(jobs) + beside,
                "seconds_train": summary.seconds_train,
                "seconds_round": time.perf_counter() - began,
            }
            loop.records.append(record)
            if loop.folder is not None:
                loop.folder.append(record, _diagnosed(loop, sent, seen, state.round, summary.verdicts))
                loop.folder.save_checkpoint(state)
            for tracker in trackers:
                tracker.log(record)
            loop.observer.finished_round(record)
    return state


def _watched(
    loop: _Loop, params: State, jobs: list[Job], seen: list[Update] | None
) -> Iterator[Update | Absence]:
    for update in loop.session.train(params, jobs):
        if isinstance(update, Absence):
            yield update
            continue
        loop.observer.updated(update, len(jobs))
        if seen is not None:
            seen.append(update)
        yield update


def _diagnosed(
    loop: _Loop, sent: State, seen: list[Update] | None, number: int, verdicts: Mapping[int, str]
) -> Record | None:
    """Return the diagnostics of a round whose updates were kept, or None."""
    counted = [update for update in seen or () if verdicts[update.job.client_id] == OK]
    if len(counted) < 2:
        return None
    trainer = loop.experiment.trainer
    scales = {name: layer.scale for name, layer in lora_layers(trainer.model)}
    deltas = [update.delta for update in counted]
    weighted = getattr(loop.config.aggregator, "weighted", True)
    weights = [update.weight if weighted else 1.0 for update in counted]
    return {"round": number, **diagnose(sent, deltas, weights, trainer.head, scales)}


def _target_reached(loop: _Loop) -> bool:
    metric, target = loop.config.task.primary, loop.config.target
    return target is not None and bool(loop.records) and loop.records[-1].get(metric, -np.inf) >= target


def _summarise(loop: _Loop, state: ServerState) -> dict[str, Any]:
    """Return what `result.json` says."""
    experiment, config, records = loop.experiment, loop.config, loop.records
    metric = config.task.primary
    scored = [r for r in records if metric in r]
    best = max(scored, key=lambda r: float(r[metric]))
    return {
        "metric": metric,
        "head": config.method.head,
        "final": float(np.mean([r[metric] for r in scored[-config.final_mean_of :]])),
        "best": best[metric],
        "best_round": best["round"],
        "rounds": state.round,
        **experiment.sizes,
        "bytes_up": sum(r["bytes_up"] for r in records),
        "bytes_down": sum(r["bytes_down"] for r in records),
        "per_client": loop.evaluator.per_client(state.params, loop.reached),
        "target": _target(config.target, metric, records),
        "fingerprint": experiment.fingerprint,
        "seconds_start": loop.seconds_start,
        "seconds_train": sum(r["seconds_train"] for r in records),
        "seconds_rounds": sum(r["seconds_round"] for r in records),
        "seconds_total": sum(loop.seconds_start.values()) + sum(r["seconds_round"] for r in records),
    }


def _target(target: float | None, metric: str, records: Iterable[Record]) -> dict[str, float] | None:
    """Return when the target was first reached: round, seconds and bytes up to then."""
    seconds = sent = 0.0
    for record in records:
        seconds += record["seconds_round"]
        sent += record["bytes_up"] + record["bytes_down"]
        if target is not None and record.get(metric, -np.inf) >= target:
            return {"value": target, "round": record["round"], "bytes": sent, "seconds": seconds}
    return None


def partition_summary(experiment: Experiment) -> dict[str, Any]:
    """Return what `partition.json` says: who holds how many examples of what, and as how many rows."""
    return {
        "client_sizes": experiment.counts.sum(axis=1).tolist(),
        "client_rows": [len(rows) for rows in experiment.parts],
        "groups": experiment.groups.names,
        "data": experiment.data_fingerprint(parts=False),
        "fingerprint": experiment.data_fingerprint(),
        "counts": experiment.counts.tolist(),
        "evaluation_examples": experiment.evaluation.num_examples,
        "evaluation_examples_trained_on": experiment.trained_on,
    }
