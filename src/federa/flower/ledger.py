"""What a run directory knows of its federation, and the round loop over any post."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from federa.checkpoint import RunDirectory
from federa.config import RunConfig
from federa.errors import FederaError
from federa.flower.federation import PATIENT, Federation, Patience, Post
from federa.run import Observer, Result, run


@dataclass(frozen=True, slots=True)
class Known:
    """A run that is about to start, or to go on.

    Attributes:
        name: names it to the nodes; the same after the server was started again.
        clients: how many there are; None where nobody has said.
        rows: what each client said of its data when the run was started; None before.
    """

    name: str
    clients: int | None
    rows: Sequence[int] | None = None


def look_up(out: Path, clients: int | None, *, resume: bool) -> Known:
    """Return what is known of the run in a directory, or a new one of so many clients.

    Raises:
        FederaError: there is a run, and it is not to be resumed.
    """
    folder = RunDirectory(out)
    if not resume:
        if not folder.free:
            raise FederaError(f"out: {out} is there already; give another, or resume it")
        return Known(uuid.uuid4().hex[:12], clients)
    held = folder.read_json("federation.json") or {}
    rows = (folder.read_json("partition.json") or {}).get("client_sizes")
    return Known(held.get("run") or uuid.uuid4().hex[:12], held.get("clients") or clients, rows)


def federate(
    config: RunConfig,
    out: Path,
    post: Post,
    known: Known,
    *,
    seats: Mapping[int, int] | None = None,
    patience: Patience = PATIENT,
    resume: bool = False,
    observer: Observer | None = None,
    told: Callable[[str], None] = print,
) -> Result:
    """Run a recipe on the nodes that a post reaches; see `serve` for the other arguments.

    Args:
        config: the recipe; of its data the evaluation set alone is read.
        out: the run directory.
        post: carries messages.
        known: names the run.
        seats: each client's node; None where nodes say themselves which client they are.
        patience: how long to wait for whom.
        resume: go on from the directory's checkpoint.
        observer: is told how the rounds go.
        told: is given a line about nodes that join, are missing, or are refused.

    Raises:
        FederaError: nobody has said how many clients there are, or a mistake in the recipe or the directory.
    """
    if known.clients is None:
        raise FederaError("clients: say how many nodes there are")
    mark = {"run": known.name, "clients": known.clients}
    place = Federation(
        post,
        known.name,
        known.clients,
        seats=seats,
        patience=patience,
        rows=known.rows,
        told=told,
        built=lambda: RunDirectory(out).write_json("federation.json", mark),
    )
    return run(config, out, resume=resume, observer=observer, place=place)
