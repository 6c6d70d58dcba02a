"""A run whose clients are nodes elsewhere: the simulator's round loop, with messages instead of an engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from federa.config import RunConfig
from federa.data.batches import Encoded, Ragged
from federa.data.datasets import read_held_out
from federa.data.groups import UNKNOWN, Groups
from federa.experiment import Experiment, encoded, load_model, prepare
from federa.flower.messages import (
    PROTOCOL,
    SLACK_BYTES,
    VERSION,
    Hello,
    Here,
    Refused,
    agreed,
    line,
    pack,
    unpack,
)
from federa.flower.session import NodeSession
from federa.kept import KeptStates
from federa.models import require_base
from federa.run import Place
from federa.types import FederaError, State


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for a message.

    Attributes:
        ticket: of the message.
        header: its header; empty where the message was lost.
        tensors: its tensors.
        error: why it was lost.
    """

    ticket: str
    header: bytes = b""
    tensors: bytes = b""
    error: str = ""


class Post(Protocol):
    """Carries messages to nodes and back; Flower's grid, or a test's.

    Attributes:
        longest: bytes of tensors that an answer may have.
    """

    longest: int

    def online(self) -> set[int]:
        """Return the ids of the nodes that can be reached now."""

    def send(self, node: int, header: bytes, tensors: bytes, seconds: float) -> str:
        """Send a message that is of no use after so many seconds, and return its ticket."""

    def collect(self, tickets: Sequence[str]) -> list[Reply]:
        """Return the replies that have come, each once."""

    def forget(self, ticket: str) -> None:
        """Give a message up: neither it nor an answer to it is of use any more."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server waits, and for whom.

    Attributes:
        start: seconds for nodes to join at the start; None without end.
        nodes: how many must have joined by then; None for all. Who comes later takes part from then on.
        round: seconds for the updates of a round.
        ask_again: seconds after which a node that may have lost a job is asked again; it answers from memory
            if it has not.
        short: what follows where too few updates have come by then: `wait` for more, or `fail`.
        poll: seconds between looks at the post.
    """

    start: float | None = None
    round: float = 3600.0
    ask_again: float = 60.0
    short: str = "wait"
    poll: float = 0.5
    nodes: int | None = None


def seconds(key: str, said: object) -> float:
    """Return how long to wait, as somebody has said it.

    Raises:
        FederaError: it is no number of seconds.
    """
    if not isinstance(said, (int, float)) or isinstance(said, bool) or not 0 <= said < math.inf:
        raise FederaError(f"{key}: {said!r} is no number of seconds")
    return float(said)


PATIENT = Patience()


@dataclass(slots=True)
class Seat:
    """What the server knows of a client.

    Attributes:
        node: where it is.
        rows: what it trains on in an epoch, once it has said so.
        ready: whether it knows the run.
        wants_init: whether it must be sent the round-0 state.
    """

    node: int
    rows: int | None = None
    ready: bool = False
    wants_init: bool = False


