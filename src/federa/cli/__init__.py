"""The command line: a thin edge over the Python API."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from federa.cli.comparison import compare, time_to_target
from federa.cli.federation import app as app_folder
from federa.cli.federation import certs, join, serve, split
from federa.cli.words import split_words
from federa.errors import FederaError, RoundFailedError

if TYPE_CHECKING:
    from federa.config import RunConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of pretrained language models.",
)

OutOption = Annotated[Optional[Path], typer.Option("--out", help="The run directory to write.")]  # noqa: UP045


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit status 2."""
    if sys.argv[1:3] == ["bench", "time-to-target"]:  # the same by a longer name
        del sys.argv[1]
    try:
        app()
    except FederaError as error:
        print(f"federa: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RoundFailedError as error:
        print(f"federa: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


def _free_folder(config: RunConfig) -> Path:
    """Return a directory under runs/ that is not there yet."""
    base = f"{config.method.name}-{Path(config.data.train).stem}-seed{config.seed}"
    folder, count = Path("runs") / base, 1
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{base}-{count}"
    return folder


@app.command()
def run(
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE ...]", help="None: the embedded default."),
    ] = None,
    *,
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but mistakes.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a round, then the result.")
    ] = False,
) -> None:
    """Run a recipe: fine-tune a model across clients, from the start or from a checkpoint."""
    from federa import progress
    from federa.config import load_config
    from federa.run import Observer
    from federa.run import run as start

    recipe, overrides = split_words(arguments or [])
    if resume and (out is None or dry_run):
        raise FederaError("--resume: say which run with --out DIR, without --dry-run")
    config = None if resume and recipe is None and not overrides else load_config(recipe, overrides)
    if dry_run:
        assert config is not None
        _show_plan(config, as_json=as_json)
        return
    folder = out or _free_folder(config or load_config())
    console = progress.console()
    bar = progress.Bar(console)
    observer = Observer() if quiet else progress.JsonLines() if as_json else bar
    try:
        result = start(config, folder, resume=resume, observer=observer)
    except KeyboardInterrupt:
        bar.close()
        print(f"federa: interrupted; go on with: federa run --resume --out {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        bar.close()
    if as_json:
        print(json.dumps({"result": result.summary, "folder": str(folder)}))
    elif not quiet:
        console.print(progress.result_table(result))
        console.print(f"run directory: {folder} (open {folder / 'report.html'})", highlight=False)


def _show_plan(config: RunConfig, *, as_json: bool) -> None:
    from federa import progress
    from federa.plan import make_plan
    from federa.run import partition_summary

    plan = make_plan(config)
    experiment, config = plan.experiment, plan.experiment.config
    held = partition_summary(experiment)
    progress.warn_of_repeats(experiment)
    if as_json:
        expected = {"seconds": plan.seconds, "bytes": plan.bytes_round * config.rounds, **experiment.sizes}
        print(json.dumps({"config": config.model_dump(mode="json"), "partition": held, "expected": expected}))
        return
    console = progress.console()
    console.print(config.to_yaml().rstrip(), highlight=False)
    console.print()
    console.print(progress.partition_table(held["client_sizes"], held["groups"], held["counts"]))
    sizes = experiment.sizes
    trained, total = sizes["trainable_parameters"], sizes["total_parameters"]
    console.print(f"\ntrained parameters: {trained:,} of {total:,} ({trained / total:.2%})")
    once, all_rounds = (progress.readable_bytes(plan.bytes_round * n) for n in (1, config.rounds))
    console.print(f"bytes expected: {once} a round, {all_rounds} in all")
    workers = config.engine.num_workers()
    time_expected = progress.readable_seconds(plan.seconds)
    console.print(f"time expected: {time_expected} with {workers} at a time; nothing was written")


@app.command()
def bench(
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE ...]", help="None: the embedded default."),
    ] = None,
    *,
    repeats: Annotated[int, typer.Option(help="Repeats of everything, in turns.")] = 5,
    write: Annotated[
        bool, typer.Option("--write", help="Set the fastest precision and engine in RECIPE.yaml.")
    ] = False,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="With --write: the fastest batch size, too; it trains differently."),
    ] = False,
) -> None:
    """Measure this machine on a recipe: its peak, a local step, and the fastest precision and engine."""
    from federa import progress
    from federa.bench import bench as measure
    from federa.bench import disturbance, lines, possible_changes
    from federa.config import load_config
    from federa.recipe_edit import edit_recipe
    from federa.state import write_atomically

    recipe, overrides = split_words(arguments or [])
    if write and recipe is None:
        raise FederaError("--write: say which recipe to write into: federa bench RECIPE.yaml --write")
    if batch and not write:
        raise FederaError("--batch: sets the fastest batch size in a recipe, so it needs --write")
    config = load_config(recipe, overrides)
    if recipe is not None and write:  # not after minutes of measuring
        possible = possible_changes(config, batch=batch)
        try:
            for changes in possible:
                edit_recipe(recipe.read_text(encoding="utf-8"), changes, recipe.parent)
        except FederaError as error:
            raise FederaError(
                f"--write: {recipe} is written in a way that cannot be edited in place;"
                " measure without it, and set by hand what is the fastest"
            ) from error
    if warning := disturbance():
        progress.console(to_stderr=True).print(f"warning: {warning}", highlight=False)
    console = progress.console()
    with console.status("measuring") as status:
        result = measure(config, lambda what: status.update(f"measuring: {what}"), repeats)
    for what, figure in lines(result, config):
        console.print(f"{what:36} {figure}", highlight=False)
    if recipe is None or not write:
        words = " ".join(f"{key}={value}" for key, value in result.best().items())
        console.print(f"fastest: {words}", highlight=False)
        return
    best = result.best(batch=batch)
    write_atomically(recipe, edit_recipe(recipe.read_text(encoding="utf-8"), best, recipe.parent).encode())
    if "client.batch_size" in best:
        more = f"engines were timed with batches of {config.client.batch_size}"
    else:  # not asked for, or too few rows to time any
        more = "another batch size would train differently, so it stays" + ("" if batch else " (--batch)")
    console.print(f"written into {recipe}; {more}", highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories.")],
    to: Annotated[Optional[Path], typer.Option(help="The page to write.")] = None,  # noqa: UP045
) -> None:
    """Write report.html for a run, or one page for several side by side."""
    from federa.report.page import write_report

    target = to or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    print(write_report(folders, target))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    format_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--format", help="peft, merged or federa; default: the method's own."),
    ] = None,
) -> None:
    """Write a run's model as a PEFT adapter, a plain checkpoint, or a folder for federa.load."""
    from federa.export import FORMATS
    from federa.export import export as write

    if format_ is not None and format_ not in FORMATS:
        raise FederaError(f"--format {format_}: expected one of {', '.join(FORMATS)}")
    print(write(folder, to, format_))


