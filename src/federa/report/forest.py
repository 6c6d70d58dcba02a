"""Paired differences against the first method: dots with intervals, and the same in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from federa.report.cells import ALL_SETTINGS, Grid, Pair, method_name
from federa.report.palette import LIGHT, MARKERS, SERIES, series_colour
from federa.report.parts import marked
from federa.report.svg import drawing, inline_svg
from federa.report.tables import Table
from federa.report.words import NONE, capital, clip, points, signed


def by_setting(grid: Grid, pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs by the name of their setting, all settings together first, methods in order."""
    order = [ALL_SETTINGS, *grid.settings]
    if len(grid.settings) == 1 and any(pair.setting == grid.settings[0] for pair in pairs):
        order = list(grid.settings)  # all settings together would say the same again
    found = {
        setting: sorted((p for p in pairs if p.setting == setting), key=lambda p: grid.slot(p.method))
        for setting in order
    }
    names = {ALL_SETTINGS: capital(ALL_SETTINGS)}
    return {names.get(s, grid.name(s)): rows for s, rows in found.items() if rows}


def forests(grid: Grid, groups: Mapping[str, Sequence[Pair]]) -> list[tuple[str, Markup]]:
    """Return one picture a setting with its caption, all on one scale so that they can be compared."""
    ends = [v for rows in groups.values() for p in rows for v in (p.low, p.high, p.mean) if np.isfinite(v)]
    low, high = 100 * min([*ends, 0.0]), 100 * max([*ends, 0.0])
    room = 0.06 * (high - low) or 1.0
    first = method_name(grid.methods[0])
    compared = {pair.method for rows in groups.values() for pair in rows}
    methods = [method for method in grid.methods if method in compared]
    return [
        (
            name,
            inline_svg(
                forest_figure(grid, methods, rows, (low - room, high + room)),
                f"f{i}",
                f"{name}: {first} minus {', '.join(method_name(pair.method) for pair in rows)}",
            ),
        )
        for i, (name, rows) in enumerate(groups.items())
    ]


def forest_figure(
    grid: Grid, methods: Sequence[str], pairs: Sequence[Pair], limits: tuple[float, float]
) -> Figure:
    """Return a dot and an interval for each pair, and a line at zero.

    Args:
        grid: for the methods' colours.
        methods: one row each, so that the rows of several pictures are the same.
        pairs: of one setting; a method may lack one.
        limits: of the axis, in points.
    """
    with drawing():
        figure = Figure(figsize=(4.5, 0.55 + 0.26 * len(methods)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.grid(visible=True, axis="x")
        axes.axvline(0, color=LIGHT["muted"], linewidth=1.1, zorder=1)
        for pair in pairs:
            slot, place = grid.slot(pair.method), methods.index(pair.method)
            colour = series_colour(slot)
            if np.isfinite([pair.low, pair.high]).all():
                axes.hlines(place, 100 * pair.low, 100 * pair.high, color=colour, linewidth=2.2)
            axes.plot([100 * pair.mean], [place], MARKERS[slot % SERIES], color=colour, markersize=6.5)
        without = {*methods} - {pair.method for pair in pairs}
        for place in sorted(methods.index(method) for method in without):
            axes.annotate("no pair", (0, place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(methods)), labels=[clip(method_name(method)) for method in methods])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_xlim(*limits)
        axes.set_xlabel(clip(f"{method_name(grid.methods[0])} minus the other (points)", 60))
    return figure


def differences(grid: Grid, groups: Mapping[str, Sequence[Pair]]) -> Table:
    """Return the pairs in numbers; an interval that leaves out zero is marked."""
    first = method_name(grid.methods[0])
    head = [f"{first} minus", "mean", "sd", "95 % interval", f"pairs {first} won"]
    rows: list[list[str]] = []
    names: dict[int, str] = {}
    clear = set()
    for name, pairs in groups.items():
        names[len(rows)] = name
        for pair in pairs:
            known = bool(np.isfinite([pair.low, pair.high]).all())
            if known and not pair.low <= 0 <= pair.high:
                clear |= {(len(rows), 1), (len(rows), 3)}
            rows.append(
                [
                    marked(grid.slot(pair.method), method_name(pair.method)),
                    signed(100 * pair.mean),
                    points(100 * pair.spread),
                    f"{signed(100 * pair.low)} to {signed(100 * pair.high)}" if known else NONE,
                    f"{pair.wins:g} of {pair.pairs}",
                ]
            )
    return Table(head, rows, best=frozenset(clear), groups=names)
