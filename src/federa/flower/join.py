"""`federa join`: a SuperNode, and beside it one process with the model that answers all its messages."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from federa.config import RunConfig
from federa.engines.base import keep_freed_memory, share_cores
from federa.flower.certs import require_node
from federa.flower.node import Node
from federa.flower.runtime import (
    SUPERNODE,
    Link,
    await_port,
    free_port,
    node_tasks,
    require_flower,
    start,
    write_secret,
)
from federa.flower.serve import LOOPBACK, end
from federa.models import pick_device
from federa.types import FederaError

ALREADY_THERE = "the server takes this node to be there already, or another one has its key"
MEANINGS = {  # of what a SuperNode writes at its end, the first for a 401
    "terminated gracefully": "the server does not know this node: it was started anew, has no such key, or "
    "the two clocks differ",
    "[code: 2004]": ALREADY_THERE,
}
RESTART_SECONDS = 3.0  # between a SuperNode's end and its next start, and between two looks at the server
LOOK_SECONDS = 5.0  # at most, for a connection to the server
MOST_RESTART_SECONDS = 60.0  # where it is in vain again and again: a start costs seconds of a processor


@dataclass(frozen=True, slots=True)
class Server:
    """The server that a node joins.

    Attributes:
        address: host and port.
        ca: the certificate that it must be signed by; None without TLS, which is for this machine only.
        key: the node's private key.
    """

    address: str
    ca: Path | None = None
    key: Path | None = None

    def arguments(self) -> list[str]:
        """Return what a SuperNode must be told.

        Raises:
            FederaError: no such address, a file that is not there or is something else, or no TLS to another
                machine.
        """
        host, _, port = self.address.rpartition(":")
        known = re.fullmatch(r"[\w.-]+|\[[\w:.%]+\]", host) is not None
        if not known or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise FederaError(f"SERVER: expected host:port, got {self.address!r}")
        words = ["--superlink", self.address]
        if self.ca is None:
            if host not in LOOPBACK:
                raise FederaError(f"--insecure is for this machine only, not for {self.address}")
            return [*words, "--insecure"]
        if self.key is None:
            raise FederaError("--keys: the node's private key is needed beside ca.crt")
        require_node(self.ca, self.key)
        return [*words, "--root-certificates", str(self.ca), "--auth-supernode-private-key", str(self.key)]

    def trouble(self) -> str | None:
        """Return what keeps this machine from the server; None if TLS with it works."""
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_SECONDS) as raw:
                if self.ca is not None:
                    trusted = ssl.create_default_context(cafile=str(self.ca))
                    trusted.wrap_socket(raw, server_hostname=host.strip("[]")).close()
        except ssl.SSLCertVerificationError as error:
            return f"the server's certificate is refused: {error.verify_message}"
        except (OSError, ValueError) as error:
            return f"no connection to {self.address}: {error}"
        return None


def join(
    config: RunConfig,
    server: Server,
    *,
    client: int | None = None,
    state: Path | None = None,
    told: Callable[[str], None] = print,
) -> None:
    """Take part in a server's runs until this process is ended.

    Args:
        config: the owner's recipe, resolved; `data.train` is the client's own table.
        server: whose runs.
        client: the client's number, where nodes have no keys.
        state: a folder for what the client keeps for itself; None for a temporary one.
        told: is given a line about all that happens.

    Raises:
        FederaError: a mistake in the recipe, the table, or the files of the server.
    """
    require_flower()
    words = server.arguments()
    pick_device(config.device)
    if client is not None and client < 0:
        raise FederaError(f"--client {client}: clients are numbered from 0")
    if state is not None and state.exists() and not state.is_dir():
        raise FederaError(f"--state: {state} is no folder")
    node = Node(config, client, state, told)
    torch.set_num_threads(share_cores(1, config.engine.threads))
    keep_freed_memory()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="federa-node-")))
        secret_file, secret = write_secret(home)
        port = free_port()
        words += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
        words += ["--superexec-auth-secret-file", str(secret_file)]
        keeper = _Keeper(server, words, port, home, told)
        stack.callback(keeper.stop)
        keeper.start()
        told(f"joining {server.address}")
        if state is None and config.wire.remembers:
            told(
                f"wire.name={config.wire.name}: what rounding takes away is kept until this process ends; "
                "--state DIR keeps it longer"
            )
        node_tasks(Link(f"127.0.0.1:{port}", secret), node.answer, told)


class _Keeper:
    """Keeps a SuperNode running: it ends when the server no longer knows it, or is told to by nobody."""

    def __init__(
        self, server: Server, words: list[str], port: int, home: Path, told: Callable[[str], None]
    ) -> None:
        self._server, self._words, self._port, self._home, self._told = server, words, port, home, told
        self._log = home / "supernode.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._over, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Start it and see it come up.

        Raises:
            FederaError: it does not.
        """
        self._process = start(SUPERNODE, self._words, self._log, self._home)
        await_port(self._port, self._process, self._log)
        self._thread.start()

    def stop(self) -> None:
        """End it for good."""
        with self._starting:
            self._over.set()
        if self._process is not None:
            end(self._process)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_SECONDS + 1)  # it may be at a look

    def _work(self) -> None:
        self._watch()
        self._ended.wait()  # the kernel ends with a thread what that has started, and not gently

    def _watch(self) -> None:
        """Start it again when it has ended, later and later where that is in vain."""
        wait, started = RESTART_SECONDS, time.monotonic()
        while not self._over.wait(1.0):
            assert self._process is not None
            if self._process.poll() is None:
                continue
            if time.monotonic() - started > MOST_RESTART_SECONDS:
                wait = RESTART_SECONDS  # it had work
            trouble = self._server.trouble()
            if self._over.is_set():
                return
            why = trouble or self._last_word()
            if why == ALREADY_THERE:
                wait = RESTART_SECONDS  # until the server has missed it for a while
            pause = MOST_RESTART_SECONDS if trouble else wait
            self._told(f"{why}; the SuperNode is started again in {pause:.0f} s, or when this is over")
            back = self._pause(pause, trouble)
            wait = RESTART_SECONDS if back else min(2 * wait, MOST_RESTART_SECONDS)
            with self._starting:
                if not self._over.is_set():
                    started = time.monotonic()
                    self._process = start(SUPERNODE, self._words, self._log, self._home)

    def _pause(self, seconds: float, trouble: str | None) -> bool:
        """Wait, and return at once with True when the server was out of reach and is back.

        A look is advice: a proxy may reach what a socket cannot, so the wait has an end in any case.
        """
        waited = 0.0
        while waited < seconds and not self._over.wait(RESTART_SECONDS):
            waited += RESTART_SECONDS
            before, trouble = trouble, self._server.trouble()
            if before and not trouble:
                return True
            if trouble and trouble != before:
                self._told(trouble)
        return False

    def _last_word(self) -> str:
        log = self._log.read_text(errors="replace")
        last = log.rpartition("Starting Flower SuperNode")[2]
        for sign, meaning in MEANINGS.items():
            if sign in last:
                return meaning
        lines = [line.strip() for line in last.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it ended without a word"
