"""The commands that compare methods: their scores, and how long they take to a target on other machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from federa.errors import FederaError

if TYPE_CHECKING:
    from rich.console import Console

    from federa.clock import Device
    from federa.compare import Comparison

Methods = Annotated[Optional[str], typer.Option(help="Methods, with commas.")]  # noqa: UP045
Seeds = Annotated[Optional[str], typer.Option(help="Seeds, with commas.")]  # noqa: UP045
Skews = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Partitions, with commas: dirichlet:0.1,fednlp:1,iid."),
]
Models = Annotated[Optional[str], typer.Option(help="Models, with commas.")]  # noqa: UP045
Rates = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--lrs", help="METHOD=LR,LR,...: tune it among these on held-out training examples."),
]
Tune = Annotated[Optional[str], typer.Option(help="How: grid or halving.")]  # noqa: UP045
TuneRounds = Annotated[Optional[int], typer.Option(help="Rounds of a tuning run.")]  # noqa: UP045
Jobs = Annotated[Optional[int], typer.Option(help="Runs at a time.")]  # noqa: UP045
Out = Annotated[Optional[Path], typer.Option("--out", help="The folder of the comparison.")]  # noqa: UP045


def compare(
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[RECIPE.yaml ...] [KEY=VALUE ...]",
            help="One recipe a data set, or one with a `grid` section; what all runs have in common.",
        ),
    ] = None,
    *,
    methods: Methods = None,
    seeds: Seeds = None,
    skews: Skews = None,
    models: Models = None,
    lrs: Rates = None,
    tune: Tune = None,
    tune_rounds: TuneRounds = None,
    jobs: Jobs = None,
    out: Out = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and the time they take; run nothing.")
    ] = False,
) -> None:
    """Run methods x seeds x settings on the same clients; what is finished is not run again."""
    from federa import progress

    comparison = _load(
        arguments or [],
        lrs or [],
        methods=methods,
        seeds=seeds,
        skews=skews,
        models=models,
        tune=tune,
        tune_rounds=tune_rounds,
        jobs=jobs,
    )
    console = progress.console()
    folder = out or Path("runs") / "compare"
    if dry_run:
        _show_plan(comparison, console, estimated=True)
    elif not _run(comparison, folder, console):
        raise SystemExit(1)


def time_to_target(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR | RECIPE.yaml ... [KEY=VALUE ...]",
            help="A folder that federa compare wrote, or recipes to compare methods on first.",
        ),
    ],
    *,
    methods: Methods = None,
    seeds: Seeds = None,
    skews: Skews = None,
    models: Models = None,
    lrs: Rates = None,
    tune: Tune = None,
    tune_rounds: TuneRounds = None,
    jobs: Jobs = None,
    out: Out = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a client, with its link: laptop, phone, jetson-agx-orin; the rest changes it."),
    ] = None,
    up: Annotated[Optional[float], typer.Option(help="Megabits a second to the server [10].")] = None,  # noqa: UP045
    down: Annotated[Optional[float], typer.Option(help="Megabits a second from it [50].")] = None,  # noqa: UP045
    latency: Annotated[Optional[float], typer.Option(help="Milliseconds one way [40].")] = None,  # noqa: UP045
    speed: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of a client's machine, over the one that made the runs [1]."),
    ] = None,
    turns: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Requests of a job, one after the other; Flower makes 5 [1]."),
    ] = None,
    idle: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds a round in which nobody trains or sends, as Flower's polling [0]."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time training anew, the methods in turns, on one thread.")
    ] = False,
    reference: Annotated[str, typer.Option(help="Of whose best the targets are shares.")] = "ft",
) -> None:
    """Show how long methods take to a target on other machines and links, of finished runs or of new ones."""
    from federa import clock, progress

    if device is not None and device not in clock.DEVICES:
        raise FederaError(f"--device {device}: unknown; known: {', '.join(clock.DEVICES)}")
    given: dict[str, Any] = {
        "up": up,
        "down": down,
        "latency": latency,
        "speed": speed,
        "turns": turns,
        "idle": idle,
    }
    base = clock.DEVICES[device] if device else clock.Device()
    client = dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})
    if min(client.up, client.down, client.speed, client.turns) <= 0 or min(client.latency, client.idle) < 0:
        raise FederaError("--up, --down, --speed and --turns must be above 0, --latency and --idle not below")
    console = progress.console()
    grid: dict[str, Any] = {
        "methods": methods,
        "seeds": seeds,
        "skews": skews,
        "models": models,
        "tune": tune,
        "tune_rounds": tune_rounds,
        "jobs": jobs,
    }
    folder = out or Path("runs") / "compare"
    if len(arguments) == 1 and Path(arguments[0]).is_dir():
        asked = [
            f"--{key.replace('_', '-')}"
            for key, value in [*grid.items(), ("lrs", lrs), ("out", out)]
            if value
        ]
        if asked:
            raise FederaError(
                f"{asked[0]}: the runs in {arguments[0]} are made already; it goes with recipes"
            )
        folder = Path(arguments[0])
    elif not _run(_load(arguments, lrs or [], **grid), folder, console):
        raise SystemExit(1)
    replays = clock.replay_comparison(folder, client, measure=measure)
    rows = clock.time_to_targets(replays, reference=reference)
    clock.write_rows(folder, rows)
    _show_times(client, rows, reference, console)
    console.print(f"written: {folder}/time_to_target.csv, .md", highlight=False)


def _show_times(client: Device, rows: Sequence[dict[str, Any]], reference: str, console: Console) -> None:
    """Print the client that is assumed, and a table a setting."""
    from rich.table import Table

    from federa import clock

    words = f"{client.up:g} Mbit/s up, {client.down:g} down, {client.latency:g} ms; "
    words += f"{client.speed:g} times this machine's speed"
    words += f"; {client.idle:g} s a round idle" if client.idle else ""
    console.print(words, highlight=False)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        table = Table(title=setting, box=None, padding=(0, 1, 0, 0), title_justify="left")
        for header in clock.headers(reference)[1:]:
            table.add_column(header)
        for row in rows:
            if row["setting"] == setting:
                table.add_row(*clock.shown(row)[1:])
        console.print(table)


def _load(words: list[str], lrs: list[str], **options: Any) -> Comparison:
    from federa.compare import Comparison

    recipes, overrides = [Path(word) for word in words if "=" not in word], [w for w in words if "=" in w]
    return Comparison.load(recipes, overrides, options | {"lrs": _rates(lrs) or None})


def _rates(words: list[str]) -> dict[str, str]:
    """Return the rates of every `METHOD=LR,LR`; those of one method that is given twice are joined."""
    rates: dict[str, str] = {}
    for word in words:
        method, equals, values = word.partition("=")
        if not equals:
            raise FederaError(f"--lrs {word}: expected METHOD=LR,LR,...")
        rates[method] = f"{rates[method]},{values}" if method in rates else values
    return rates


def _show_plan(comparison: Comparison, console: Console, *, estimated: bool) -> None:
    from federa import progress
    from federa.compare import time_estimate

    for line in comparison.describe():
        console.print(line, highlight=False)
    if estimated:
        seconds = time_estimate(comparison, lambda line: console.print(f"  {line}", highlight=False))
        console.print(f"time expected: {progress.readable_seconds(seconds)}", highlight=False)


def _run(comparison: Comparison, folder: Path, console: Console) -> bool:
    """Run what is not finished, print the tables; return whether every run is done."""
    from federa.compare import compare_methods, require_comparison, terminal_tables

    # A mistake shows before anything is written.
    require_comparison(folder)
    _show_plan(comparison, console, estimated=not (folder / "settings").exists())
    outcome = compare_methods(comparison, folder, lambda line: console.print(line, highlight=False))
    for title, lines in outcome.tables:
        console.print(*terminal_tables(title, lines, console.width), sep="\n")
    console.print(f"written: {folder}/cells.csv, table.md, table.tex, report.html", highlight=False)
    return all(row["status"] == "done" for row in outcome.rows)
