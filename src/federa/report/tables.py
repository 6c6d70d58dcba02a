"""Tiles and tables of a page, as words ready to be set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from federa.report.load import RunRecord, number
from federa.report.summary import per_client, summarize
from federa.report.words import (
    NONE,
    capital,
    count,
    listing,
    metric_words,
    plural,
    rough,
    score,
    size_words,
    time_words,
    trained_on,
)

_ROUND_COLUMNS = {
    "loss": ("loss", score),
    "clients": ("clients", count),
    "rejected": ("rejected", count),
    "examples": ("examples", count),
    "bytes_up": ("sent up", size_words),
    "bytes_down": ("sent down", size_words),
    "seconds_train": ("training time", time_words),
    "seconds_round": ("wall time", time_words),
}


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column names the row, numbers stand to the right.

    Attributes:
        head: the names of the columns.
        rows: cells in words.
        wordy: cells are text that wraps, and stand to the left.
        best: cells to stress, by row and column.
        groups: what stands above a row, by its place: the name of the rows from there on.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wordy: bool = False
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    groups: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    note: str = ""


def tiles(run: RunRecord) -> list[Tile]:
    """Return the key figures of a run, of those that are known."""
    told, name = summarize(run), metric_words(run.metric)
    at = f"round {count(told.best_round)} of {count(told.rounds)}" if told.best_round is not None else ""
    directions = f"{size_words(run.total('bytes_up'))} up · {size_words(run.total('bytes_down'))} down"
    clients, target = per_client(run), told.target
    spread = f"mean {score(clients.get('mean'))} · 10th percentile {score(clients.get('p10'))}"
    parts = run.result.get("seconds_start")
    start = number(sum(parts.values())) if isinstance(parts, dict) else None
    reached = f"{time_words(target.get('seconds'))} · {size_words(target.get('bytes'))}"
    found = [
        Tile(
            f"Final {name}",
            score(told.final),
            f"mean of the last {told.mean_of} evaluations" if told.mean_of > 1 else "",
        ),
        Tile(f"Best {name}", score(told.best), at),
        Tile("Worst client", score(told.worst), spread),
        Tile("Trained parameters", rough(told.trained), _share(run, told.trained)),
        Tile("Bytes sent", size_words(told.sent), directions),
        Tile(
            "Time",
            time_words(told.seconds),
            f"{time_words(start)} of it to start" if start is not None else "",
        ),
        Tile(
            f"To {score(target.get('value'))}", f"round {count(target['round'])}" if target else NONE, reached
        ),
    ]
    return [tile for tile in found if tile.value != NONE]


def warnings(run: RunRecord) -> list[str]:
    """Return what a reader must know before trusting the figures."""
    notes = []
    planned = number(run.setting("rounds"))
    if not run.result:
        done = plural(len(run.rounds), "round")
        notes.append(
            f"Not finished: {done}" + (f" of {count(planned)} recorded." if planned else " recorded.")
        )
    for key, name in (("loss", "The loss"), (run.metric, capital(metric_words(run.metric)))):
        bad = [count(r["round"]) for r in run.rounds if r.get(key) is not None and number(r[key]) is None]
        if bad:
            shown = bad if len(bad) <= 8 else [*bad[:7], f"{len(bad) - 7} more"]
            notes.append(f"{name} was not a finite number in round {listing(shown)}.")
    return notes


def repeats(runs: Sequence[RunRecord]) -> list[str]:
    """Return what to say, once for all runs, of evaluation examples that are trained on, if they are many."""
    told = (
        trained_on(
            run.partition.get("evaluation_examples_trained_on"), run.partition.get("evaluation_examples")
        )
        for run in runs
    )
    return list(dict.fromkeys(f"{note}: scores flatter." for note in told if note))


def comparison(runs: Sequence[RunRecord], labels: Sequence[str]) -> Table:
    """Return one row a run; the best in each column of scores and costs is marked."""
    names = listing(list(dict.fromkeys(metric_words(run.metric) for run in runs)))
    told = [summarize(run) for run in runs]
    numbers = {one.mean_of for one in told}
    of = f", mean of the last {max(numbers)}" if len(numbers) == 1 and numbers != {1} else ""
    head = [
        "run",
        f"final {names}{of}",
        "best",
        "worst client",
        "trained",
        "sent",
        "time",
        "rounds",
        "to target",
    ]
    rows = [
        [
            label,
            *(score(one.final), score(one.best), score(one.worst)),
            *(rough(one.trained), size_words(one.sent), time_words(one.seconds), count(one.rounds)),
            f"round {count(one.target['round'])}, {size_words(one.target.get('bytes'))}"
            if one.target
            else NONE,
        ]
        for one, label in zip(told, labels, strict=True)
    ]
    higher = [[one.final, one.best, one.worst] for one in told]
    lower = [[one.trained, one.sent, one.seconds] for one in told]
    return Table(head, rows, best=frozenset(best_cells(higher, max, 1) | best_cells(lower, min, 4)))


def best_cells(
    table: Sequence[Sequence[float | None]], pick: Callable[[Iterable[float]], float], first: int
) -> set[tuple[int, int]]:
    """Return the cells that are best in their column, of columns with a difference.

    Args:
        table: values by row and column; None where there is none.
        pick: `max` or `min`.
        first: the place of the first of these columns in the whole table.
    """
    cells = set()
    for column, values in enumerate(zip(*table, strict=True), first):
        known = {value for value in values if value is not None}
        if len(known) > 1:
            cells |= {(row, column) for row, value in enumerate(values) if value == pick(known)}
    return cells


def rounds_table(run: RunRecord) -> Table:
    """Return one row a round, of the columns that were recorded."""
    columns = {run.metric: (metric_words(run.metric), score), **_ROUND_COLUMNS}
    used = [key for key in columns if any(record.get(key) is not None for record in run.rounds)]
    rows = [[count(r["round"]), *(columns[key][1](r.get(key)) for key in used)] for r in run.rounds]
    return Table(["round", *(columns[key][0] for key in used)], rows)


def rejections(run: RunRecord) -> Table | None:
    """Return the clients whose updates did not count, with the reasons; None where all did."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for record in run.rounds:
        verdicts = record.get("verdicts")
        for client, verdict in verdicts.items() if isinstance(verdicts, Mapping) else ():
            if verdict != "ok":
                reasons[str(client)][str(verdict)] += 1
    if not reasons:
        return None
    ranked = sorted(reasons.items(), key=lambda item: (-item[1].total(), len(item[0]), item[0]))
    rows = [
        [client, count(told.total()), "; ".join(f"{why} ({times})" for why, times in told.most_common())]
        for client, told in ranked
    ]
    return Table(["client", "rejected", "reason (times)"], rows, wordy=True)


