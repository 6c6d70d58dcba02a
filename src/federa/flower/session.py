"""A round over nodes: jobs go out, updates come back, and what is lost is asked for again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from federa.experiment import Experiment
from federa.flower.messages import INIT, SLACK_BYTES, Refused, Train, Trained, line, pack, unpack
from federa.server import OK, verdict
from federa.types import Absence, FederaError, FloatArray, IntArray, Job, State, Update

if TYPE_CHECKING:
    from federa.flower.federation import Federation, Reply, Seat


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

    @property
    def who(self) -> str:
        """Who is asked, in words."""
        return f"node {self.node}" if self.client is None else f"client {self.client}"


@dataclass(slots=True)
class _Round:
    """What is still owed in a round.

    Attributes:
        number: of the round.
        params: the state that is sent.
        open: jobs without an answer, by client.
        asked: messages on their way, by ticket.
        answers: what has come and was not handed on yet, by client.
        counting: how many updates have come that the server will count.
        refused: nodes that cannot take part, and when that was found.
        needed: how many must count.
    """

    number: int
    params: State
    needed: int
    open: dict[int, Job]
    asked: dict[str, _Asked] = field(default_factory=dict)
    answers: dict[int, Update | Absence] = field(default_factory=dict)
    counting: int = 0
    refused: dict[int, float] = field(default_factory=dict)


class NodeSession:
    """Answers a round's jobs from the nodes that hold the data; the server evaluates by itself."""

    def __init__(self, federation: Federation, experiment: Experiment) -> None:
        self._federation, self._experiment = federation, experiment
        self._late: dict[str, tuple[str, float]] = {}  # of rounds that are over: whose, and when given up
        self._said: set[str] = set()

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        return self._experiment.predict(params, batches, job)

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update | Absence]:
        """Yield the updates that come in time, in the order of the jobs, and why the others did not."""
        patience, config = self._federation.patience, self._experiment.config
        needed = max(1, math.ceil(config.min_success * len(jobs)))
        work = _Round(jobs[0].round, params, needed, {job.client_id: job for job in jobs})
        if self._federation.assigned:
            for client in work.open.keys() - self._federation.seats.keys():
                work.answers[client] = Absence(work.open.pop(client), "it has no key here")
        end = time.monotonic() + patience.round
        queue = deque(jobs)
        while work.open:
            self._ask(work)
            self._take(work)
            while queue and queue[0].client_id in work.answers:  # handed on at once, to keep few of them
                yield work.answers.pop(queue.popleft().client_id)
            over = time.monotonic() > end
            if over and (patience.short == "fail" or work.counting >= needed):
                break
            if work.open:
                time.sleep(patience.poll)
        for ticket, one in work.asked.items():
            self._late[ticket] = (f"round {work.number}: {one.who}", one.sent + patience.round)
        for job in queue:
            yield work.answers.get(job.client_id) or Absence(job, "no answer by the end of the round")

    def _counts(self, work: _Round, update: Update) -> bool:
        """Return whether the server will count an update."""
        rows = self._federation.seats[update.job.client_id].rows or 0
        return verdict(update, work.params, self._experiment.config.max_update_norm, rows) == OK

    def _ask(self, work: _Round) -> None:
        """Send jobs to nodes that can be reached and have none on its way, or one that may be lost."""
        federation, now = self._federation, time.monotonic()
        recent = now - federation.patience.ask_again
        waits = {one.node for one in work.asked.values() if one.sent > recent}
        waits |= {node for node, found in work.refused.items() if found > recent}
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

    def _send(self, work: _Round, seat: Seat, job: Job) -> str:
        federation = self._federation
        said = Train(run=federation.run, round=job.round, client=job.client_id, seed=job.seed, lr=job.lr)
        state = dict(work.params)
        if seat.wants_init:
            state |= {f"{INIT}{name}": t for name, t in self._experiment.params.items()}
        return federation.post.send(seat.node, *pack(said, state), federation.patience.round)

    def _take(self, work: _Round) -> None:
        """Take what has come."""
        post, now = self._federation.post, time.monotonic()
        for ticket in [ticket for ticket, (_, end) in self._late.items() if end < now]:
            post.forget(ticket)  # a SuperLink keeps what nobody takes
            del self._late[ticket]
        for reply in post.collect([*work.asked, *self._late]):
            if reply.ticket in self._late:  # of no use, but out of the way now
                whose, _ = self._late.pop(reply.ticket)
                self._say_once(f"{whose}: an answer came after the end of the round; it is put away")
                continue
            asked = work.asked.pop(reply.ticket)
            if reply.error:
                self._federation.told(f"{asked.who}: {reply.error}; it is asked again")
            elif asked.client is None:
                self._seat(work, asked.node, reply)
            elif asked.client in work.open:
                self._answered(work, work.open[asked.client], reply)
            else:
                self._say_once(
                    f"round {work.number}: {asked.who}: it answered more than once; one answer counts"
                )

    def _say_once(self, said: str) -> None:
        if said not in self._said:
            self._said.add(said)
            self._federation.told(said)

    def _seat(self, work: _Round, node: int, reply: Reply) -> None:
        federation = self._federation
        try:
            federation.seat(node, reply)
        except FederaError as error:
            federation.told(str(error))
            work.refused[node] = time.monotonic()
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
        federation, left = self._federation, len(work.open) - 1
        if isinstance(answer, Absence):
            federation.told(f"round {job.round}: client {job.client_id}: {answer.reason}")
            if federation.patience.short == "wait" and work.counting + left < work.needed:
                # without it the round cannot end: the node is asked again, in a while
                work.refused[federation.seats[job.client_id].node] = time.monotonic()
                return
        work.answers[job.client_id] = answer
        del work.open[job.client_id]
        if isinstance(answer, Update):
            work.counting += self._counts(work, answer)

    def _read(self, work: _Round, job: Job, reply: Reply) -> Update | Absence | None:
        """Return what a reply to a job is worth; None where the node is to be asked again."""
        federation, seat = self._federation, self._federation.seats[job.client_id]
        most = self._experiment.config.wire.size(work.params) + SLACK_BYTES
        if len(reply.tensors) > most:
            raise FederaError(f"an update of {len(reply.tensors)} bytes, more than {most}")
        said, delta = unpack(reply.header, reply.tensors, Trained, Refused)
        if isinstance(said, Refused):
            if said.wants is None:
                return Absence(job, f"refused: {line(said.reason)}")
            seat.ready, seat.wants_init = said.wants != "hello", said.wants == "init"
            return None
        if (said.run, said.round, said.client, said.seed) != (
            federation.run,
            job.round,
            job.client_id,
            job.seed,
        ):
            raise FederaError(f"an update of round {said.round} of run {line(said.run, 40)}, not of this job")
        seat.wants_init = False
        if "loss" not in said.metrics:
            raise FederaError("an update without its loss")
        if said.weight > (seat.rows or 0):  # of a client that joined late the run itself does not know them
            raise FederaError(f"weight {said.weight:g} exceeds the client's {seat.rows} examples")
        read = self._experiment.config.wire.decode(delta, work.params)
        return Update(job, read, said.weight, said.metrics)
