"""Time to a target accuracy on other machines and links: finished runs, replayed on a clock.

A round lasts as long as its slowest client: download, training, upload. What a client sends and trains is
known from the run; how long training takes is what it took here, over the speed of the device. Nothing
overlaps. `benchmarks/shaped_links.py` holds this model beside real nodes on slow links.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from federa.checkpoint import RunDirectory
from federa.config import RunConfig, parse_config, read_yaml
from federa.experiment import build_experiment
from federa.server import make_jobs
from federa.state import write_atomically
from federa.types import FederaError, Job, Record

FRACTIONS = (0.8, 0.9, 0.95)
PARTS = ("compute", "transfer", "idle", "waiting")  # of a run's seconds; waiting is within the others


@dataclass(frozen=True, slots=True)
class Device:
    """A client's machine and its link.

    Attributes:
        up: megabits a second to the server.
        down: megabits a second from it.
        latency: milliseconds one way.
        speed: how many times as fast as the machine that the runs were made on it trains.
        turns: requests and answers of a job, one after the other; each costs twice the latency.
        idle: seconds of a round in which nobody trains or sends: the server's work, a middleware's polling.
    """

    up: float = 10.0
    down: float = 50.0
    latency: float = 40.0
    speed: float = 1.0
    turns: int = 1
    idle: float = 0.0

    def transfer(self, up: float, down: float) -> float:
        """Return the seconds that so many bytes up and down take."""
        return 8e-6 * (up / self.up + down / self.down) + 2e-3 * self.latency * self.turns


# Assumptions to start from, not measurements. A link is a stated one; `speed` is over one thread of the
# machine of docs/performance.md, whose step runs at 0.2 TFLOP/s: an AGX Orin's data sheet has 5.3 TFLOP/s
# (fp32, 2048 cores at 1.3 GHz), of which 30 % are taken; a phone is taken for a third of that thread.
DEVICES = {
    "laptop": Device(up=20.0, down=100.0, latency=20.0, speed=1.0),
    "phone": Device(up=10.0, down=50.0, latency=40.0, speed=0.3),
    "jetson-agx-orin": Device(up=10.0, down=50.0, latency=40.0, speed=8.0),
}


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a run up to some round.

    Attributes:
        total: by the clock.
        compute: of each round's slowest client.
        transfer: of each round's slowest client.
        idle: of the server and the middleware, in which nobody trains or sends.
        waiting: of a client, in the mean: it had answered and others had not.
    """

    total: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    idle: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """A finished run on a clock.

    Attributes:
        method: its name.
        setting: what else it has in common with the runs that it is compared with.
        seed: of the run.
        scores: the metric by round, where it was evaluated.
        spent: seconds up to the end of every round, from round 1.
    """

    method: str
    setting: str
    seed: int
    scores: Mapping[int, float]
    spent: Sequence[Spent]

    def reach(self, target: float) -> tuple[int, Spent] | None:
        """Return the first round evaluated at a target or above, and the seconds to its end, or None."""
        found = next((number for number, score in self.scores.items() if score >= target), None)
        return None if found is None else (found, self.spent[found - 1])


def replay(folder: Path, device: Device, setting: str = "", compute: float | None = None) -> Replay:
    """Return a run directory's rounds as they would last on other machines.

    Args:
        folder: of the run.
        device: of every client.
        setting: what the run has in common with others.
        compute: seconds of training an example; None for what the run itself took, beside whatever else was
            running then.

    Raises:
        FederaError: no finished run, or one of before rows were counted whose data are gone.
    """
    run = RunDirectory(folder)
    run.require()
    config, summary = parse_config(read_yaml(run.config)), run.read_json("result.json")
    held = run.read_json("partition.json")
    if summary is None or held is None:
        raise FederaError(f"{folder}: the run is not finished")
    records = run.records()
    metric = summary["metric"]
    scores = {record["round"]: float(record[metric]) for record in records if metric in record}
    if compute is None:
        compute = statistics.median(r["seconds_train"] / r["examples"] for r in records if r["examples"])
    rows = held.get("client_rows") or _rows_of_an_older_run(config, held)
    spent = list(_spent(config, records, (held["client_sizes"], rows), summary, device, each=compute))
    return Replay(config.method.name, setting, config.seed, scores, spent)