def sizes_table(run: RunRecord) -> Table | None:
    """Return how the examples are spread over the clients, None where it is not known."""
    sizes = run.sizes
    if not sizes.size:
        return None
    low, middle, high = np.percentile(sizes, [10, 50, 90])
    head = [
        "clients",
        "examples",
        "smallest",
        "10th percentile",
        "median",
        "90th percentile",
        "largest",
        "empty",
    ]
    values = [len(sizes), sizes.sum(), sizes.min(), low, middle, high, sizes.max(), int((sizes == 0).sum())]
    counts = run.counts
    if counts.size and counts.sum() > 0:
        held = counts[counts.sum(axis=1) > 0]
        head.append("largest group, mean share")
        share = float((held.max(axis=1) / held.sum(axis=1)).mean())
        return Table(head, [[*map(count, map(float, values)), f"{100 * share:.0f} %"]])
    return Table(head, [[*map(count, map(float, values))]])


def _share(run: RunRecord, trained: float | None) -> str:
    """Return how much of the model trains, and how much travels where that differs."""
    total = number(run.result.get("total_parameters"))
    travels = number(run.result.get("travelling_parameters"))
    notes = [f"{100 * trained / total:.3g} % of {rough(total)}"] if trained is not None and total else []
    if travels is not None and travels != trained:
        notes.append(f"{rough(travels)} travel")
    return " · ".join(notes)
