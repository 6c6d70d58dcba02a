"""What methods cost: in each setting, and until they reach a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from federa.report.cells import Grid, Reached, method_name
from federa.report.load import RunRecord, number
from federa.report.parts import marked
from federa.report.summary import summarize
from federa.report.tables import Table, best_cells
from federa.report.words import NONE, count, points, rough, size_words, time_words


def facts(grid: Grid, methods: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Return one row a method of a setting: learning rate, parameters, and costs a round.

    Args:
        grid: for the methods' colours.
        methods: the runs of the setting.
    """
    head = ["method", "learning rate", "trained parameters", "of the model", "sent a round", "time a round"]
    rows = [
        [
            marked(grid.slot(method), method_name(method)),
            _rates(runs),
            rough(summarize(runs[0]).trained),
            _share(runs[0]),
            size_words(_mean([_each_round(run, "bytes_up", "bytes_down") for run in runs])),
            time_words(_mean([_each_round(run, "seconds_round") for run in runs])),
            " · ".join(_times(runs)),
            " · ".join(points(None if (f := summarize(run).final) is None else 100 * f) for run in runs),
        ]
        for method, runs in methods.items()
    ]
    return Table([*head, "rounds", "final, each seed"], rows)


def _rates(runs: Sequence[RunRecord]) -> str:
    """Return the learning rates of a method's runs, which are one unless seeds chose for themselves."""
    rates = [number(run.setting("client.lr")) for run in runs]
    return " · ".join(dict.fromkeys(NONE if rate is None else f"{rate:g}" for rate in rates))


def _times(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(count(summarize(run).rounds) for run in runs))


def _share(run: RunRecord) -> str:
    trained, total = summarize(run).trained, number(run.result.get("total_parameters"))
    return f"{100 * trained / total:.3g} %" if trained is not None and total else NONE


def _each_round(run: RunRecord, *keys: str) -> float | None:
    """Return the mean over rounds of the sum of some columns; None where a run recorded none of them."""
    values = np.array([run.column(key) for key in keys])
    return float(np.nansum(values) / len(run.rounds)) if np.isfinite(values).any() else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def to_target(grid: Grid, reached: Sequence[Reached]) -> Table:
    """Return rounds, bytes and seconds to each target; the least of each is marked."""
    groups: dict[tuple[str, str], list[Reached]] = {}
    for one in reached:
        groups.setdefault((one.setting, one.target), []).append(one)
    rows: list[list[str]] = []
    names: dict[int, str] = {}
    best: set[tuple[int, int]] = set()
    for (setting, target), group in groups.items():
        names[len(rows)] = f"{grid.name(setting)}: {target}"
        group = sorted(group, key=lambda one: grid.slot(one.method))
        costs = [[one.rounds, one.bytes, one.seconds] for one in group]
        best |= {(len(rows) + row, column) for row, column in best_cells(costs, min, 1)}
        rows += [
            [
                marked(grid.slot(one.method), method_name(one.method)),
                "not reached" if one.rounds is None else f"{round(one.rounds, 1):g}",
                size_words(one.bytes),
                time_words(one.seconds),
                f"{one.seeds} of {one.of}",
            ]
            for one in group
        ]
    head = ["method", "rounds", "sent", "time", "seeds that reached it"]
    return Table(head, rows, best=frozenset(best), groups=names)
