"""The scores of a grid: the sentence below the title, the table of results, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from federa.report.cells import ALL_SETTINGS, Grid, Pair, method_name
from federa.report.load import Floats
from federa.report.parts import marked
from federa.report.summary import summarize
from federa.report.tables import Table, best_cells, repeats, warnings
from federa.report.words import NONE, capital, metric_words, plural, points, signed

_NOTES_TO = 8


def metrics(grid: Grid) -> dict[str, str]:
    """Return the primary metric of each setting, in words."""
    return {
        setting: metric_words(next(iter(grid.setting(setting).values()))[0].metric)
        for setting in grid.settings
    }


def metric(grid: Grid) -> str:
    """Return the metric of all settings in words; `the metric` where they differ."""
    names = set(metrics(grid).values())
    return names.pop() if len(names) == 1 else "the metric"


def when(grid: Grid) -> str:
    """Return which evaluations a final score is made of, in words."""
    runs = (run for cell in grid.runs.values() for run in cell.values())
    numbers = sorted({summarize(run).mean_of for run in runs})
    if numbers == [1]:
        return "after the last round"
    many = " to ".join(str(number) for number in sorted({numbers[0], numbers[-1]}))
    return f"as the mean of the last {many} evaluations"


def sentence(grid: Grid, pairs: Sequence[Pair]) -> str:
    """Return what was compared, and which method leads by how much."""
    seeds = sorted({len(grid.seeds(setting)) for setting in grid.settings})
    times = plural(seeds[-1], "seed") if len(seeds) == 1 else f"{seeds[0]} to {plural(seeds[-1], 'seed')}"
    several = len(grid.settings) > 1
    where = f"in {plural(len(grid.settings), 'setting')}" if several else f"on {grid.name(grid.settings[0])}"
    each = f"with {times} each" if several and seeds[-1] > 1 else f"with {times}"
    alike = f", {grid.shared} throughout" if grid.shared else ""
    return f"{plural(len(grid.methods), 'method')} {where} {each}{alike}. {_leader(grid, pairs)}"


def _leader(grid: Grid, pairs: Sequence[Pair]) -> str:
    """Return which method has the highest mean over settings, and how sure that is."""
    means = {method: grid.overall(method) for method in grid.methods}
    ranked = sorted(
        ((mean, method) for method, mean in means.items() if mean is not None), key=lambda item: -item[0]
    )
    if not ranked:
        return "No method finished every run, so none leads over all settings."
    of = f"of {metric(grid)}" + (" on the mean over settings" if len(grid.settings) > 1 else "")
    (top, first), *others = ranked
    told = f"{capital(method_name(first))} leads with {points(top)} points {of}"
    if not others:
        alone = len(grid.methods) > 1
        return told + ("; no other method finished every run." if alone else ".")
    second, name = others[0][1], method_name(others[0][1])
    difference = _difference(grid, pairs, first, second)
    if difference:
        return f"{told}; its paired difference to {name}, the second, is {difference}."
    told += f"; {name} follows with {points(others[0][0])}"
    difference = _difference(grid, pairs, first, grid.methods[0])
    if difference:
        return f"{told}. Its paired difference to {method_name(grid.methods[0])} is {difference}."
    return f"{told}."


def _difference(grid: Grid, pairs: Sequence[Pair], first: str, second: str) -> str:
    """Return the paired difference of two methods over all settings; empty where no pair tells it."""
    where = {ALL_SETTINGS, *(grid.settings if len(grid.settings) == 1 else ())}
    for pair in pairs:
        if pair.setting in where and {grid.methods[0], pair.method} == {first, second} and first != second:
            ahead = 1 if first == grid.methods[0] else -1
            low, high = sorted((ahead * pair.low, ahead * pair.high))
            told = f"{signed(100 * ahead * pair.mean)} points"
            if np.isfinite([low, high]).all():
                interval = f"{signed(100 * low)} to {signed(100 * high)}"
                told += f" (95 % interval {interval}" + (
                    ", which includes zero)" if low <= 0 <= high else ")"
                )
            return told
    return ""


def results(grid: Grid) -> Table:
    """Return one row a method: mean and spread over seeds in points, by setting and over all settings."""
    several, named = len(grid.settings) > 1, metrics(grid)
    differ = len(set(named.values())) > 1
    head = ["method", *(["mean over settings"] if several else [])]
    head += [grid.name(s) + (f": {named[s]}" if differ else "") for s in grid.settings]
    rows, values = [], []
    for slot, method in enumerate(grid.methods):
        overall = [grid.overall(method)] if several else []
        rows.append(
            [
                marked(slot, method_name(method)),
                *map(points, overall),
                *(_cell(grid.scores(s, method), len(grid.seeds(s))) for s in grid.settings),
            ]
        )
        values.append([*overall, *(grid.whole(s, method) for s in grid.settings)])
    return Table(head, rows, best=frozenset(best_cells(values, max, 1)))


def _cell(scores: Floats, seeds: int) -> str:
    """Return mean and sample standard deviation, and how many seeds they are of if some are missing."""
    if not scores.size:
        return NONE
    spread = f" ± {points(float(np.std(scores, ddof=1)))}" if scores.size > 1 else ""
    return (
        points(float(scores.mean()))
        + spread
        + (f" ({scores.size} of {seeds})" if scores.size < seeds else "")
    )


def missing(grid: Grid) -> list[str]:
    """Return what a reader must know before trusting the figures: runs that are missing or went astray."""
    notes = [f"{setting}: no finished run of any method; it is not on this page." for setting in grid.lost]
    for setting in grid.settings:
        seeds = grid.seeds(setting)
        here = [run for method in grid.methods for run in grid.runs.get((setting, method), {}).values()]
        notes += [f"{grid.name(setting)}: {note}" for note in repeats(here)]
        for method in grid.methods:
            who = f"{capital(method_name(method))} in {grid.name(setting)}"
            runs = grid.runs.get((setting, method), {})
            if not runs:
                notes.append(f"{who}: no finished run.")
            elif len(runs) < len(seeds):
                notes.append(f"{who}: {len(runs)} of {plural(len(seeds), 'seed')} finished.")
            notes += [f"{who}, seed {seed}: {note}" for seed, run in runs.items() for note in warnings(run)]
    if len(notes) > _NOTES_TO:
        notes[_NOTES_TO - 1 :] = [f"{plural(len(notes) - _NOTES_TO + 1, 'more note')} like these."]
    return notes
