"""The commands of a federation of real machines."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Optional

import typer

from federa.cli.words import split_words
from federa.errors import FederaError

Words = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="RECIPE.yaml [KEY=VALUE ...]", help="The recipe that server and nodes share."),
]
INSECURE = "Without TLS and keys, on this machine alone."


def certs(
    to: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    *,
    nodes: Annotated[int, typer.Option(help="How many nodes, numbered from 0.", min=1)],
    host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A name or address that nodes call the server by; again for more."),
    ] = None,
    days: Annotated[int, typer.Option(help="For which the server's certificate is valid.", min=1)] = 365,
) -> None:
    """Make a CA, the server's certificate and a key for every node of a first federation."""
    from federa.flower.certs import make_certificates

    for number in make_certificates(to, host or [], nodes, days):
        print(f"node-{number} stays out: its key was taken from {to / 'server' / 'nodes'}")
    print(f"server: {to / 'server'} (federa serve --certs); each node: its own of {to / 'nodes'}")


def split(
    arguments: Words = None,
    *,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write one data set as the tables of many clients, to try a federation on one machine."""
    from federa.config import load_config
    from federa.split import split as write

    recipe, overrides = split_words(arguments or [])
    sizes = write(load_config(recipe, overrides), to)
    print(f"{to}: {len(sizes)} clients of {min(sizes)} to {max(sizes)} examples, test.parquet, recipe.yaml")


def app(
    to: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
) -> None:
    """Write the app for those who start runs with Flower's own tools: flwr run DIR."""
    from federa.flower.app_folder import write_app

    write_app(to)
    print(f"{to}/pyproject.toml written; on the SuperLink's machine: flwr run {to} --run-config '...'")


def _end_in_order() -> None:
    """Take a service manager's SIGTERM as Ctrl-C: what was started ends, what is temporary goes."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def serve(
    arguments: Words = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="The run directory to write.")],
    certificates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--certs", help="The server's folder of `federa certs`."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=INSECURE)] = False,
    clients: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many nodes, with --insecure; else the keys say it."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The nodes' port.")] = 8000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    wait: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds for nodes to join at the start; default: for ever."),
    ] = None,
    min_nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many must have joined for a start; default: all. Others may come later."),
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for the updates of a round.")] = 3600.0,
    short: Annotated[
        str, typer.Option(help="With fewer updates than min_success by then: wait or fail.")
    ] = "wait",
    ask_again: Annotated[float, typer.Option(help="Seconds until a silent node is asked again.")] = 60.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but mistakes.")] = False,
) -> None:
    """Run a recipe on the nodes that join: the server's one command."""
    from federa import progress
    from federa.config import load_config
    from federa.flower.federation import Patience, seconds
    from federa.flower.serve import Address
    from federa.flower.serve import serve as start
    from federa.run import Observer

    if (certificates is None) != insecure:
        raise FederaError("give --certs DIR (see: federa certs), or --insecure to try it on this machine")
    if short not in ("wait", "fail"):
        raise FederaError(f"--short {short}: expected wait or fail")
    patience = Patience(
        None if wait is None else seconds("--wait", wait),
        seconds("--deadline", deadline),
        seconds("--ask-again", ask_again),
        short,
        nodes=min_nodes,
    )
    recipe, overrides = split_words(arguments or [])
    config = load_config(recipe, overrides)
    console = progress.console()
    bar = progress.Bar(console)
    _end_in_order()
    try:
        result = start(
            config,
            out,
            Address(host, port, certificates),
            clients=clients,
            patience=patience,
            resume=resume,
            observer=Observer() if quiet else bar,
            told=(lambda line: None) if quiet else lambda line: console.print(line, highlight=False),
        )
    except KeyboardInterrupt:
        bar.close()
        raise SystemExit(130) from None
    finally:
        bar.close()
    if not quiet:
        console.print(progress.result_table(result))
        console.print(f"run directory: {out} (open {out / 'report.html'})", highlight=False)


def join(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server.")],
    arguments: Words = None,
    *,
    keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--keys", help="This node's folder of `federa certs`: ca.crt and node.key."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=INSECURE)] = False,
    client: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="This client's number, with --insecure; else its key says it."),
    ] = None,
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A folder for what the client keeps for itself."),
    ] = None,
) -> None:
    """Train on this machine's own data in a server's runs: a node's one command."""
    from federa import progress
    from federa.config import load_config
    from federa.experiment import resolve
    from federa.flower.join import Server
    from federa.flower.join import join as start

    if (keys is None) != insecure:
        raise FederaError(
            "give --keys DIR (the server's owner has it), or --insecure to try it on this machine"
        )
    if insecure and client is None:
        raise FederaError("--client: say which client this node is; without keys nothing else says it")
    recipe, overrides = split_words(arguments or [])
    console = progress.console()
    _end_in_order()
    try:
        start(
            resolve(load_config(recipe, overrides)),
            Server(server, keys and keys / "ca.crt", keys and keys / "node.key"),
            client=client,
            state=state,
            told=lambda line: console.print(line, highlight=False),
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
