"""`federa serve`: a SuperLink of one's own, the nodes that may join it, and the round loop."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from federa.config import RunConfig
from federa.data.datasets import read_held_out
from federa.flower.certs import node_keys, require_certificate
from federa.flower.federation import PATIENT, Patience
from federa.flower.gateway import REFUSED
from federa.flower.ledger import federate, look_up
from federa.flower.post import FlowerPost
from federa.flower.runtime import (
    GATEWAY,
    SUPERLINK,
    Control,
    Link,
    await_port,
    free_port,
    require_flower,
    require_free,
    server_task,
    start,
    write_secret,
)
from federa.run import Observer, Result
from federa.types import FederaError, RoundFailedError

LOOPBACK = ("127.0.0.1", "localhost")
MAX_REQUEST = 16 << 20  # bytes; a request carries one object of a message, and Flower cuts those at 5 MiB


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and what it shows.

    Attributes:
        host: of this machine; nodes elsewhere need one that they can reach.
        port: the nodes'.
        certs: the folder with ca.crt, server.crt, server.key and nodes/; None without TLS and keys, which
            is for this machine only.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certs: Path | None = None


def serve(
    config: RunConfig,
    out: Path,
    address: Address,
    *,
    clients: int | None = None,
    patience: Patience = PATIENT,
    resume: bool = False,
    observer: Observer | None = None,
    told: Callable[[str], None] = print,
) -> Result:
    """Run a recipe on the nodes that join, from the start or from the checkpoint in `out`.

    Args:
        config: the recipe; of its data the evaluation set alone is read.
        out: the run directory.
        address: where to listen.
        clients: how many nodes there are, where they have no keys.
        patience: how long to wait for whom.
        resume: go on from the directory's checkpoint.
        observer: is told how the rounds go.
        told: is given a line about nodes that join, are missing, or are refused.

    Raises:
        FederaError: a mistake in the recipe, the keys or the directory, or a node that does not fit.
    """
    require_flower()
    keys = _keys(address, clients)
    known = look_up(out, clients or len(keys), resume=resume)
    number = known.clients or 0
    if keys and clients not in (None, len(keys)):
        raise FederaError(f"--clients {clients}: {address.certs}/nodes has {len(keys)} keys; leave it out")
    if keys and not known.rows and sorted(keys) != list(range(number)):
        lacks = min(set(range(max(keys) + 1)) - set(keys))
        raise FederaError(
            f"{address.certs}/nodes has keys up to node-{max(keys)}, but none of node-{lacks}; for a new run "
            f"let the last take its number (mv node-{max(keys)}.pub node-{lacks}.pub), or make another key: "
            "federa certs"
        )
    read_held_out(config.data, config.task)  # a mistake in it is found before anybody can join
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="federa-")))
        link = stack.enter_context(superlink(address, home, told))
        control = Control(link)
        seats = {client: control.register(key, f"node-{client}") for client, key in keys.items()}
        control.start_run()
        post: FlowerPost = stack.enter_context(server_task(link, told))
        told(f"listening at {address.host}:{address.port}, run {known.name}")
        return federate(
            config,
            out,
            post,
            known,
            seats=seats or None,
            patience=patience,
            resume=resume,
            observer=observer,
            told=told,
        )


def _keys(address: Address, clients: int | None) -> dict[int, bytes]:
    """Return the keys of the nodes that may join; none without TLS.

    Raises:
        FederaError: no TLS on an address that others reach, or files that are not there or do not hold.
    """
    if address.certs is None:
        if address.host not in LOOPBACK:
            raise FederaError(f"--insecure is for this machine only, not for --host {address.host}")
        if clients is None:
            raise FederaError("--clients: say how many nodes there are; without keys nothing else says it")
        return {}
    require_certificate(address.certs)
    return node_keys(address.certs)


@contextmanager
def superlink(
    address: Address, home: Path, told: Callable[[str], None] = lambda line: None
) -> Iterator[Link]:
    """Start a SuperLink that this machine alone can reach, and with TLS the gateway to it."""
    require_free(address.host, address.port)
    secret_file, secret = write_secret(home)
    inner = address.port if address.certs is None else free_port()
    log = home / "superlink.log"
    words = ["--host", "127.0.0.1", "--port", str(inner), "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(secret_file)]
    if address.certs is None:
        words.append("--insecure")
    else:
        server = address.certs
        words += ["--ssl-certfile", str(server / "server.crt"), "--ssl-keyfile", str(server / "server.key")]
        words += ["--ssl-ca-certfile", str(server / "ca.crt"), "--enable-supernode-auth"]
    with ExitStack() as stack:
        process = start(SUPERLINK, words, log, home)
        stack.callback(end, process)
        await_port(inner, process, log)
        gateway = None
        if address.certs is not None:
            gateway = _gateway(address, inner, home)
            stack.callback(end, gateway)
            await_port(address.port, gateway, home / "gateway.log", host=address.host)
            stack.enter_context(retold(home / "gateway.log", told))

        def watch() -> None:
            if gateway is not None and gateway.poll() is not None:
                raise RoundFailedError(
                    "what nodes reach the server through is gone; start it again with --resume"
                )

        yield Link(f"127.0.0.1:{inner}", secret, address.certs and address.certs / "ca.crt", watch)


def _gateway(address: Address, inner: int, home: Path) -> subprocess.Popen[bytes]:
    certs = address.certs
    assert certs is not None
    words = ["--host", address.host, "--port", str(address.port)]
    words += ["--upstream", f"127.0.0.1:{inner}", "--limit", str(MAX_REQUEST), "--certs", str(certs)]
    return start(GATEWAY, words, home / "gateway.log", home)


@contextmanager
def retold(log: Path, told: Callable[[str], None]) -> Iterator[None]:
    """Tell whom the gateway turns away, and why: each line of its log once, for the time of the block."""
    over, known, read = threading.Event(), set[str](), 0

    def look() -> None:
        nonlocal read
        with log.open("rb") as file:
            file.seek(read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(REFUSED) and line not in known:
                known.add(line)
                told(line)

    def follow() -> None:
        while not over.wait(1.0):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program that was started, gently at first."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