class Federation(Place):
    """The nodes of a run.

    Args:
        post: carries messages.
        run: names the run.
        clients: how many clients there are.
        seats: each client's node; None where nodes have no keys and say themselves which client they are.
        patience: how long to wait.
        rows: what clients said of their data when the run was started, where it is resumed.
        told: is given a line about all that happens.
        built: is called when all is there and the rounds can begin.
    """

    def __init__(
        self,
        post: Post,
        run: str,
        clients: int,
        *,
        seats: Mapping[int, int] | None = None,
        patience: Patience = PATIENT,
        rows: Sequence[int] | None = None,
        told: Callable[[str], None] = lambda line: None,
        built: Callable[[], None] = lambda: None,
    ) -> None:
        self.built = built
        self.post, self.run, self.patience, self.told = post, run, patience, told
        self.clients, self._rows = clients, rows
        self.seats = {client: Seat(node) for client, node in (seats or {}).items()}
        self.assigned = seats is not None
        self.hello: Hello | None = None

    @property
    def enough(self) -> int:
        """How many nodes must have joined for the rounds to begin."""
        return self.clients if self.patience.nodes is None else self.patience.nodes

    def build(
        self, config: RunConfig, init: State | None, kept: Path | None, base: str | None, cache: Path | None
    ) -> Experiment:
        """Load the model and the evaluation set, and wait for the nodes."""
        if config.cohort > self.clients:
            raise FederaError(f"cohort: {config.cohort} clients a round, but there are {self.clients} nodes")
        if not 1 <= self.enough <= self.clients:
            raise FederaError(f"min-nodes: {self.enough}, but there are {self.clients} nodes")
        if config.method.head == "local":
            raise FederaError(
                "method.head=local: only the clients could measure their heads, which is not built"
            )
        seconds, began = {}, time.perf_counter()
        table = read_held_out(config.data, config.task)
        labels = config.task.labels(table, config.data)
        loaded = load_model(config, labels)
        if base is not None:
            require_base(loaded, base, config.model.name)
        tokenizer = loaded.tokenizer
        evaluation = encoded(config, table, tokenizer, labels)
        seconds["load"] = time.perf_counter() - began
        began = time.perf_counter()
        ready = prepare(config, loaded, init, cache)
        seconds["prepare"] = time.perf_counter() - began
        began = time.perf_counter()
        self.post.longest = config.wire.size(ready.params) + SLACK_BYTES
        self.hello = Hello(
            protocol=PROTOCOL,
            version=VERSION,
            run=self.run,
            recipe=agreed(config),
            base=loaded.fingerprint,
            labels=labels,
        )
        sizes = list(self._rows) if self._rows is not None else self._gather()
        seconds["wait"] = time.perf_counter() - began
        self.built()
        nobody = np.zeros(0, dtype=np.int64)
        unknown = np.full(evaluation.num_examples, UNKNOWN, dtype=np.int64)
        return Experiment(
            config=config,
            trainer=ready.trainer,
            train=Encoded({name: Ragged.from_rows([]) for name in evaluation.features}, {}, evaluation.pad),
            evaluation=evaluation,
            parts=[np.arange(size) for size in sizes],
            params=ready.params,
            kept=KeptStates(kept, ready.local),
            remainders=KeptStates(None, {}),
            labels=labels,
            groups=Groups(["all"], nobody, unknown),
            trained_on=None,
            fingerprint=loaded.fingerprint,
            tokenizer=tokenizer,
            counts=np.array(sizes, dtype=np.int64)[:, None],
            sizes=ready.sizes,
            seconds=seconds,
        )

    def _gather(self) -> list[int]:
        """Greet nodes until enough clients have answered, and return their rows; 0 for one that is to come.

        Whoever cannot take part is left out, and asked again in a while: its owner may put things right.

        Raises:
            FederaError: the time is over.
        """
        end = None if self.patience.start is None else time.monotonic() + self.patience.start
        asked: dict[str, tuple[int, float]] = {}  # the node and when it was asked, by ticket
        refused: dict[int, float] = {}  # when a node was asked what it gave a useless answer to
        done: set[int] = set()
        lost: set[tuple[int, str]] = set()
        said = ""
        while True:
            now = time.monotonic()
            sent_to = [*asked.values(), *refused.items()]
            waits = {node for node, sent in sent_to if now - sent < self.patience.ask_again}
            for node in self.post.online() - done - waits:
                if not self.assigned or any(seat.node == node for seat in self.seats.values()):
                    asked[self.greet(node)] = (node, now)
            for reply in self.post.collect(list(asked)):
                node, sent = asked.pop(reply.ticket)
                wrong = reply.error or self._seated(node, reply)
                if not wrong:
                    done.add(node)
                    continue
                refused[node] = sent  # asked again, but not at once
                if (node, wrong) not in lost:  # told once
                    self.told(f"node {node}: {wrong}; it is asked again")
                    lost.add((node, wrong))
            rows = {client: seat.rows for client, seat in self.seats.items() if seat.rows is not None}
            missing = sorted(set(range(self.clients)) - set(rows))
            names = f": {', '.join(map(str, missing[:10]))}" if self.assigned and missing else ""
            if len(rows) >= self.enough:
                if missing:
                    self.told(f"begun without {len(missing)} of {self.clients} nodes{names}")
                return [rows.get(client, 0) for client in range(self.clients)]
            words = f"waiting for {len(missing)} of {self.clients} nodes{names}"
            if words != said:
                self.told(words)
                said = words
            if end is not None and time.monotonic() > end:
                raise FederaError(
                    f"{words}, for longer than {self.patience.start:g} s; start them and try again"
                )
            time.sleep(self.patience.poll)

    def _seated(self, node: int, reply: Reply) -> str:
        """Take a node's answer in, and return what is wrong with it; nothing, if all is well."""
        try:
            self.seat(node, reply)
        except FederaError as error:
            return str(error)
        return ""

    def greet(self, node: int) -> str:
        """Say hello to a node, and return the ticket."""
        assert self.hello is not None
        return self.post.send(node, *pack(self.hello), self.patience.round)

    def seat(self, node: int, reply: Reply) -> None:
        """Take a node's answer to `Hello` in.

        Raises:
            FederaError: it cannot take part, it is no answer, or another node has taken the client's part.
        """
        said, _ = unpack(reply.header, reply.tensors, Here, Refused)
        client = next((c for c, seat in self.seats.items() if seat.node == node), None)
        if isinstance(said, Refused):
            who = f"node {node}" if client is None else f"client {client}"
            raise FederaError(f"{who} cannot take part: {line(said.reason)}")
        if not self.assigned:
            client = said.client
            if client is None or not 0 <= client < self.clients:
                raise FederaError(f"node {node} says that it is client {client}, of 0 to {self.clients - 1}")
        assert client is not None
        held = self.seats.get(client)
        if held is not None and held.node != node and held.node in self.post.online():
            raise FederaError(f"nodes {held.node} and {node} both say that they are client {client}")
        if held is not None and held.rows is not None and held.rows != said.rows:
            raise FederaError(f"client {client} had {held.rows} rows before, and now {said.rows}")
        if self._rows is not None and self._rows[client] not in (0, said.rows):  # 0: it had not come yet
            raise FederaError(f"client {client} had {self._rows[client]} rows before, and now {said.rows}")
        self.seats[client] = Seat(node, said.rows, ready=True)

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[NodeSession]:
        """Hand jobs to the nodes for the time of the block."""
        yield NodeSession(self, experiment)
