"""`federa compare`: methods x seeds on one recipe, each method at its own tuned learning rate."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from federa.config import RunConfig, parse_config, read_yaml
from federa.experiment import resolve
from federa.methods import METHODS
from federa.progress import readable_bytes, readable_seconds
from federa.report import write_report
from federa.run import Result, run
from federa.state import write_atomically
from federa.types import FederaError, RoundFailedError

COLUMNS = ("method", "data", "model", "skew", "seed", "lr", "metric", "rounds", "bytes", "seconds")
MORE_COLUMNS = ("metric_name", "trainable_parameters", "total_parameters", "bytes_round", "status")
DEFAULT_HOLD_OUT = 0.1  # of the training rows, to tune on
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        config: what all cells have in common.
        methods: names.
        seeds: each gives every method the same partition, cohorts and new head.
        lrs: learning rates to choose from, by method; without any, the recipe's or the method's own.
        tune_rounds: rounds of a tuning run.
    """

    config: RunConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: dict[str, tuple[float, ...]]
    tune_rounds: int

    @classmethod
    def parse(
        cls, config: RunConfig, methods: str, seeds: str, lrs: Sequence[str], tune_rounds: int | None
    ) -> Comparison:
        """Return a comparison from the command line's words.

        Raises:
            FederaError: an unknown method, or what is not a list of numbers.
        """
        names = tuple(name.strip() for name in methods.split(",") if name.strip())
        for name in names:
            METHODS.get(name)
        if not names or len(set(names)) < len(names):
            raise FederaError(f"--methods {methods}: expected different methods with commas")
        try:
            numbers = tuple(int(seed) for seed in seeds.split(","))
        except ValueError as error:
            raise FederaError(f"--seeds {seeds}: expected whole numbers with commas") from error
        if len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise FederaError(f"--seeds {seeds}: expected different numbers from 0")
        if tune_rounds is not None and tune_rounds < 1:
            raise FederaError(f"--tune-rounds {tune_rounds}: expected 1 or more")
        grid: dict[str, tuple[float, ...]] = {}
        for text in lrs:
            name, _, values = text.partition("=")
            if name not in names:
                raise FederaError(f"--lrs {text}: {name!r} is not among --methods {','.join(names)}")
            try:
                rates = tuple(float(value) for value in values.split(","))
            except ValueError as error:
                raise FederaError(f"--lrs {text}: expected METHOD=LR,LR,...") from error
            if not all(math.isfinite(rate) and rate > 0 for rate in rates):
                raise FederaError(f"--lrs {text}: expected positive numbers")
            grid[name] = (*grid.get(name, ()), *(rate for rate in rates if rate not in grid.get(name, ())))
        return cls(config, names, numbers, grid, tune_rounds or config.rounds)

    def cell(self, method: str, seed: int, lr: float | None) -> RunConfig:
        """Return the recipe of one cell.

        Without a rate of its own it has the recipe's, or its method's default if the recipe gives none.
        A recipe that gives the default of its own method is taken to give none.
        """
        changes: dict[str, Any] = {"method.name": method, "seed": seed}
        if lr is not None:
            changes["client.lr"] = lr
        return self.config.replace(**changes)

    def tuning(self, method: str, lr: float) -> RunConfig:
        """Return the recipe of one tuning run: the first seed, judged on held-out training rows."""
        held = self.config.data.validation_fraction or DEFAULT_HOLD_OUT
        return self.cell(method, self.seeds[0], lr).replace(
            **{
                "rounds": self.tune_rounds,
                "data.evaluate_on": "validation",
                "data.validation_fraction": 0.0 if self.config.data.validation else held,
            }
        )

    def describe(self) -> list[str]:
        """Return one line for every run that the comparison is made of."""
        lines = [f"tune  {m:10} lr {lr:g}, {self.tune_rounds} rounds" for m in self.lrs for lr in self.lrs[m]]
        for method in self.methods:
            lr = "tuned lr" if method in self.lrs else f"lr {self.cell(method, 0, None).client.lr:g}"
            lines += [f"run   {method:10} seed {s}, {lr}, {self.config.rounds} rounds" for s in self.seeds]
        return [*lines, f"{len(lines)} runs"]


def compare_methods(comparison: Comparison, folder: Path, say: Say) -> Table:
    """Run all cells that are not finished, write the tables and the report, and return the table.

    Args:
        comparison: what to compare.
        folder: gets `tune/`, `cells/` (a run directory each), `cells.csv`, `table.md`, `table.tex` and
            `report.html`; cells that are finished there are taken as they are.
        say: is given one line a run.
    """
    comparison = _settled(comparison, folder)
    chosen = {method: _tuned_lr(comparison, method, folder, say) for method in comparison.methods}
    rows = []
    for seed in comparison.seeds:
        for method in comparison.methods:
            config = comparison.cell(method, seed, chosen[method])
            cell = folder / "cells" / f"{method}-seed{seed}"
            result = _run_cell(config, cell, say)
            rows.append(_row(config, result))
    _write_csv(folder / "cells.csv", rows)
    lines = _table_lines(comparison, rows)
    write_atomically(folder / "table.md", _markdown(lines).encode())
    write_atomically(folder / "table.tex", _latex(lines).encode())
    done = [
        folder / "cells" / f"{row['method']}-seed{row['seed']}" for row in rows if row["status"] == "done"
    ]
    if done:
        write_report(done, folder / "report.html")
    table = Table(*lines[0], box=None, padding=(0, 2, 0, 0))
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _settled(comparison: Comparison, folder: Path) -> Comparison:
    """Return the comparison with `auto` resolved once, for all of its cells and for when it is run again.

    Raises:
        FederaError: the folder is a file, or holds something else.
    """
    stored = folder / "recipe.yaml"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not stored.is_file())):
        raise FederaError(f"--out: {folder} is there already and is no comparison; give another directory")
    if stored.is_file():
        before = parse_config(read_yaml(stored))
        same = {"client.precision": before.client.precision, "device": before.device}
        return dataclasses.replace(comparison, config=comparison.config.replace(**same))
    config = resolve(comparison.config)
    write_atomically(stored, config.to_yaml().encode())
    return dataclasses.replace(comparison, config=config)


