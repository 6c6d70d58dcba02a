"""`federa compare`: methods x seeds x settings, each method at its own tuned learning rate."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from federa.checkpoint import RunDirectory
from federa.compare.execute import Runner, Say, Told, jobs_for, require_same_data
from federa.compare.grid import Cell, Comparison, Grid, Setting
from federa.compare.tables import (
    ALL,
    Lines,
    Row,
    latex,
    markdown,
    overall_lines,
    reached_lines,
    row_of,
    setting_lines,
    write_csv,
)
from federa.compare.tuning import at_the_edge, tuned_rates
from federa.config import RunConfig, parse_config, read_yaml
from federa.errors import DoesNotFitError, FederaError
from federa.experiment import resolve
from federa.machine import available_cores
from federa.plan import make_plan
from federa.progress import readable_seconds
from federa.report.cells import method_name
from federa.report.grid import GridCell, Pair, Reached, write_grid_report
from federa.report.words import capital
from federa.state import write_atomically
from federa.statistics import cost_to, mean_cost, paired

__all__ = ["Comparison", "Grid", "Setting", "compare_methods", "settled", "time_estimate"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found.

    Attributes:
        rows: one a run, as in `cells.csv`.
        pairs: paired differences to the first method, by setting, and over all settings if there are several.
        reached: costs to shares of the reference's best score.
        tables: what the terminal shows: a title and lines each.
    """

    rows: list[Row]
    pairs: list[Pair]
    reached: list[Reached]
    tables: list[tuple[str, Lines]]


def compare_methods(comparison: Comparison, folder: Path, say: Say) -> Outcome:
    """Run all cells that are not finished, and write the tables and the report.

    Args:
        comparison: what to compare.
        folder: gets `settings/` (resolved recipes), `tune/` and `cells/` (run directories; the rates that
            were chosen; what went wrong that no one foresaw), `cells.csv`, `table.md`, `table.tex` and
            `report.html`; what is finished there is taken as it is.
        say: is given one line a run.

    Raises:
        FederaError: a mistake in a recipe, or a folder that is something else.
    """
    comparison, jobs = settled(comparison, folder)
    runner = Runner(folder, jobs)
    with runner.open():
        rates = tuned_rates(comparison, runner, say)
        cells = [
            comparison.cell(setting, method, seed, rates.get((setting.name, method)))
            for setting in comparison.settings
            for seed in comparison.grid.seeds
            for method in comparison.grid.methods
        ]
        trained = [cell for cell in cells if (cell.setting, cell.method) in rates]
        results = runner.run(trained, Told(len(trained), say))
    require_same_data(folder, [cell for cell in trained if results[cell.folder] is not None])
    rows = [row_of(cell, results.get(cell.folder)) for cell in cells]
    outcome = _outcome(comparison, folder, cells, rows)
    _write(comparison, folder, cells, outcome)
    return outcome


def require_comparison(folder: Path) -> None:
    """Raise unless a comparison may go into a folder.

    Raises:
        FederaError: the folder is a file, or holds something else.
    """
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / "settings").is_dir())
    ):
        raise FederaError(f"--out: {folder} is there already and is no comparison; give another directory")


def settled(comparison: Comparison, folder: Path) -> tuple[Comparison, int]:
    """Return the comparison with `auto` resolved once, for all of its runs and for when it is run again.

    What a setting was run with the first time (precision, device, engine) it keeps.

    Returns:
        The comparison, and the number of runs at a time.

    Raises:
        FederaError: the folder is a file, or holds something else.
    """
    kept = folder / "settings"
    require_comparison(folder)
    jobs = min(jobs_for(setting.config, comparison.grid.jobs) for setting in comparison.settings)
    settings = []
    for setting in comparison.settings:
        file = kept / f"{setting.slug}.yaml"
        if file.is_file():
            config = _as_before(setting.config, parse_config(read_yaml(file)), folder, jobs)
        else:
            config = _sharing(resolve(setting.config), jobs)
            write_atomically(file, config.to_yaml().encode())
        settings.append(dataclasses.replace(setting, config=config))
    return dataclasses.replace(comparison, settings=tuple(settings)), jobs


