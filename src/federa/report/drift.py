"""How the clients' updates lie to each other, by round and by layer, from `diagnostics.jsonl`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from federa.report.bands import Points, band
from federa.report.cells import Grid, merged, method_name
from federa.report.curves import Curve, Line, curve_figure
from federa.report.load import RunRecord, number, read_records
from federa.report.tables import Table
from federa.report.words import NONE, clip, count
from federa.types import Record

_QUANTITIES = (
    ("cosine", "Cosine to the mean update", "cosine"),
    ("norm_spread", "Spread of the updates' lengths", "sd / mean of the norms"),
    ("aggregation_error", "Aggregation error", "error / mean update"),
)
_TICKS_TO = 13
_BLOCK = re.compile(r"\.(\d{1,6})(?=\.|$)")
_BEHIND = 10**6


@dataclass(frozen=True)
class Drift:
    """What a setting's runs recorded.

    Attributes:
        methods: that recorded any.
        curves: each quantity over rounds, and by layer where layers were recorded.
        layers: the cosine by layer in numbers, with the layers' names; None where there are none.
    """

    methods: Sequence[str]
    curves: Sequence[Curve]
    layers: Table | None


def drift(grid: Grid, setting: str) -> Drift | None:
    """Return a setting's update drift, None where no run recorded it."""
    recorded = {method: _recorded(runs) for method, runs in grid.setting(setting).items()}
    recorded = {method: runs for method, runs in recorded.items() if runs}
    if not recorded:
        return None
    names = in_blocks([_layer_names(runs[0]) for runs in recorded.values()])
    curves = []
    for key, title, label in _QUANTITIES:
        rounds = _lines(grid, {m: [_over_rounds(run, key) for run in runs] for m, runs in recorded.items()})
        layers = _lines(
            grid, {m: [_over_layers(run, key, names) for run in runs] for m, runs in recorded.items()}
        )
        if rounds:
            curves.append(Curve(f"{title}, by round", curve_figure(rounds, "round", label, whole=True)))
        if layers:
            curves.append(Curve(f"{title}, by layer", _layer_figure(layers, label, names)))
    return Drift(list(recorded), curves, _table(recorded, names) if names else None)


def in_blocks(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return the layers of several methods in one order: as they are named, block by block of the model.

    A layer that several methods train has one place; what a method adds to a block stands with that block.
    """
    places: dict[str, int] = {}
    for names in lists:
        last = -1
        for name in names:
            block = _block(name)
            last = last if block is None else max(last, int(block))
            # What stands before all blocks (embeddings) or behind them (a pooler) has no number.
            places.setdefault(name, (-1 if last < 0 else _BEHIND) if block is None else int(block))
    return sorted(merged(lists), key=lambda name: places[name])


def _block(name: str) -> str | None:
    """Return the number of the block that a layer's name gives first, None without one."""
    found = _BLOCK.search(f".{name}")
    return found[1] if found else None


def _recorded(runs: Sequence[RunRecord]) -> list[list[Record]]:
    """Return the diagnostics of each run that has any."""
    return [records for run in runs if (records := read_records(run.folder / "diagnostics.jsonl"))]


def _layers(record: Record) -> Mapping[str, Mapping[str, object]]:
    layers = record.get("layers")
    if not isinstance(layers, Mapping):
        return {}
    return {str(name): figures for name, figures in layers.items() if isinstance(figures, Mapping)}


def _layer_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in _layers(record)))


def _over_rounds(records: Sequence[Record], key: str) -> Points:
    found = {float(record["round"]): number(record.get(key)) for record in records}
    return {at: value for at, value in found.items() if value is not None}


def _over_layers(records: Sequence[Record], key: str, names: Sequence[str]) -> Points:
    """Return a run's means over rounds by the place of the layer."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, figures in _layers(record).items():
            value = number(figures.get(key))
            if value is not None:
                values.setdefault(name, []).append(value)
    return {float(at): float(np.mean(values[name])) for at, name in enumerate(names) if name in values}


def _lines(grid: Grid, methods: Mapping[str, Sequence[Points]]) -> list[Line]:
    """Return a line with its band for each method that has points."""
    lines = [band(grid.slot(method), runs) for method, runs in methods.items()]
    return [line for line in lines if line.x.size]


def _layer_figure(lines: Sequence[Line], label: str, names: Sequence[str]) -> Figure:
    """Return lines over layers, with a tick where each block of the model begins."""
    blocks: dict[str, int] = {}
    for at, name in enumerate(names):
        block = _block(name)
        if block is not None:
            blocks.setdefault(block, at)
    figure = curve_figure(lines, "layer, by the block it is in" if blocks else "layer", label, whole=True)
    if blocks:
        step = -(-len(blocks) // _TICKS_TO)
        figure.axes[0].set_xticks(list(blocks.values())[::step], labels=[clip(b) for b in blocks][::step])
    return figure


def _table(recorded: Mapping[str, Sequence[Sequence[Record]]], names: Sequence[str]) -> Table:
    """Return the cosine by layer, mean over rounds and seeds."""
    columns = []
    for runs in recorded.values():
        line = band(0, [_over_layers(run, "cosine", names) for run in runs])
        columns.append(dict(zip(line.x.tolist(), line.y.tolist(), strict=True)))
    rows = [
        [name, count(at), *(f"{column[at]:.3f}" if at in column else NONE for column in columns)]
        for at, name in enumerate(names)
    ]
    return Table(["layer", "place", *map(method_name, recorded)], rows)
