"""Messages to nodes through Flower's grid, whoever opened it.

A grid's own `pull_messages` waits for an answer that was announced until all of it is there: a node that is
killed, or slow, while it sends would keep the server for minutes, past every deadline. So answers are taken
here in pieces, as far as they have come; for that Flower's runtime interface is used, which is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from federa.flower.federation import Reply
from federa.flower.messages import line
from federa.flower.records import Message, pack, unpack

# ruff: isort: split
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

AT_ONCE = 64 << 20  # bytes of answers that are handed over at a time, so that few are held
MOST_PIECES = 1000  # of an answer; 5 MB each, as Flower cuts them
ENVELOPE = 1 << 20  # bytes of names and headers around what an answer carries


@dataclass(slots=True)
class _Arriving:
    """An answer that was announced.

    Attributes:
        name: Flower's id of it.
        run: Flower's number of the run.
        missing: ids of the pieces that are not here yet.
        pieces: those that are.
        length: their bytes.
    """

    name: str
    run: int
    missing: list[str]
    pieces: dict[str, bytes] = field(default_factory=dict)
    length: int = 0


class FlowerPost:
    """Carries messages through a SuperLink; see `Post`.

    Args:
        grid: Flower's.
        watch: is called now and then, and raises where what the nodes need is gone.
        told: is given a line about what is put away, once a node.
    """

    def __init__(
        self,
        grid: Any,
        watch: Callable[[], None] = lambda: None,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._grid, self._watch, self._told = grid, watch, told
        self._strangers: set[int] = set()
        self._arriving: dict[str, _Arriving] = {}
        self.longest = 0

    def online(self) -> set[int]:
        """See `Post.online`."""
        self._watch()
        return set(self._grid.get_node_ids())

    def send(self, node: int, header: bytes, tensors: bytes, seconds: float) -> str:
        """See `Post.send`."""
        message = Message(pack(header, tensors), node, "train", ttl=seconds)
        (ticket,) = self._grid.push_messages([message])
        return str(ticket)

    def collect(self, tickets: Sequence[str]) -> list[Reply]:
        """See `Post.collect`."""
        self._arriving = {ticket: self._arriving[ticket] for ticket in tickets if ticket in self._arriving}
        self._look([ticket for ticket in tickets if ticket not in self._arriving])
        replies, length = [], 0
        for ticket, arriving in list(self._arriving.items()):
            reply = self._fetch(ticket, arriving)
            if reply is None:
                continue
            del self._arriving[ticket]
            replies.append(reply)
            length += len(reply.tensors)
            if length > AT_ONCE:
                break
        return replies

    def forget(self, ticket: str) -> None:
        """See `Post.forget`."""
        self._arriving.pop(ticket, None)
        self._confirm(ticket)

    def _confirm(self, message: str) -> None:
        """Let the SuperLink forget a message; it would keep it in memory until the run is over."""
        node, run = self._grid.node, self._grid.run.run_id
        request = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=message)
        self._grid._runtime_client.ConfirmMessageReceived(request)

    def _look(self, tickets: Sequence[str]) -> None:
        """Note the answers that have been announced; each is named once."""
        if not tickets:
            return
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=tickets))
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            metadata = message.metadata
            if metadata.reply_to_message_id not in tickets:  # Flower hands on whatever a node addresses to us
                self._confirm(metadata.message_id)
                if metadata.src_node_id not in self._strangers:
                    self._strangers.add(metadata.src_node_id)
                    self._told(
                        f"node {metadata.src_node_id}: a message that nobody asked for; it is put away"
                    )
                continue
            missing = [one.object_id for one in iterate_object_tree(tree)]
            arriving = _Arriving(metadata.message_id, metadata.run_id, missing)
            self._arriving[metadata.reply_to_message_id] = arriving

    def _fetch(self, ticket: str, arriving: _Arriving) -> Reply | None:
        """Return an answer; None where a piece of it has not come yet."""
        wrong = self._wrong(arriving)
        if wrong is None:
            return None
        self._confirm(arriving.name)
        if wrong:
            return Reply(ticket, error=wrong)
        try:
            message = inflate_object_from_contents(arriving.name, arriving.pieces)
            if not isinstance(message, Message):
                raise TypeError(type(message).__name__)
            if message.has_error():
                return Reply(ticket, error=line(message.error.reason or "lost"))
            return Reply(ticket, *unpack(message))
        except Exception as error:  # whatever a node makes of it
            return Reply(ticket, error=f"an answer that cannot be read ({line(str(error), 100)})")

    def _wrong(self, arriving: _Arriving) -> str | None:
        """Take the pieces that have come; return what is wrong, nothing if all are here, None if not."""
        client, node = self._grid._runtime_client, self._grid.node
        if len(arriving.missing) + len(arriving.pieces) > MOST_PIECES:
            return f"an answer in more than {MOST_PIECES} pieces"
        while arriving.missing:
            piece = arriving.missing[-1]
            found = client.PullObject(PullObjectRequest(node=node, run_id=arriving.run, object_id=piece))
            if not found.object_found:  # Flower gives up on a sender that is silent for three minutes
                return "its answer broke off"
            if not found.object_available:
                return None
            arriving.pieces[arriving.missing.pop()] = found.object_content
            arriving.length += len(found.object_content)
            if arriving.length > self.longest + ENVELOPE:
                return f"an answer of more than {self.longest} bytes"
        return ""