def _spent(
    config: RunConfig,
    records: Sequence[Record],
    clients: tuple[Sequence[int], Sequence[int]],
    summary: Mapping[str, Any],
    device: Device,
    *,
    each: float,
) -> Iterator[Spent]:
    whole, met = Spent(), set[int]()
    sizes, rows = clients
    for record in records:
        jobs = make_jobs(config, record["round"], sizes)
        up = record["bytes_up"] / max(1, record["clients"] + record["rejected"])
        down = 4.0 * summary["travelling_parameters"]
        times = []
        for client in (job.client_id for job in jobs):
            first = record["round"] > 1 and client not in met
            transfer = device.transfer(up, down + (summary["start_bytes"] if first else 0))
            times.append((each * _examples(config, rows[client]) / device.speed, transfer))
            met.add(client)
        compute, transfer = max(times, key=sum)
        last = compute + transfer
        whole = Spent(
            whole.total + last + device.idle,
            whole.compute + compute,
            whole.transfer + transfer,
            whole.idle + device.idle,
            whole.waiting + statistics.fmean(last - sum(time) for time in times),
        )
        yield whole


def _rows_of_an_older_run(config: RunConfig, held: Mapping[str, Any]) -> list[int]:
    """Return how many rows (windows of a text) each client has, of a run that did not write it down.

    Raises:
        FederaError: its data are no longer there.
    """
    if config.task.name == "classification":  # a text is a row
        return list(held["client_sizes"])
    return [len(part) for part in build_experiment(config).parts]


def _examples(config: RunConfig, size: int) -> int:
    """Return how many rows (texts, windows of a text) a client of so many trains on in a round."""
    client = config.client
    examples = client.epochs * size
    if client.max_steps is not None:
        examples = min(examples, client.max_steps * client.batch_size)
    return examples


