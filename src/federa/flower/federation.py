"""A run whose clients are nodes elsewhere: the simulator's round loop, with messages instead of an engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from federa import __version__
from federa.config import RunConfig
from federa.data.batches import Encoded, Ragged
from federa.data.datasets import read_held_out
from federa.data.groups import UNKNOWN, Groups
from federa.experiment import Experiment, KeptStates, encoded, load_model, prepare
from federa.flower.messages import (
    INIT,
    PROTOCOL,
    Hello,
    Here,
    Refused,
    Train,
    Trained,
    agreed,
    pack,
    unpack,
)
from federa.models import require_base
from federa.run import Place
from federa.server import OK, verdict
from federa.state import num_bytes
from federa.types import Absence, FederaError, FloatArray, IntArray, Job, State, Update

SLACK_BYTES = 1 << 16  # of names and shapes, beside the tensors of an update


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
    """Carries messages to nodes and back; Flower's grid, or a test's."""

    def online(self) -> set[int]:
        """Return the ids of the nodes that can be reached now."""

    def send(self, node: int, header: bytes, tensors: bytes, seconds: float) -> str:
        """Send a message that is of no use after so many seconds, and return its ticket."""

    def collect(self, tickets: Sequence[str]) -> list[Reply]:
        """Return the replies that have come, each once."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server waits.

    Attributes:
        start: seconds for all nodes to join at the start; None without end.
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


PATIENT = Patience()


