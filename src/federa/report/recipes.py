"""What the runs of a grid were told and what they ran on, each thing said once."""

from __future__ import annotations

from collections import Counter

from federa.report.cells import Grid, method_name
from federa.report.load import flatten
from federa.report.naming import differing
from federa.report.tables import Table
from federa.report.words import NONE, count, plural

_VALUES_TO = 4


def recipes(grid: Grid) -> list[tuple[str, str, str]]:
    """Return one recipe a setting: its name, whose it is, and its text."""
    found = []
    for setting in grid.settings:
        method = next(iter(grid.setting(setting)))
        seed, run = next(iter(grid.runs[setting, method].items()))
        found.append((grid.name(setting), f"{method_name(method)}, seed {seed}", run.recipe))
    return found


def unlike(grid: Grid) -> Table | None:
    """Return the recipes' keys that differ between methods of one setting, with the values they have."""
    keys: dict[str, None] = {}
    for setting in grid.settings:
        firsts = [runs[0] for runs in grid.setting(setting).values()]
        keys |= dict.fromkeys(key for key in differing(firsts) if key != "seed")
    if not keys:
        return None
    values: dict[str, dict[str, dict[str, None]]] = {key: {} for key in keys}
    for (_, method), runs in grid.runs.items():
        for run in runs.values():
            leaves = dict(flatten(run.config))
            for key in keys:
                told = str(leaves[key]) if key in leaves else NONE
                values[key].setdefault(method, {})[told] = None
    rows = [[key, *(_listed(values[key].get(method, {})) for method in grid.methods)] for key in keys]
    return Table(["key", *map(method_name, grid.methods)], rows, wordy=True)


def _listed(values: dict[str, None]) -> str:
    shown = list(values)[:_VALUES_TO]
    more = len(values) - len(shown)
    return "; ".join([*shown, *([f"{count(more)} more"] if more else [])]) or NONE


def environment(grid: Grid) -> Table:
    """Return what the runs ran on; where they differ, each value with the number of its runs."""
    found: dict[str, Counter[str]] = {}
    for runs in grid.runs.values():
        for run in runs.values():
            for key, value in flatten(run.environment):
                if not key.startswith("seconds"):  # how long it took to start is every run's own
                    found.setdefault(key, Counter())[str(value)] += 1
    rows = []
    for key, values in found.items():
        told = [f"{value} ({plural(times, 'run')})" for value, times in values.items()]
        rows.append([key, next(iter(values)) if len(values) == 1 else "; ".join(told)])
    return Table(["what", "value"], rows, wordy=True)