def measure_compute(folders: Mapping[str, Path], repeats: int = 5) -> dict[str, float]:
    """Return the seconds of training an example, by name: jobs of four steps in turns, on one thread.

    What finished runs took is of no use to compare methods by where other work ran beside some of them.

    Args:
        folders: a finished run of every name.
        repeats: of each; the median counts. One more comes first, and does not.

    Raises:
        FederaError: a run whose recipe or data are no longer what they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in folders}
    experiments = {}
    try:
        for name, folder in folders.items():
            config = parse_config(read_yaml(RunDirectory(folder).config))
            client = config.client.model_copy(update={"max_steps": 4})
            experiments[name] = build_experiment(config.model_copy(update={"client": client}))
        for repeat in range(repeats + 1):
            for name, one in experiments.items():
                largest = int(np.argmax([len(rows) for rows in one.parts]))
                job = Job(repeat, largest, repeat, one.config.client.lr or 0.0)
                update, _ = one.trainer.train(one.params, one.train, one.parts[largest], job)
                times[name].append(update.metrics["seconds_train"] / update.metrics["examples"])
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def replay_comparison(folder: Path, device: Device, *, measure: bool = False) -> list[Replay]:
    """Return the finished runs of a comparison; with `measure` their training is timed anew, in turns.

    Raises:
        FederaError: no comparison, or none of its runs is finished.
    """
    if not (folder / "cells.csv").is_file():
        raise FederaError(f"{folder} is no comparison (it has no cells.csv)")
    rows = list(csv.DictReader(io.StringIO((folder / "cells.csv").read_text())))
    if rows and not {"status", "setting", "method", "folder"} <= rows[0].keys():
        raise FederaError(
            f"{folder}/cells.csv is no comparison's: it has no column status, setting, method or folder"
        )
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        raise FederaError(f"{folder}: none of its runs is finished")
    kinds = {f"{row['setting']}|{row['method']}": folder / row["folder"] for row in done}
    compute = measure_compute(kinds) if measure else {}
    return [
        replay(
            folder / row["folder"], device, row["setting"], compute.get(f"{row['setting']}|{row['method']}")
        )
        for row in done
    ]


def time_to_targets(
    replays: Sequence[Replay], fractions: Sequence[float] = FRACTIONS, reference: str = "ft"
) -> list[dict[str, Any]]:
    """Return a row for each setting, fraction and method: seconds to so much of the reference's best.

    Each seed has its own target: that share of the best that the reference reached with it. Seconds are the
    lower median over the seeds that reached it; where half or more did not, the method did not reach it.
    `reduction` is how much less they are than the reference's, `reduction_others` than those of the fastest
    method beside itself and the reference.

    Raises:
        FederaError: the reference is not among the runs.
    """
    rows = []
    for setting in dict.fromkeys(one.setting for one in replays):
        own = [one for one in replays if one.setting == setting]
        tops = {one.seed: max(one.scores.values()) for one in own if one.method == reference}
        best = {seed: score for seed, score in tops.items() if score > 0}  # shares of nothing are no targets
        if not best:
            raise FederaError(
                f"{setting}: no run of {reference} that learnt anything, whose best the targets are shares of"
            )
        for fraction in fractions:
            found = [
                _row(setting, fraction, method, [one for one in own if one.method == method], best)
                for method in dict.fromkeys(one.method for one in own)
            ]
            base = next(row["seconds"] for row in found if row["method"] == reference)
            for row in found:
                row["reference"] = reference
                row["reduction"] = _less(row["seconds"], base)
                rivals = [o["seconds"] for o in found if o["method"] not in (row["method"], reference)]
                fastest = min((t for t in rivals if t is not None), default=None)
                others = fastest if row["method"] != reference else None
                row["reduction_others"] = _less(row["seconds"], others)
            rows += found
    return rows


def _less(seconds: float | None, than: float | None) -> float | None:
    return 1 - seconds / than if seconds is not None and than else None


def _row(
    setting: str, fraction: float, method: str, runs: Sequence[Replay], best: Mapping[int, float]
) -> dict[str, Any]:
    runs = [one for one in runs if one.seed in best]
    reached = [one.reach(fraction * best[one.seed]) for one in runs]
    times = sorted((r for r in reached if r is not None), key=lambda r: r[1].total)
    row: dict[str, Any] = {"setting": setting, "fraction": fraction, "method": method}
    # With a seed whose run failed the method did not reach it either.
    row |= {"reached": len(times), "seeds": len(best)}
    if 2 * len(times) <= len(best):
        return row | dict.fromkeys(("rounds", "seconds", *PARTS))
    rounds, spent = times[(len(times) - 1) // 2]
    return row | {"rounds": rounds, "seconds": spent.total, **{part: getattr(spent, part) for part in PARTS}}


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `time_to_target.csv` and `.md`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "time_to_target.csv", out.getvalue().encode())
    header = headers(rows[0]["reference"])
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(shown(row)) for row in rows]
    write_atomically(folder / "time_to_target.md", "".join(f"| {line} |\n" for line in lines).encode())


def headers(reference: str) -> tuple[str, ...]:
    """Return the heads of the columns of `shown`; the next is the fastest beside itself and the reference."""
    first = ("setting", f"{reference}'s best", "method", "seeds", "rounds")
    return (*first, "time", *PARTS, f"less than {reference}", "than next")


def shown(row: Mapping[str, Any]) -> list[str]:
    """Return a row as people read it."""
    words = [row["setting"], f"{row['fraction']:.0%}", row["method"], f"{row['reached']} of {row['seeds']}"]
    if row["seconds"] is None:
        return [*words, *[""] * (2 + len(PARTS)), "not reached", ""]
    times = [_duration(row[key]) for key in ("seconds", *PARTS)]
    less = [row["reduction"], row["reduction_others"]]
    return [*words, str(row["rounds"]), *times, *("" if one is None else f"{one:.1%}" for one in less)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
