"""A run on the grid that Flower's own tools hand to a server's process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federa import progress
from federa.config import load_config
from federa.errors import FederaError
from federa.flower.federation import Patience, seconds
from federa.flower.ledger import federate, look_up
from federa.flower.post import FlowerPost
from federa.run import Result


def serve_on(grid: Any, said: Mapping[str, Any]) -> Result:
    """Run what a run's configuration says, and print how it goes.

    Args:
        grid: Flower's.
        said: keys and values of the app's configuration.

    Raises:
        FederaError: a mistake in it, in the recipe or the directory, or a node that does not fit.
    """
    config = load_config(_path(said, "recipe"))
    out, clients, resume = _path(said, "out"), said.get("clients"), said.get("resume") is True
    if not isinstance(clients, int) or (clients < 1 and not resume):
        raise FederaError("clients: say how many nodes there are: --run-config 'clients=3'")
    console = progress.console(shared=True)

    def told(line: str) -> None:
        console.print(line, highlight=False)

    run = look_up(out, clients or None, resume=resume)
    told(f"run {run.name}")
    post, patience, bar = FlowerPost(grid, told=told), patience_of(said), progress.Bar(console)
    result = federate(config, out, post, run, patience=patience, resume=resume, observer=bar, told=told)
    console.print(progress.result_table(result))
    told(f"run directory: {out}")
    return result


def patience_of(said: Mapping[str, Any]) -> Patience:
    """Return how long a run's configuration says to wait.

    Raises:
        FederaError: it says what cannot be.
    """
    short = said.get("short")
    if short not in ("wait", "fail"):
        raise FederaError(f"short: {short!r}; expected wait or fail")
    wait, deadline, ask_again = (seconds(key, said.get(key)) for key in ("wait", "deadline", "ask-again"))
    nodes = said.get("min-nodes") or None
    if not isinstance(nodes, (int, type(None))):
        raise FederaError(f"min-nodes: {nodes!r} is no number")
    return Patience(wait or None, deadline, ask_again, short, nodes=nodes)


def _path(said: Mapping[str, Any], key: str) -> Path:
    """Return a path of the machine that the SuperLink is on, whose own folder nobody thinks of."""
    path = Path(str(said.get(key) or "")).expanduser()
    if not path.is_absolute():
        raise FederaError(
            f"{key}: give a whole path on the SuperLink's machine: --run-config '{key}=\"/...\"'"
        )
    return path