@dataclass(slots=True)
class _Seat:
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
        self.seats = {client: _Seat(node) for client, node in (seats or {}).items()}
        self.assigned = seats is not None
        self.hello: Hello | None = None

    def build(
        self, config: RunConfig, init: State | None, kept: Path | None, base: str | None, cache: Path | None
    ) -> Experiment:
        """Load the model and the evaluation set, and wait for the nodes."""
        if config.cohort > self.clients:
            raise FederaError(f"cohort: {config.cohort} clients a round, but there are {self.clients} nodes")
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
        self.hello = Hello(
            protocol=PROTOCOL,
            version=__version__,
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
            labels=labels,
            groups=Groups(["all"], nobody, unknown),
            fingerprint=loaded.fingerprint,
            tokenizer=tokenizer,
            counts=np.array(sizes, dtype=np.int64)[:, None],
            sizes=ready.sizes,
            seconds=seconds,
        )

    def _gather(self) -> list[int]:
        """Greet nodes until every client has answered, and return their rows.

        Raises:
            FederaError: a node's recipe, model or data do not fit, or the time is over.
        """
        end = None if self.patience.start is None else time.monotonic() + self.patience.start
        asked: dict[str, int] = {}  # the node, by ticket
        done: set[int] = set()
        said = ""
        while True:
            for node in self.post.online() - done - set(asked.values()):
                if not self.assigned or any(seat.node == node for seat in self.seats.values()):
                    asked[self.greet(node)] = node
            for reply in self.post.collect(list(asked)):
                node = asked.pop(reply.ticket)
                if not reply.error:
                    self.seat(node, reply)
                    done.add(node)
            held = [client for client, seat in self.seats.items() if seat.rows is not None]
            if len(held) == self.clients:
                return [self.seats[client].rows or 0 for client in range(self.clients)]
            missing = sorted(set(range(self.clients)) - set(held))
            words = f"waiting for {len(missing)} of {self.clients} nodes"
            words += f": {', '.join(map(str, missing[:10]))}" if self.assigned else ""
            if words != said:
                self.told(words)
                said = words
            if end is not None and time.monotonic() > end:
                raise FederaError(
                    f"{words}, for longer than {self.patience.start:g} s; start them and try again"
                )
            time.sleep(self.patience.poll)

    def greet(self, node: int) -> str:
        """Say hello to a node, and return the ticket."""
        assert self.hello is not None
        return self.post.send(node, *pack(self.hello), self.patience.round)

    def seat(self, node: int, reply: Reply) -> None:
        """Take a node's answer to `Hello` in.

        Raises:
            FederaError: it cannot take part.
        """
        said, _ = unpack(reply.header, reply.tensors, Here, Refused)
        client = next((c for c, seat in self.seats.items() if seat.node == node), None)
        if isinstance(said, Refused):
            who = f"node {node}" if client is None else f"client {client}"
            raise FederaError(f"{who} cannot take part: {said.reason}")
        if not self.assigned:
            client = said.client
            if client is None or not 0 <= client < self.clients:
                raise FederaError(f"node {node} says that it is client {client}, of 0 to {self.clients - 1}")
        assert client is not None
        held = self.seats.get(client)
        if held is not None and held.rows is not None and held.rows != said.rows:
            raise FederaError(f"client {client} had {held.rows} rows before, and now {said.rows}")
        if self._rows is not None and said.rows != self._rows[client]:
            raise FederaError(f"client {client} had {self._rows[client]} rows before, and now {said.rows}")
        self.seats[client] = _Seat(node, said.rows, ready=True)

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[NodeSession]:
        """Hand jobs to the nodes for the time of the block."""
        yield NodeSession(self, experiment)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A message on its way.

    Attributes:
        node: where to.
        client: whose job it is; None for a hello.
        sent: when.
    """

    node: int
    client: int | None
    sent: float


@dataclass(slots=True)
class _Round:
    """What is still owed in a round.

    Attributes:
        params: the state that is sent.
        open: jobs without an answer, by client.
        asked: messages on their way, by ticket.
        answers: what has come, by client.
    """

    params: State
    open: dict[int, Job]
    asked: dict[str, _Asked] = field(default_factory=dict)
    answers: dict[int, Update | Absence] = field(default_factory=dict)


class NodeSession:
    """Answers a round's jobs from the nodes that hold the data; the server evaluates by itself."""

    def __init__(self, federation: Federation, experiment: Experiment) -> None:
        self._federation, self._experiment = federation, experiment

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        return self._experiment.predict(params, batches, job)

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update | Absence]:
        """Yield the updates that come in time, in the order of the jobs, and why the others did not."""
        patience, config = self._federation.patience, self._experiment.config
        work = _Round(params, {job.client_id: job for job in jobs})
        needed = max(1, math.ceil(config.min_success * len(jobs)))
        end = time.monotonic() + patience.round
        while work.open:
            self._ask(work)
            self._take(work)
            over = time.monotonic() > end
            if over and (patience.short == "fail" or self._counting(work) >= needed):
                break
            if work.open:
                time.sleep(patience.poll)
        for job in jobs:
            yield work.answers.get(job.client_id) or Absence(job, "no answer by the end of the round")

    def _counting(self, work: _Round) -> int:
        limit = self._experiment.config.max_update_norm
        return sum(
            isinstance(answer, Update) and verdict(answer, work.params, limit) == OK
            for answer in work.answers.values()
        )

    def _ask(self, work: _Round) -> None:
        """Send jobs to nodes that can be reached and have none on its way, or one that may be lost."""
        federation, now = self._federation, time.monotonic()
        waits = {one.node for one in work.asked.values() if now - one.sent < federation.patience.ask_again}
        online = federation.post.online() - waits
        seats = {client: federation.seats[client] for client in work.open if client in federation.seats}
        for client, seat in seats.items():
            if seat.node in online:
                ready = seat.ready
                ticket = self._send(work, seat, work.open[client]) if ready else federation.greet(seat.node)
                work.asked[ticket] = _Asked(seat.node, client if ready else None, now)
        if not federation.assigned:  # a client may have come back under another id
            for node in online - {seat.node for seat in federation.seats.values()}:
                work.asked[federation.greet(node)] = _Asked(node, None, now)

    def _send(self, work: _Round, seat: _Seat, job: Job) -> str:
        federation = self._federation
        said = Train(run=federation.run, round=job.round, client=job.client_id, seed=job.seed, lr=job.lr)
        state = dict(work.params)
        if seat.wants_init:
            state |= {f"{INIT}{name}": t for name, t in self._experiment.params.items()}
        return federation.post.send(seat.node, *pack(said, state), federation.patience.round)

    def _take(self, work: _Round) -> None:
        """Take what has come."""
        for reply in self._federation.post.collect(list(work.asked)):
            asked = work.asked.pop(reply.ticket)
            who = f"node {asked.node}" if asked.client is None else f"client {asked.client}"
            if reply.error:
                self._federation.told(f"{who}: {reply.error}; it is asked again")
            elif asked.client is None:
                self._seat(work, asked.node, reply)
            elif asked.client in work.open:
                self._answered(work, work.open[asked.client], reply)

    def _seat(self, work: _Round, node: int, reply: Reply) -> None:
        federation = self._federation
        try:
            federation.seat(node, reply)
        except FederaError as error:
            federation.told(str(error))
            client = next((c for c, seat in federation.seats.items() if seat.node == node), None)
            if client in work.open:
                work.answers[client] = Absence(work.open.pop(client), str(error))

    def _answered(self, work: _Round, job: Job, reply: Reply) -> None:
        try:
            answer = self._read(work, job, reply)
        except FederaError as error:
            answer = Absence(job, str(error))
        if answer is None:
            return
        work.answers[job.client_id] = answer
        del work.open[job.client_id]
        if isinstance(answer, Absence):
            self._federation.told(f"round {job.round}: client {job.client_id}: {answer.reason}")

    def _read(self, work: _Round, job: Job, reply: Reply) -> Update | Absence | None:
        """Return what a reply to a job is worth; None where the node is to be asked again."""
        federation, seat = self._federation, self._federation.seats[job.client_id]
        most = num_bytes(work.params) + SLACK_BYTES
        if len(reply.tensors) > most:
            raise FederaError(f"an update of {len(reply.tensors)} bytes, more than {most}")
        said, delta = unpack(reply.header, reply.tensors, Trained, Refused)
        if isinstance(said, Refused):
            if said.wants is None:
                return Absence(job, f"refused: {said.reason}")
            seat.ready, seat.wants_init = said.wants != "hello", said.wants == "init"
            return None
        if (said.run, said.round, said.client, said.seed) != (
            federation.run,
            job.round,
            job.client_id,
            job.seed,
        ):
            raise FederaError(f"an update of round {said.round} of run {said.run}, not of this job")
        seat.wants_init = False
        ordered = {name: delta.pop(name) for name in work.params if name in delta}
        return Update(job, {**ordered, **delta}, said.weight, said.metrics)
