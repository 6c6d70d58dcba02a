"""The learning rate of every method in every setting: chosen once, on examples that no run is judged on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from federa.checkpoint import RunDirectory
from federa.compare.execute import Runner, Say, Summary, Told, require_same_data
from federa.compare.grid import Comparison, Setting
from federa.state import write_atomically


def tuned_rates(comparison: Comparison, runner: Runner, say: Say) -> dict[tuple[str, str], float | None]:
    """Return the learning rate of every method in every setting: the best on held-out examples.

    A method that failed at all of its rates is left out, and told of; the others go on. What was chosen is
    kept in `tune/chosen.json`: a run that failed and would not fail again must not change the rate of runs
    that are finished.
    """
    by_name = {setting.name: setting for setting in comparison.settings}
    # The best first: those that trained longest, by their score, then those that came off worse before.
    ranked: dict[tuple[str, str], list[float]] = {}
    for name in by_name:
        for method in comparison.grid.methods:
            ranked[name, method] = list(comparison.grid.lrs.get(method, ()))
    plans = {key: comparison.rungs(by_name[key[0]], key[1]) for key in ranked}
    kept = _Chosen(comparison, by_name, runner.folder, plans)
    for key, lr in kept.standing().items():
        ranked[key], plans[key] = [lr], []
    for rung in range(max(len(plan) for plan in plans.values())):
        tried = {
            (key, lr): comparison.tuning(by_name[key[0]], key[1], lr, plan[rung][1])
            for key, plan in plans.items()
            if rung < len(plan)
            for lr in ranked[key][: plan[rung][0]]
        }
        results = runner.run(list(tried.values()), Told(len(tried), say))
        done = [cell for cell in tried.values() if results[cell.folder] is not None]
        require_same_data(runner.folder, done)
        scores = {key: _score(results[cell.folder]) for key, cell in tried.items()}
        kept.failed |= {key for (key, _), cell in tried.items() if results[cell.folder] is None}
        for key, lrs in ranked.items():
            known = [lr for lr in lrs if math.isfinite(scores.get((key, lr), math.nan))]
            better = sorted(known, key=lambda lr: -scores[key, lr])
            ranked[key] = [*better, *(lr for lr in lrs if (key, lr) not in scores)]
    found: dict[tuple[str, str], float | None] = {}
    for (name, method), rates in ranked.items():
        grid = comparison.grid.lrs.get(method, ())
        if rates and plans[name, method] and at_the_edge(rates[0], grid):
            say(f"{name}: {method}: the best rate, {rates[0]:g}, is at the edge of those tried")
        if rates or not grid:
            found[name, method] = rates[0] if rates else None
        else:
            say(f"{name}: {method} failed at every learning rate; try smaller ones (grid.lrs)")
    kept.write({key: lr for key, lr in found.items() if plans[key] and lr is not None})
    return found


def at_the_edge(lr: float | None, tried: Sequence[float]) -> bool:
    """Return whether a rate is the least or the largest of three or more: a better one may lie beyond."""
    return len(tried) > 2 and lr in (min(tried), max(tried))


class _Chosen:
    """The rates that were chosen, in `tune/chosen.json`.

    Attributes:
        failed: settings and methods of which a tuning run failed this time.
    """

    def __init__(
        self,
        comparison: Comparison,
        settings: Mapping[str, Setting],
        folder: Path,
        plans: Mapping[tuple[str, str], Sequence[tuple[int, int]]],
    ) -> None:
        self._comparison, self._settings = comparison, settings
        self._folder, self._file = folder, folder / "tune" / "chosen.json"
        self._asked = {key: self._of(key, plan) for key, plan in plans.items() if plan}
        self._kept: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self.failed: set[tuple[str, str]] = set()

    def _of(self, key: tuple[str, str], plan: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return what a rate is chosen from, and how: with another recipe it is another choice."""
        rates = self._comparison.grid.lrs[key[1]]
        recipe = self._comparison.tuning(self._settings[key[0]], key[1], rates[0], plan[0][1]).config
        digest = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]
        return {"lrs": list(rates), "runs": [list(rung) for rung in plan], "recipe": digest}

    def standing(self) -> dict[tuple[str, str], float]:
        """Return the rates that need no tuning any more.

        What was chosen among fewer than were asked for, because others failed, stands once a run was made
        with it.
        """
        found = {}
        for key, asked in self._asked.items():
            before = self._kept.get(", ".join(key))
            if before and before["of"] == asked and (before["whole"] or self._finished(key)):
                found[key] = float(before["lr"])
        return found

    def _finished(self, key: tuple[str, str]) -> bool:
        setting, seeds = self._settings[key[0]], self._comparison.grid.seeds
        cells = (self._comparison.cell(setting, key[1], seed, None) for seed in seeds)
        return any(RunDirectory(self._folder / cell.folder).result.is_file() for cell in cells)

    def write(self, rates: dict[tuple[str, str], float]) -> None:
        """Keep what was chosen this time."""
        for key, lr in rates.items():
            whole = key not in self.failed
            self._kept[", ".join(key)] = {"lr": lr, "of": self._asked[key], "whole": whole}
        if rates:
            write_atomically(self._file, (json.dumps(self._kept, indent=1) + "\n").encode())


def _score(summary: Summary | None) -> float:
    return -math.inf if summary is None else float(summary["final"])