@app.command()
def predict(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory, or a folder that export wrote.")
    ],
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            help="Texts: one a line, or a table (.csv, .jsonl, .parquet); default: standard input."
        ),
    ] = None,
    column: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The text column of a table; default: the one that the run was trained on."),
    ] = None,
) -> None:
    """Predict with a trained model: one JSON object an example, in the order of the input."""
    from federa.export import load, read_examples

    model = load(folder)
    examples = read_examples(file, model.columns, column)
    for example, answer in zip(examples, model.predict(examples), strict=True):
        shown = dict(example) if isinstance(example, Mapping) else {"text": example}
        print(json.dumps({**shown, **answer}, ensure_ascii=False))


@app.command()
def init(
    to: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    *,
    train: Annotated[Optional[str], typer.Option(help="Your training file.")] = None,  # noqa: UP045
    test: Annotated[Optional[str], typer.Option(help="Your test file.")] = None,  # noqa: UP045
    text_column: Annotated[Optional[str], typer.Option(help="Its text column.")] = None,  # noqa: UP045
    label_column: Annotated[Optional[str], typer.Option(help="Its label column.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="A model folder or hub name.")] = "minilm",
    clients: Annotated[int, typer.Option(help="Clients of the simulated federation.")] = 20,
) -> None:
    """Write a commented recipe for your own data."""
    from federa.starter import write_recipe

    if train is None:
        raise FederaError("say which data with --train FILE (.csv, .tsv, .jsonl or .parquet)")
    write_recipe(
        to,
        train=train,
        test=test,
        text_column=text_column,
        label_column=label_column,
        model=model,
        clients=clients,
    )
    print(f"{to} written; look with: federa run {to} --dry-run")


for command in (compare, time_to_target, certs, split, serve, join):
    app.command()(command)
app.command("app")(app_folder)


@app.command("list")
def list_() -> None:
    """List every method, task, partition, aggregator, server optimizer and engine, with its keys."""
    from federa.config import REGISTRIES

    for kind, registry in REGISTRIES.items():
        print(f"{kind}:")
        for name in registry.names():
            cls = registry.get(name)
            first = (cls.__doc__ or "").strip().split("\n")[0]
            fields = [
                f"{key}={field.default!r}" if not field.is_required() else key
                for key, field in cls.model_fields.items()
                if key != "name"
            ]
            print(f"  {name:14} {first}")
            if fields:
                print(f"  {'':14} {', '.join(fields)}")
