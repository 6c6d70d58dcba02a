"""A node's warm worker, as seen by those who have a message for it: found, or started, and asked.

A process a message has no time to load a model. So the first one starts a worker and leaves it behind, the
next ones find it by its socket, and it ends with the node. One folder a node, that its owner alone can
enter:

    worker.sock   where it listens
    worker.log    what it says
    lock          held by who looks for a worker, and by a worker until it listens: no two are ever started
    kept/         what the client keeps for itself, unless its owner named a place for that

This file loads no model and no PyTorch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from federa.errors import FederaError
from federa.flower.local import private_folder, receive, require_same_user, send

# Bytes of a request's parts (which worker, header, tensors) and of an answer's (a word, header, tensors).
REQUEST = (1 << 16, 1 << 20, 8 << 30)
ANSWER = (16, 1 << 20, 8 << 30)
TAKEN = (16,)  # and of the word with which a worker takes a message, before it comes
HERE, OK, CHANGED = b"here", b"ok", b"changed"
PROGRAM = (
    sys.executable,
    "-P",
    "-m",
    "federa.flower.worker",
)  # -P: nothing of the current folder is imported


@dataclass(frozen=True, slots=True)
class Owned:
    """What a node's owner has said of it, on the machine itself.

    Attributes:
        recipe: the owner's recipe.
        digest: of its content; a worker that has read another one is replaced.
        train: the client's own table, if it is not the recipe's.
        client: the client's number, where nodes have no keys.
        state: a folder for what the client keeps for itself.
    """

    recipe: str
    digest: str
    train: str | None = None
    client: int | None = None
    state: str | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Owned:
        """Return what a SuperNode's `--node-config` says; other apps' keys are let be.

        Raises:
            FederaError: there is no recipe, or a value of another kind.
        """
        for key, kind in (("recipe", str), ("train", str), ("state", str), ("client", int)):
            if key in said and type(said[key]) is not kind:
                raise FederaError(f"--node-config: {key}={said[key]!r} is no {kind.__name__}")
        if not said.get("recipe"):
            raise FederaError(
                """--node-config: say which recipe: 'recipe="/my/recipe.yaml" train="/my/data.parquet"'"""
            )
        recipe = Path(said["recipe"]).expanduser().absolute()
        try:
            digest = hashlib.sha256(recipe.read_bytes()).hexdigest()
        except OSError as error:
            raise FederaError(f"--node-config: recipe {recipe} cannot be read ({error.strerror})") from error
        return cls(str(recipe), digest, said.get("train"), said.get("client"), said.get("state"))

    def pack(self) -> bytes:
        """Return it as bytes."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Worker:
    """The worker of a node, whether it runs or not.

    Attributes:
        owned: what it works with.
        folder: the node's.
        keeper: the process that it ends with.
    """

    owned: Owned
    folder: Path
    keeper: int

    @classmethod
    def of_node(cls, owned: Owned, node: int, keeper: int) -> Worker:
        """Return the worker of a node, by its number and the process that it ends with."""
        folder = private_folder() / f"{node:x}-{keeper}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return cls(owned, folder, keeper)

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder / "worker.log"

    def ask(self, header: bytes, tensors: bytes) -> tuple[bytes, bytes]:
        """Return the answer to a message; a worker is started if none is there.

        Raises:
            FederaError: it does not start, or ended while it worked.
        """
        for _ in range(3):
            with self._connect() as connection:
                require_same_user(connection)
                try:
                    receive(connection, TAKEN)  # when it is this message's turn
                except OSError:
                    continue  # it was ending and has taken nothing: another one is started
                try:
                    send(connection, (self.owned.pack(), header, tensors), REQUEST)
                    word, *answer = receive(connection, ANSWER)
                except OSError as error:
                    raise FederaError(
                        f"the worker has ended ({error}); the next message starts another ({self.log})"
                    ) from error
            if word == OK:
                return answer[0], answer[1]
        raise FederaError(f"no worker stays: the recipe changes, or it is killed ({self.log})")

    def _connect(self) -> socket.socket:
        with self._lock() as lock:
            connection = self._found()
            if connection is not None:
                return connection
            self._start(lock)
        with self._lock():  # the worker has left it: it listens, or has ended
            connection = self._found()
        if connection is None:
            raise FederaError(f"the worker does not start: {self._last_word()} (all of it: {self.log})")
        return connection

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """Hold the node's lock; what was started in the block with it holds on to it."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _found(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # no socket, or one whose worker has ended
            connection.connect(str(self.folder / "worker.sock"))
            return connection
        connection.close()
        return None

    def _start(self, lock: int) -> None:
        words = [str(self.folder), str(self.keeper), str(lock), self.owned.pack().decode()]
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            subprocess.Popen(
                [*PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C at the SuperNode is not for it
            )

    def _last_word(self) -> str:
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:  # its node has ended, and has taken it along
            lines = []
        return lines[-1][:300] if lines else "no word"
