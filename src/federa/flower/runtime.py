"""Flower's SuperLink and SuperNode, started and talked to by federa's own processes.

Flower would run the code of an app that travels from the server to every node, in a new process for each
message. Here both are started with `--isolation process`: they hand tasks out over their Runtime API, and the
process that takes them, with a secret that only its user can read, runs what is installed here, with a
resident model; the code in the app is never unpacked.

That API has no public client. What of Flower is not public is imported in this file, `post.py` and
`supernode.py` alone; `FLOWER` says which versions they are written for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federa.flower.app_folder import APP
from federa.flower.post import FlowerPost
from federa.flower.records import SILENT, pack, unpack
from federa.machine import die_with_parent
from federa.types import FederaError, RoundFailedError

FLOWER = ("1.41", "1.42")

try:
    import flwr
    import httpx
    from flwr.app import Message
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto, run_from_proto
    from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors.http import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
except ImportError as error:
    raise FederaError(
        f'a federation of machines needs Flower {" or ".join(FLOWER)}: pip install "federa[flower]" ({error})'
    ) from error

SUPERLINK = (str(Path(sys.executable).parent / "flower-superlink"),)
SUPERNODE = (sys.executable, "-m", "federa.flower.supernode")
GATEWAY = (sys.executable, "-m", "federa.flower.gateway")
GONE = 15.0  # seconds without an answer from a SuperLink on this machine
TASK_POLL = 0.2  # seconds between looks for a task, on this machine


def require_flower() -> None:
    """Raise unless Flower is of a version that this is written for.

    Raises:
        FederaError: it is not.
    """
    if not flwr.__version__.startswith(tuple(f"{version}." for version in FLOWER)):
        raise FederaError(f"Flower {flwr.__version__} is installed; this federa needs {' or '.join(FLOWER)}")


@dataclass(frozen=True, slots=True)
class Link:
    """Where a Runtime API is, and what opens it.

    Attributes:
        address: host and port.
        secret: shared by all processes of one owner on one machine.
        ca: the certificate that it must be signed by; None for no TLS, on this machine only.
        watch: raises where what nodes need beside it is gone.
    """

    address: str
    secret: bytes
    ca: Path | None = None
    watch: Callable[[], None] = lambda: None

    @property
    def certificates(self) -> bytes | None:
        """The CA's certificate as Flower wants it."""
        return None if self.ca is None else self.ca.read_bytes()

    def runtime(self, token: str | None = None) -> Any:
        """Return a client of the Runtime API, for one task or to get tasks."""
        if token is None:
            interceptors = [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=self.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
                ),
            ]
        else:
            interceptors = [
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                RuntimeTokenHttpInterceptor(token),
            ]
        return RuntimeHttpClient.from_server_address(
            self.address, self.ca is None, self.certificates, interceptors
        )


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raise where a server could not listen: another program's port would be taken for its own.

    Raises:
        FederaError: somebody listens there, or it is no address of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise FederaError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}"
        ) from error


def write_secret(folder: Path) -> tuple[Path, bytes]:
    """Write a new secret that only this user can read."""
    secret, path = secrets.token_bytes(32), folder / "runtime.secret"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secret)
    return path, secret


def start(program: Sequence[str], arguments: Sequence[str], log: Path, home: Path) -> subprocess.Popen[bytes]:
    """Start one of the programs below, which ends with this process."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SILENT, "FLWR_HOME": str(home)},
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one system call, no lock)
        )


def await_port(
    port: int, process: subprocess.Popen[bytes], log: Path, host: str = "127.0.0.1", seconds: float = 60.0
) -> None:
    """Wait until a program that was started listens.

    Raises:
        FederaError: it ended, or does not come up.
    """
    end = time.monotonic() + seconds
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # all addresses, this one among them
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise FederaError(f"Flower does not start: {lines[-1] if lines else 'no word'} (all of it: {log})")


class Control:
    """The control of a SuperLink on this machine: who may join, and the run that tasks belong to."""

    def __init__(self, link: Link) -> None:
        self._client = ControlHttpClient.from_server_address(
            link.address,
            link.ca is None,
            link.certificates,
            [RuntimeVersionHttpInterceptor(component_name="flwr")],
        )

    def register(self, public_key: bytes, name: str) -> int:
        """Let a node in, and return its id.

        Raises:
            FederaError: the SuperLink does not take the key.
        """
        try:
            answer = self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except httpx.HTTPError as error:
            raise FederaError(f"node {name}: its key cannot be registered ({_reason(error)})") from error
        return int(answer.node_id)

    def start_run(self) -> int:
        """Start a run of an app without code, and return its id."""
        content, _ = build_fab_from_files({name: text.encode() for name, text in APP.items()})
        fab = Fab("", content, {})
        answer = self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        return int(answer.run_id)


def _reason(error: httpx.HTTPError) -> str:
    response = getattr(error, "response", None)
    return f"{response.status_code}: {response.text[:200]}" if response is not None else str(error)


@contextmanager
def _alive(client: Any) -> Iterator[None]:
    """Say again and again that a task is being worked at."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


@contextmanager
def server_task(
    link: Link, told: Callable[[str], None] = lambda line: None, seconds: float = 60.0
) -> Iterator[FlowerPost]:
    """Take the server's task of a run that was started, and carry its messages.

    Raises:
        FederaError: the SuperLink has none.
        RoundFailedError: the SuperLink went away.
    """
    client, end = link.runtime(), time.monotonic() + seconds
    while True:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
        if answer.token:
            break
        if time.monotonic() > end:
            raise FederaError("the SuperLink has no task for the server")
        time.sleep(TASK_POLL)
    client.close()
    grid = HttpGrid(link.address, link.ca is None, link.certificates, token=answer.token)
    grid._retry_invoker.max_time = GONE  # for ever, left to itself
    runtime, status = grid._runtime_client, "failed"
    beats = link.runtime(answer.token)  # its own: the grid's would try for long where the SuperLink is gone
    with contextlib.closing(beats), _alive(beats):
        task = runtime.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        try:
            yield FlowerPost(grid, link.watch, told)
            status = "completed"
        except httpx.HTTPError as error:
            status = ""  # there is nobody to tell
            raise RoundFailedError(
                f"the SuperLink is gone ({_reason(error)}); start the server again with --resume"
            ) from error
        finally:
            if status:
                with contextlib.suppress(httpx.HTTPError):
                    runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
    grid.close()


def node_tasks(
    link: Link,
    answer: Callable[[bytes, bytes], tuple[bytes, bytes]],
    told: Callable[[str], None],
    going_on: Callable[[], bool] = lambda: True,
) -> None:
    """Take a SuperNode's tasks one after the other, and answer them, for as long as it is to go on."""
    client = link.runtime()
    while going_on():
        try:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
            if found.token:
                _answer_task(link, found.token, answer)
                continue
        except httpx.HTTPError:  # the SuperNode is being started again
            time.sleep(1)
        except Exception as error:  # whatever became of this one, the server asks again
            told(f"a message was lost: {type(error).__name__}: {str(error)[:200]}")
        time.sleep(TASK_POLL)
    client.close()


def _answer_task(link: Link, token: str, answer: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> None:
    client = link.runtime(token)
    with contextlib.closing(client), _alive(client):
        message, context, _, _ = pull_task_input(client)
        reply = Message(pack(*answer(*unpack(message))), reply_to=message)
        push_message(client, reply, context)
        push_task_output(client, context, "completed", "")
