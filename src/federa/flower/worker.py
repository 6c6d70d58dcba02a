"""A warm worker: the process that holds a node's model between the messages that others bring it.

`federa.flower.warm` starts it and says what it is given. It ends when the process does that it was told to,
for example by a SuperNode that is stopped, and takes its folder with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from federa.errors import FederaError
from federa.flower.local import receive, require_same_user, send
from federa.flower.warm import ANSWER, CHANGED, HERE, OK, REQUEST, TAKEN, Owned

if TYPE_CHECKING:
    from federa.flower.node import Node

HAND_OVER = 60.0  # seconds in which a message must have come; who brings it is on this machine
WATCH = 0.5  # seconds between looks at the keeper, where the system does not tell


def main() -> None:
    """Be a worker, with the arguments that `warm` gives."""
    folder, keeper, lock = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    owned = Owned(**json.loads(sys.argv[4]))
    os.set_inheritable(lock, False)
    os.umask(0o077)
    threading.Thread(target=_end_with, args=(keeper, folder), daemon=True).start()
    told(f"worker {os.getpid()} starts with {owned.recipe}")
    try:
        node = load_node(owned, folder)
        listener = listen(folder / "worker.sock")
    except FederaError as error:
        raise SystemExit(f"federa: {error}") from None
    with listener:
        fcntl.flock(lock, fcntl.LOCK_UN)
        answer_all(listener, owned.pack(), node.answer)


def told(line: str) -> None:
    """Write a line to the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)


def load_node(owned: Owned, folder: Path) -> Node:
    """Return the node that an owner describes.

    Raises:
        FederaError: a mistake in the recipe or the table.
    """
    import torch

    from federa.config import load_config
    from federa.engines.base import keep_freed_memory, share_cores
    from federa.experiment import resolve
    from federa.flower.node import Node

    words = [] if owned.train is None else [f"data.train={json.dumps(owned.train)}"]
    config = resolve(load_config(Path(owned.recipe), words))
    torch.set_num_threads(share_cores(1, config.engine.threads))
    keep_freed_memory()
    kept = folder / "kept" if owned.state is None else Path(owned.state).expanduser()
    return Node(config, owned.client, kept, told)


def listen(path: Path) -> socket.socket:
    """Return a socket that listens in place of one whose worker has ended.

    Raises:
        FederaError: the path is too long for a socket.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise FederaError(f"{path}: {error}; set XDG_RUNTIME_DIR to a folder with a short name") from error
    listener.listen(16)
    return listener


def answer_all(
    listener: socket.socket, own: bytes, answer: Callable[[bytes, bytes], tuple[bytes, bytes]]
) -> None:
    """Answer messages one after the other, until one comes from an owner who says something else by now."""
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                require_same_user(connection)
                connection.settimeout(HAND_OVER)
                send(connection, (HERE,), TAKEN)
                asked, header, tensors = receive(connection, REQUEST)
                if asked != own:
                    told("the recipe has changed; another worker takes over")
                    listener.close()  # before the word for it: who hears it finds nobody
                    send(connection, (CHANGED, b"", b""), ANSWER)
                    return
                send(connection, (OK, *answer(header, tensors)), ANSWER)
            except (OSError, FederaError) as error:
                told(f"a message was lost: {error}")


def _end_with(keeper: int, folder: Path) -> None:
    """End this process, and its folder, when another one ends."""
    with suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(keeper)], [], [])
        else:
            while True:
                os.kill(keeper, 0)
                time.sleep(WATCH)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
