"""Frames between two processes of one user, over a Unix socket that nobody else can reach.

A frame is its length, in eight bytes with the highest first, and as many bytes. Nothing in it is run or
unpickled.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from federa.errors import FederaError

_LENGTH = struct.Struct("!Q")
_PIECE = 1 << 20  # bytes read at once: a wrong length takes no memory before the bytes come


def send(connection: socket.socket, frames: Sequence[bytes], limits: Sequence[int]) -> None:
    """Send frames, each no longer than its limit in bytes.

    Raises:
        FederaError: one is longer; nothing was sent.
        OSError: the other side has ended.
    """
    for frame, limit in zip(frames, limits, strict=True):
        _require(len(frame), limit)
    for frame in frames:
        connection.sendall(_LENGTH.pack(len(frame)))
        if frame:  # nothing, sent to one who has heard all and left, would be a broken pipe
            connection.sendall(frame)


def receive(connection: socket.socket, limits: Sequence[int]) -> list[bytes]:
    """Return as many frames as there are limits, each in bytes.

    Raises:
        FederaError: one is longer than its limit.
        OSError: the other side has ended before all had come.
    """
    frames = []
    for limit in limits:
        (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
        _require(length, limit)
        frames.append(_exactly(connection, length))
    return frames


def _require(length: int, limit: int) -> None:
    if length > limit:
        raise FederaError(f"message: a part of {length} bytes, more than {limit}")


def _exactly(connection: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = connection.recv(min(length - len(found), _PIECE))
        if not piece:
            raise ConnectionError(f"it ended after {len(found)} of {length} bytes")
        found += piece
    return bytes(found)


def require_same_user(connection: socket.socket) -> None:
    """Raise unless the other side of a connection is a process of this user.

    Raises:
        FederaError: it is another's.
    """
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux: the folder's rights alone keep others out
        return
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.getuid():
        raise FederaError(f"a process of user {user} at the socket of user {os.getuid()}")


def private_folder() -> Path:
    """Return this user's folder for sockets, which nobody else can enter.

    Raises:
        FederaError: somebody else has made it, or may enter it.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"federa-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise FederaError(
            f"{folder}: others may enter it; remove it, or set XDG_RUNTIME_DIR to a folder of your own"
        )
    return folder
