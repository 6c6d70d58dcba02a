"""The page of a grid: settings by methods by seeds, from the results down to the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from federa.report.bands import setting_curves
from federa.report.cells import ALL_SETTINGS, Grid, GridCell, Pair, Reached, method_name, read_grid
from federa.report.costs import facts, to_target
from federa.report.curves import Curve
from federa.report.drift import drift
from federa.report.forest import by_setting, differences, forests
from federa.report.heat import heat_map
from federa.report.parts import holdings, legend_entry, partitions
from federa.report.recipes import environment, recipes, unlike
from federa.report.scores import metric, missing, results, sentence, when
from federa.report.svg import inline_svg
from federa.report.template import render
from federa.report.words import plural, points
from federa.state import write_atomically

__all__ = ["ALL_SETTINGS", "GridCell", "Pair", "Reached", "write_grid_report"]


def write_grid_report(
    title: str,
    cells: Sequence[GridCell],
    pairs: Sequence[Pair],
    reached: Sequence[Reached],
    to: Path,
    *,
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained page about a grid of runs.

    It needs no network and no other file, and the same inputs give the same bytes.

    Args:
        title: of the page.
        cells: the runs; a method may lack settings or seeds. Settings and methods are shown in their order.
        pairs: paired differences of the first method to each other one, by setting and for `all settings`.
        reached: what methods took to reach targets.
        to: the page's path.
        notes: what else a reader must know before trusting the figures.

    Returns:
        The page's path.

    Raises:
        FederaError: no cell, or a folder that is not a run directory.
    """
    grid = read_grid(cells, pairs, reached)
    write_atomically(
        to, render("grid.html.j2", ["page.css", "grid.css"], _context(title, grid, pairs, reached, notes))
    )
    return to


def _context(
    title: str, grid: Grid, pairs: Sequence[Pair], reached: Sequence[Reached], notes: Sequence[str]
) -> dict[str, Any]:
    """Return what the template fills in."""
    groups = by_setting(grid, pairs)
    drifts = [(setting, found) for setting in grid.settings if (found := drift(grid, setting)) is not None]
    return {
        "title": title,
        "sentence": sentence(grid, pairs),
        "warnings": [*missing(grid), *notes],
        "metric": metric(grid),
        "when": when(grid),
        "first": method_name(grid.methods[0]),
        "several_seeds": any(len(grid.seeds(setting)) > 1 for setting in grid.settings),
        "results": results(grid),
        "heat": heat_map(grid),
        "forests": forests(grid, groups),
        "differences": differences(grid, groups),
        "sections": _sections(grid),
        "to_target": to_target(grid, reached),
        "drifts": [
            {
                "name": grid.name(setting),
                "legend": _legend(grid, found.methods),
                "curves": _inline(found.curves, f"d{i}", found.methods),
                "layers": found.layers,
            }
            for i, (setting, found) in enumerate(drifts)
        ],
        "recipes": recipes(grid),
        "unlike": unlike(grid),
        "environment": environment(grid),
        "runs": plural(sum(map(len, grid.runs.values())), "run"),
    }


def _sections(grid: Grid) -> list[dict[str, Any]]:
    """Return what the page says about each setting; a partition that settings share is drawn once."""
    sections: list[dict[str, Any]] = []
    drawn: dict[tuple[str, ...], str] = {}
    for i, setting in enumerate(grid.settings):
        methods = grid.setting(setting)
        seed = min(seed for method in methods for seed in grid.runs[setting, method])
        names = [method for method in methods if seed in grid.runs[setting, method]]
        runs = [grid.runs[setting, method][seed] for method in names]
        before = drawn.setdefault(holdings(runs), setting)
        sections.append(
            {
                "name": grid.name(setting),
                "note": _best(grid, setting),
                "legend": _legend(grid, list(methods)),
                "curves": _inline(
                    setting_curves({grid.slot(method): runs for method, runs in methods.items()}),
                    f"c{i}",
                    list(methods),
                ),
                "facts": facts(grid, methods),
                "seed": seed,
                "same": grid.name(before) if before != setting else "",
                "partitions": partitions(runs, [method_name(m) for m in names], f"p{i}-")
                if before == setting
                else [],
            }
        )
    return sections


def _best(grid: Grid, setting: str) -> str:
    """Return the best method of a setting with its score."""
    means = {method: mean for method in grid.methods if (mean := grid.whole(setting, method)) is not None}
    best = max(means, key=lambda method: means[method], default=None)
    return f"best: {method_name(best)}, {points(means[best])}" if best is not None else ""


def _legend(grid: Grid, methods: Sequence[str]) -> list[tuple[str, str, str]]:
    return [legend_entry(grid.slot(method), method_name(method)) for method in methods]


def _inline(curves: Sequence[Curve], key: str, methods: Sequence[str]) -> list[tuple[str, Any]]:
    who = ", ".join(map(method_name, methods))
    return [
        (curve.title, inline_svg(curve.figure, f"{key}-{i}", f"{curve.title}: {who}"))
        for i, curve in enumerate(curves)
    ]
