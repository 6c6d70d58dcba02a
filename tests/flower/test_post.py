"""Answers are taken as far as they have come: whoever breaks off, or is slow, keeps nobody waiting."""

from types import SimpleNamespace

import pytest

from federa.flower import post
from federa.flower.post import FlowerPost
from federa.flower.records import WHOLE, Message, pack
from federa.types import RoundFailedError

# ruff: isort: split
from flwr.app import Error, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity


class SuperLink:
    """Holds answers, of which not all pieces may have come."""

    def __init__(self):
        self.announced, self.pieces, self.confirmed, self.asked = {}, {}, [], []
        self._runtime_client, self.node, self.run = self, Node(node_id=1), SimpleNamespace(run_id=5)

    def answer(self, content, **words):
        """Announce an answer, and return its ticket and its pieces' ids, the message's own first."""
        asked = Message(RecordDict(), 7, "train")
        asked.metadata.__dict__["_message_id"] = f"ticket-{len(self.announced)}"
        reply = Message(content, reply_to=asked) if not words else Message(words["error"], reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        self.pieces |= parts
        bare = Message(RecordDict(), reply_to=asked) if not words else reply
        bare.metadata.__dict__["_message_id"] = reply.object_id
        self.announced[asked.metadata.message_id] = (message_to_proto(bare), get_object_tree(reply))
        return asked.metadata.message_id, [
            reply.object_id,
            *(name for name in parts if name != reply.object_id),
        ]

    def PullMessages(self, request):
        self.asked.append(list(request.message_ids))
        found = [self.announced.pop(one) for one in request.message_ids if one in self.announced]
        return PullAppMessagesResponse(
            messages_list=[one for one, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request):
        content = self.pieces.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=content != b"", object_content=content or b""
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


@pytest.fixture()
def link(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", 5)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 2)
    return SuperLink()


def carrier_of(link, longest=64 << 20):
    carrier = FlowerPost(link)
    carrier.longest = longest
    return carrier


@pytest.mark.parametrize("size", [0, 1, WHOLE, WHOLE + 1, 3 * WHOLE])
def test_what_was_packed_arrives(link, size):
    tensors = bytes(i % 251 for i in range(100)) * (size // 100) + b"x" * (size % 100)
    ticket, ids = link.answer(pack(b"header", tensors))
    (reply,) = carrier_of(link).collect([ticket, "of nobody"])
    assert (reply.ticket, reply.header, reply.tensors, reply.error) == (ticket, b"header", tensors, "")
    assert link.confirmed == ids[:1]


def test_an_answer_that_is_still_coming_keeps_nobody_waiting(link):
    slow, ids = link.answer(pack(b"slow", b"x"))
    last = link.pieces[ids[-1]]
    link.pieces[ids[-1]] = b""
    quick, _ = link.answer(pack(b"quick", b"y"))
    carrier = FlowerPost(link)
    assert [reply.header for reply in carrier.collect([slow, quick])] == [b"quick"]
    assert carrier.collect([slow]) == [] and not link.asked[1:], (
        "it is announced once, and not asked for again"
    )
    link.pieces[ids[-1]] = last
    assert [reply.header for reply in carrier.collect([slow])] == [b"slow"]
    assert len(link.confirmed) == 2


def test_an_answer_that_breaks_off_is_lost(link):
    ticket, ids = link.answer(pack(b"header", b"x"))
    link.pieces[ids[-1]] = b""
    carrier = FlowerPost(link)
    assert carrier.collect([ticket]) == []
    del link.pieces[ids[-1]]
    (reply,) = carrier.collect([ticket])
    assert reply.error == "its answer broke off" and link.confirmed == ids[:1]


def test_an_answer_that_is_no_message_harms_nobody(link):
    ticket, ids = link.answer(pack(b"header", b"x"))
    link.pieces[ids[0]] = b"garbage"
    good, _ = link.answer(pack(b"good", b""))
    replies = FlowerPost(link).collect([ticket, good])
    assert "cannot be read" in replies[0].error and replies[1].header == b"good"


def test_flowers_own_errors_are_told(link):
    ticket, _ = link.answer(None, error=Error(3, "the node\nis away"))
    (reply,) = FlowerPost(link).collect([ticket])
    assert reply.error == "the node is away"


def test_an_answer_in_too_many_pieces_is_refused(link, monkeypatch):
    monkeypatch.setattr(post, "MOST_PIECES", 3)
    ticket, _ = link.answer(pack(b"header", b"x"))
    (reply,) = FlowerPost(link).collect([ticket])
    assert reply.error == "an answer in more than 3 pieces" and len(link.confirmed) == 1


def test_an_answer_that_is_too_long_is_refused(link, monkeypatch):
    monkeypatch.setattr(post, "ENVELOPE", 10_000)
    carrier = carrier_of(link, 3 * WHOLE)
    fits, _ = link.answer(pack(b"fits", b"".join(bytes([n]) * WHOLE for n in range(3))))
    long, ids = link.answer(pack(b"long", b"".join(bytes([n]) * (WHOLE + 7000) for n in range(3))))
    one, other = carrier.collect([fits, long])
    assert not one.error and other.error == f"an answer of more than {3 * WHOLE} bytes"
    assert ids[0] in link.confirmed


def test_what_nobody_asked_for_is_put_away(link):
    """A node may address what it likes to the server; Flower hands it on beside the answers."""
    ticket, ids = link.answer(pack(b"forged", b"x"))
    bare, tree = link.announced.pop(ticket)
    bare.metadata.reply_to_message_id = ""
    asked, _ = link.answer(pack(b"good", b"y"))
    link.PullMessages = lambda request: PullAppMessagesResponse(
        messages_list=[bare, link.announced[asked][0]], message_object_trees=[tree, link.announced[asked][1]]
    )
    told = []
    carrier = FlowerPost(link, told=told.append)
    assert [reply.header for reply in carrier.collect([asked])] == [b"good"]
    assert ids[0] in link.confirmed
    carrier.collect(["another"])
    assert told == [f"node {bare.metadata.src_node_id}: a message that nobody asked for; it is put away"]


def test_what_is_given_up_is_forgotten(link):
    slow, ids = link.answer(pack(b"slow", b"x"))
    link.pieces[ids[-1]] = b""
    carrier = FlowerPost(link)
    assert carrier.collect([slow]) == []
    carrier.forget(slow)
    assert link.confirmed == [slow]


def test_whoever_watches_is_heard(link):
    def gone():
        raise RoundFailedError("gone")

    with pytest.raises(RoundFailedError, match="gone"):
        FlowerPost(link, gone).online()


def test_few_are_held_at_once(link, monkeypatch):
    monkeypatch.setattr(post, "AT_ONCE", 100)
    tickets = [link.answer(pack(b"%d" % number, b"x" * 60))[0] for number in range(5)]
    carrier, counts = FlowerPost(link), []
    while tickets:
        replies = carrier.collect(tickets)
        counts.append(len(replies))
        tickets = [one for one in tickets if one not in {reply.ticket for reply in replies}]
    assert counts == [2, 2, 1]
