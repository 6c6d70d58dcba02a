"""Messages to nodes through Flower's grid, whoever opened it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from federa.flower.federation import Reply
from federa.flower.messages import line
from federa.flower.records import Message, pack, unpack


class FlowerPost:
    """Carries messages through a SuperLink; see `Post`."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def online(self) -> set[int]:
        """See `Post.online`."""
        return set(self._grid.get_node_ids())

    def send(self, node: int, header: bytes, tensors: bytes, seconds: float) -> str:
        """See `Post.send`."""
        message = Message(pack(header, tensors), node, "train", ttl=seconds)
        (ticket,) = self._grid.push_messages([message])
        return str(ticket)

    def collect(self, tickets: Sequence[str]) -> list[Reply]:
        """See `Post.collect`."""
        if not tickets:
            return []
        replies = []
        for message in self._grid.pull_messages(list(tickets)):
            ticket = message.metadata.reply_to_message_id
            if message.has_error():
                replies.append(Reply(ticket, error=line(message.error.reason or "lost")))
            else:
                replies.append(Reply(ticket, *unpack(message)))
        return replies
