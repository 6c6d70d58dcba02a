"""What Flower's own tools run: `client_app` in a process a message, `server_app` in one a run.

`flower-supernode` starts a process for each message and loads this file in it, so it loads no model and no
PyTorch: the message is handed to the node's warm worker. What the node trains, and on what, is said by its
owner in `--node-config` alone; the run's configuration, which comes from the server, is not looked at.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from federa.errors import FederaError, RoundFailedError
from federa.flower.records import pack, unpack
from federa.flower.warm import Owned, Worker

RAISED = 2  # Flower's code of an error that the app has met


def answer(message: Any, context: Any) -> Any:
    """Return the node's answer to a message of the server.

    What goes wrong here is for the node's owner to read; the server learns that it did.
    """
    try:
        worker = Worker.of_node(Owned.of(context.node_config), context.node_id, _keeper())
        reply = worker.ask(*unpack(message))
    except FederaError as error:
        print(f"federa: {error}", file=sys.stderr, flush=True)
        return Message(
            Error(RAISED, "its worker cannot answer; the node's own log says why"), reply_to=message
        )
    return Message(pack(*reply), reply_to=message)


def serve(grid: Any, context: Any) -> None:
    """Run the recipe that the run's configuration names on the nodes that are there."""
    from federa.flower.plain import serve_on

    try:
        serve_on(grid, context.run_config)
    except (FederaError, RoundFailedError):
        sys.tracebacklimit = 0  # Flower ends this process, and shows the mistake: its line is enough
        raise


def _keeper() -> int:
    """Return the process that ends when the node does: Flower's SuperExec, which has started this one.

    Raises:
        FederaError: it has ended already, so that nobody would end what is started now.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # not Linux
        words = b"superexec" if parent != 1 else b""
    if b"superexec" not in words:
        raise FederaError("the SuperNode of this process has ended")
    return parent


client_app = ClientApp()
client_app.train()(answer)
server_app = ServerApp()
server_app.main()(serve)
