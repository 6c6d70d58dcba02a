"""What Flower's messages hold: a header, and the bytes of tensors, as one record each.

Whatever else imports Flower imports this first: Flower reads what it is to leave alone when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from federa.errors import FederaError

__all__ = ["SILENT", "Message", "pack", "unpack"]

SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
os.environ.update(SILENT)

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
except ImportError as error:
    raise FederaError(
        f'a federation of machines needs Flower: pip install "federa[flower]" ({error})'
    ) from error

TENSORS = "federa.safetensors"
WHOLE = 5 << 20  # bytes; longer ones go in pieces, which an ArrayRecord is cut into


def pack(header: bytes, tensors: bytes) -> RecordDict:
    """Return a message as Flower carries it."""
    content: dict[str, Any] = {"header": ConfigRecord({"json": header})}
    if 0 < len(tensors) <= WHOLE:  # one object and one request, where an ArrayRecord is three
        content["tensors"] = ConfigRecord({"state": tensors})
    elif tensors:
        content["tensors"] = ArrayRecord({"state": Array("uint8", (len(tensors),), TENSORS, tensors)})
    return RecordDict(content)


def unpack(message: Message) -> tuple[bytes, bytes]:
    """Return header and tensors of a message; of one that is not ours an empty header."""
    records: Mapping[str, Any] = message.content
    found = [records.get("header", {}).get("json"), records.get("tensors", {}).get("state")]
    if isinstance(found[1], Array) and found[1].stype == TENSORS:
        found[1] = found[1].data
    head, tensors = (one if isinstance(one, bytes) else b"" for one in found)
    return head, tensors