def _as_before(asked: RunConfig, before: RunConfig, folder: Path, jobs: int) -> RunConfig:
    """Return the recipe with what was left open settled as it was the first time.

    Raises:
        FederaError: what is asked for is not what the folder's runs had.
    """
    same: dict[str, Any] = {}
    for key, asks, had in (
        ("client.precision", asked.client.precision, before.client.precision),
        ("device", asked.device, before.device),
        ("engine.threads", asked.engine.threads, before.engine.threads),
        ("engine.name", asked.engine.name, before.engine.name),
    ):
        if asks in ("auto", None):
            same[key] = had
        elif asks != had:
            raise FederaError(
                f"--out: the runs in {folder} had {key}={had}, not {asks}; compare into another directory"
            )
    if jobs > 1 and before.engine.threads is None:
        raise FederaError(f"--jobs {jobs}: the runs in {folder} had all cores to themselves; give --jobs 1")
    return asked.replace(**same)


def _sharing(config: RunConfig, jobs: int) -> RunConfig:
    """Return a recipe whose runs share the cores, so many at a time."""
    if jobs == 1 or config.engine.threads is not None:
        return config
    return config.replace(**{"engine.threads": available_cores() // jobs})


def time_estimate(comparison: Comparison, say: Say) -> float:
    """Return the seconds that all of a comparison will take, from a few steps of every method.

    A run's start is taken to last as long as that of the quickest method: the first one here makes what the
    others find in the cache.

    Args:
        comparison: what to run.
        say: is given one line for each.

    Raises:
        FederaError: a mistake in a recipe; so one that cannot run is found before hours of others.
    """
    jobs = min(jobs_for(setting.config, comparison.grid.jobs) for setting in comparison.settings)
    rungs: dict[int, list[float]] = {}  # the seconds of every run, of a rung; each waits for the one before
    finals: list[float] = []  # in the order that they run in
    for setting in comparison.settings:
        plans = {}
        for method in comparison.grid.methods:
            cell = comparison.cell(setting, method, comparison.grid.seeds[0], None)
            try:
                plan = make_plan(_sharing(cell.config, jobs))
            except DoesNotFitError as error:
                say(f"{setting.name}: {error}")
                continue
            plans[method] = plan.seconds, plan.start
        if not plans:
            raise FederaError(f"{setting.name}: no method fits this encoder")
        start = min(start for _, start in plans.values())
        for method, (seconds, _) in plans.items():
            say(f"{setting.name}: {method}: {readable_seconds(start + seconds)} a run")
            for number, (runs, rounds) in enumerate(comparison.rungs(setting, method)):
                each = start + seconds * rounds / setting.config.rounds
                rungs.setdefault(number, []).extend([each] * runs)
        finals += [start + seconds for _ in comparison.grid.seeds for seconds, _ in plans.values()]
    return sum(_makespan(stage, jobs) for stage in (*rungs.values(), finals))


def _makespan(seconds: Sequence[float], jobs: int) -> float:
    """Return when the last of several runs ends, each taken up in turn by the first that is free."""
    free = [0.0] * jobs
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def _outcome(comparison: Comparison, folder: Path, cells: Sequence[Cell], rows: list[Row]) -> Outcome:
    methods = comparison.grid.methods
    scores = {
        method: {
            (r["setting"], r["seed"]): r["metric"] for r in rows if r["method"] == method and "metric" in r
        }
        for method in methods
    }
    names = [setting.name for setting in comparison.settings]
    pairs = []
    for group in [*names, ALL] if len(names) > 1 else names:
        for method in methods[1:]:
            one, other = (
                {key: value for key, value in scores[name].items() if group in (ALL, key[0])}
                for name in (methods[0], method)
            )
            found = paired(one, other)
            if found is not None:
                pairs.append(Pair(setting=group, method=method, **dataclasses.asdict(found)))
    reached = list(_reached(comparison, folder, cells, rows))
    tables = []
    for name in names:
        own = {pair.method: pair for pair in pairs if pair.setting == name}
        tables.append((name, setting_lines([r for r in rows if r["setting"] == name], methods, own)))
    if len(names) > 1:
        whole = {pair.method: pair for pair in pairs if pair.setting == ALL}
        tables.append((ALL, overall_lines(rows, methods, whole)))
    return Outcome(rows, pairs, reached, tables)


def _reached(
    comparison: Comparison, folder: Path, cells: Sequence[Cell], rows: Sequence[Row]
) -> Iterable[Reached]:
    """Yield what every method took to reach shares of the reference's best score.

    Each seed has its own target, as in `clock.time_to_targets`: shares of the best that the reference reached
    with it, which it therefore always reaches itself. A seed with which it failed has none.
    """
    reference, failed = comparison.reference, {r["folder"] for r in rows if r["status"] != "done"}
    for setting in comparison.settings:
        mine = [cell for cell in cells if cell.setting == setting.name]
        best = {
            r["seed"]: r["best"]
            for r in rows
            if (r["setting"], r["method"]) == (setting.name, reference) and "best" in r
        }
        # A share of nothing is reached by all, at once.
        best = {seed: score for seed, score in best.items() if score > 0}
        if not best or not setting.config.evaluate_every:
            continue
        metric, level = setting.config.task.primary, sum(best.values()) / len(best)
        for share in comparison.grid.targets:
            target = f"{share:.0%} of {method_name(reference)}'s best ({share * level:.3f})"
            for method in comparison.grid.methods:
                costs = [
                    cost_to(
                        RunDirectory(folder / cell.folder).records(), metric, share * best[cell.config.seed]
                    )
                    if str(cell.folder) not in failed
                    else None
                    for cell in mine
                    if cell.method == method and cell.config.seed in best
                ]
                mean = mean_cost(costs)
                yield Reached(
                    setting=setting.name,
                    method=method,
                    target=target,
                    rounds=mean.round if mean else None,
                    bytes=mean.bytes if mean else None,
                    seconds=mean.seconds if mean else None,
                    seeds=sum(cost is not None for cost in costs),
                    of=len(costs),
                )


def _write(comparison: Comparison, folder: Path, cells: Sequence[Cell], outcome: Outcome) -> None:
    write_csv(folder / "cells.csv", outcome.rows)
    tables = list(outcome.tables)
    if outcome.reached:
        name = method_name(comparison.reference)
        title = f"Cost to a share of {name}'s best with the same seed (its mean over seeds)"
        tables.append((title, reached_lines(outcome.reached)))
    text = "\n".join(f"## {title}\n\n{markdown(lines)}" for title, lines in tables)
    write_atomically(folder / "table.md", text.encode())
    parts = "\n".join(f"% {title}\n{latex(lines)}" for title, lines in tables)
    write_atomically(folder / "table.tex", parts.encode())
    made = [
        GridCell(
            cell.setting,
            cell.method,
            cell.config.seed,
            folder / cell.folder if row["status"] == "done" else None,
        )
        for cell, row in zip(cells, outcome.rows, strict=True)
    ]
    if any(cell.folder is not None for cell in made):
        notes = list(_edges(comparison, cells))
        to = folder / "report.html"
        write_grid_report("federa compare", made, outcome.pairs, outcome.reached, to, notes=notes)


def _edges(comparison: Comparison, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield, for each method, where a rate beyond those that were tried may be better."""
    for method in comparison.grid.methods:
        tried = comparison.grid.lrs.get(method, ())
        own = (cell for cell in cells if cell.method == method and at_the_edge(cell.config.client.lr, tried))
        where = dict.fromkeys(f"{cell.setting} ({cell.config.client.lr:g})" for cell in own)
        if where:
            name = capital(method_name(method))
            yield f"{name}: the rate is at the edge of those tried in {'; '.join(where)}."


def terminal_tables(title: str, lines: Lines, width: int) -> list[Table]:
    """Return lines as tables for a terminal: several, one below the other, where one would be too wide.

    Each has the first column. Heads are wrapped at their spaces and never cut.
    """
    gap = 2
    wide = [max(*map(len, column[0].split()), *map(len, column[1:])) for column in zip(*lines, strict=True)]
    parts = [[0]]
    for column in range(1, len(wide)):
        if sum(wide[c] + gap for c in [*parts[-1], column]) - gap > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(column)
    tables = []
    for number, part in enumerate(parts):
        first = title if number == 0 else None
        table = Table(title=first, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for column in part:
            table.add_column(lines[0][column], width=wide[column], vertical="bottom")
        for line in lines[1:]:
            table.add_row(*(line[column] for column in part))
        tables.append(table)
    return tables