def _run_cell(config: RunConfig, folder: Path, say: Say) -> Result | None:
    """Run or resume one cell; None if it diverged."""
    try:
        result = run(config, folder, resume=True)
    except RoundFailedError as error:
        say(f"{folder.name}: {error}")
        return None
    seconds = readable_seconds(result.summary["seconds_rounds"])
    say(f"{folder.name}: {result.summary['metric']} {result.summary['final']:.4f} in {seconds}")
    return result


def _tuned_lr(comparison: Comparison, method: str, folder: Path, say: Say) -> float | None:
    """Return the learning rate that did best on the held-out rows, or None to take the recipe's."""
    scores = {}
    for lr in comparison.lrs.get(method, ()):
        result = _run_cell(comparison.tuning(method, lr), folder / "tune" / f"{method}-lr{lr:g}", say)
        scores[lr] = -math.inf if result is None else result.summary["final"]
    if not scores:
        return None
    best = max(scores, key=lambda lr: scores[lr])
    if not math.isfinite(scores[best]):
        raise FederaError(f"--lrs {method}: training failed at every learning rate; try smaller ones")
    return best


def _row(config: RunConfig, result: Result | None) -> dict[str, Any]:
    """Return one line of `cells.csv`."""
    skew = config.partition.name
    if hasattr(config.partition, "alpha"):
        skew += f" {config.partition.alpha:g}"
    row: dict[str, Any] = {
        "method": config.method.name,
        "data": data_name(config.data.train),
        "model": config.model.name,
        "skew": skew,
        "seed": config.seed,
        "lr": config.client.lr,
        "metric_name": config.task.primary,
        "status": "failed" if result is None else "done",
    }
    if result is not None:
        summary = result.summary
        row |= {
            "metric": summary["final"],
            "rounds": summary["rounds"],
            "bytes": summary["bytes_up"] + summary["bytes_down"],
            "bytes_round": (summary["bytes_up"] + summary["bytes_down"]) / summary["rounds"],
            "seconds": summary["seconds_rounds"],
            "trainable_parameters": summary["trainable_parameters"],
            "total_parameters": summary["total_parameters"],
        }
    return row


def data_name(train: str) -> str:
    """Return a short name of a data set: a file's folder or a folder's own name; a hub name stays whole."""
    path = Path(train)
    if not path.exists():
        return train
    return path.parent.name if path.is_file() else path.name


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *MORE_COLUMNS])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _table_lines(comparison: Comparison, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the header and one line a method: mean and spread over seeds, difference to the first method."""
    metric, first = rows[0]["metric_name"], comparison.methods[0]
    by_method = {
        m: [r for r in rows if r["method"] == m and r["status"] == "done"] for m in comparison.methods
    }
    reference = {r["seed"]: r["metric"] for r in by_method[first]}
    header = ["method", "lr", metric, "seeds", f"minus {first}", "trained", "sent a round", "time"]
    lines = [header]
    for method, cells in by_method.items():
        if not cells:
            lines.append([method, "", "failed", "0", "", "", "", ""])
            continue
        scores = [c["metric"] for c in cells]
        paired = [c["metric"] - reference[c["seed"]] for c in cells if c["seed"] in reference]
        shown = "" if method == first or not paired else _mean_spread(paired, sign="+")
        share = cells[0]["trainable_parameters"] / cells[0]["total_parameters"]
        lines.append(
            [
                method,
                f"{cells[0]['lr']:g}",
                _mean_spread(scores),
                str(len(cells)),
                shown,
                f"{cells[0]['trainable_parameters']:,} ({share:.2%})",
                readable_bytes(cells[0]["bytes_round"]),
                readable_seconds(float(np.mean([c["seconds"] for c in cells]))),
            ]
        )
    return lines


def _mean_spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean and sample standard deviation in points, for example `56.1 ± 0.9`."""
    mean = f"{100 * float(np.mean(values)):{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


def _markdown(lines: list[list[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def _latex(lines: list[list[str]]) -> str:
    def cells(line: list[str]) -> Iterator[str]:
        for text in line:
            escaped = text.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$")
            yield escaped

    body = [" & ".join(cells(line)) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    middle = "\n".join(body[1:])
    ruled = ["\\toprule", body[0], "\\midrule", middle, "\\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *ruled, "\\end{tabular}", ""])
