"""How a run shows itself in a terminal: a live bar, one line a round, or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from federa.experiment import Experiment
from federa.report.words import trained_on
from federa.run import Observer, Result
from federa.types import Record, Update


def readable_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, for example `5.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def short_name(model: str) -> str:
    """Return a model's name as people say it: a folder without the path to it, a hub name as it is."""
    return Path(model).name if Path(model).exists() else model


def readable_seconds(seconds: float) -> str:
    """Return a duration, for example `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def warn_of_repeats(experiment: Experiment) -> None:
    """Say on stderr if many evaluation examples are trained on."""
    if note := trained_on(experiment.trained_on, experiment.evaluation.num_examples):
        said = note.replace("\u2009", ",")  # a page's thousands are not a terminal's
        remedy = "scores flatter; give another data.test, or take repeats out"
        console(to_stderr=True).print(f"warning: {said}: {remedy}", highlight=False)


class JsonLines(Observer):
    """Prints every round's record as one line of JSON."""

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:  # noqa: D102
        warn_of_repeats(experiment)

    def finished_round(self, record: Record) -> None:  # noqa: D102
        print(json.dumps(record), flush=True)


class Bar(Observer):
    """A live progress bar in a terminal; elsewhere (a log, a pipe) one line a round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bytes = 0
        self._metric = ""
        self._rounds = 0
        self._clients = 0

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:  # noqa: D102
        round_number = len(records)
        self._bytes = sum(r["bytes_up"] + r["bytes_down"] for r in records)
        config, sizes = experiment.config, experiment.sizes
        self._metric, self._rounds = config.task.primary, config.rounds
        self._cohort = config.cohort
        seconds = readable_seconds(sum(experiment.seconds.values()))
        share = sizes["trainable_parameters"] / sizes["total_parameters"]
        self._console.print(
            f"{config.method.name} on {short_name(config.model.name)}, "
            f"{experiment.train.num_examples:,} examples, "
            f"{len(experiment.parts)} clients ({config.partition.name}), {config.cohort} a round; "
            f"{sizes['trainable_parameters']:,} trained parameters ({share:.2%}); started in {seconds}"
        )
        warn_of_repeats(experiment)
        self._progress.start()
        total = config.rounds * config.cohort
        done = round_number * config.cohort
        self._task = self._progress.add_task("round", total=total, completed=done, state="")
        self._describe(round_number + 1, "")

    def updated(self, update: Update, of: int) -> None:  # noqa: D102
        self._clients += 1
        self._progress.advance(self._task)
        self._describe(update.job.round, f"client {self._clients}/{of}")

    def evaluating(self, done: int, of: int) -> None:  # noqa: D102
        self._progress.update(self._task, state=f"{self._state} evaluating {done}/{of}")

    def finished_round(self, record: Record) -> None:  # noqa: D102
        self._clients = 0
        self._bytes += record["bytes_up"] + record["bytes_down"]
        parts = [f"round {record['round']:>3}/{self._rounds}", f"loss {record['loss']:.4f}"]
        if self._metric in record:
            parts.append(f"{self._metric} {record[self._metric]:.4f}")
        parts += [readable_bytes(self._bytes), readable_seconds(record["seconds_round"])]
        if record["rejected"]:
            wrong = {c: v for c, v in record["verdicts"].items() if v != "ok"}
            parts.append("rejected: " + "; ".join(f"client {c}: {v}" for c, v in wrong.items()))
        self._console.print("  ".join(parts), highlight=False)

    def _describe(self, round_number: int, state: str) -> None:
        self._state = state
        self._progress.update(self._task, description=f"round {round_number}/{self._rounds}", state=state)

    def close(self) -> None:
        """Take the live bar away."""
        self._progress.stop()


def result_table(result: Result) -> Table:
    """Return the end of a run as a table of two columns."""
    summary = result.summary
    metric = summary["metric"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    own = " (mean over clients, each with its own head)" if summary["head"] == "local" else ""
    final = Text.assemble((f"{summary['final']:.4f}", "bold"), f" (best {summary['best']:.4f})")
    table.add_row(f"{metric}{own}", final)
    if summary["per_client"]:
        per = summary["per_client"]
        shown = f"mean {per['mean']:.4f}, 10th percentile {per['p10']:.4f}, worst {per['worst']:.4f}"
        table.add_row(f"{metric} by client", shown)
    if summary["target"]:
        at = summary["target"]
        shown = f"round {at['round']}, {readable_seconds(at['seconds'])}, {readable_bytes(at['bytes'])}"
        table.add_row(f"target {at['value']} reached", shown)
    elif result.config.target is not None:
        table.add_row(f"target {result.config.target}", "not reached")
    share = summary["trainable_parameters"] / summary["total_parameters"]
    table.add_row("trained parameters", f"{summary['trainable_parameters']:,} ({share:.2%})")
    table.add_row(
        "sent", f"{readable_bytes(summary['bytes_up'])} up, {readable_bytes(summary['bytes_down'])} down"
    )
    parts = ", ".join(f"{part} {readable_seconds(s)}" for part, s in summary["seconds_start"].items())
    table.add_row("time", f"{readable_seconds(summary['seconds_total'])} (start: {parts})")
    return table


def partition_table(sizes: list[int], groups: list[str], counts: Any, most: int = 12) -> Table:
    """Return who holds what: one row a client, of the first few."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    shown = min(len(groups), 8)
    for column in ("client", "examples", *groups[:shown]):
        table.add_column(column, justify="right", no_wrap=True, overflow="ellipsis")
    for client in range(min(most, len(sizes))):
        row = [str(client), str(sizes[client]), *(str(int(c)) for c in counts[client][:shown])]
        table.add_row(*row)
    if len(sizes) > most:
        table.caption = f"... and {len(sizes) - most} more clients"
    return table


def console(*, to_stderr: bool = False, shared: bool = False) -> Console:
    """Return a console that wraps nothing when it is not a terminal, so that logs keep one line a round.

    What it prints it prints as it is: words of other machines and of data are among it, and what looks like
    markup in them must neither change a line nor end the run.

    Args:
        to_stderr: where it writes.
        shared: others write there too, so that nothing is moved even in a terminal.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    plain = shared or not stream.isatty()
    terminal = False if plain else None
    return Console(file=stream, soft_wrap=plain, force_terminal=terminal, markup=False, emoji=False)
