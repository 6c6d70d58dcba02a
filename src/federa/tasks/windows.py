"""Texts longer than a model: overlapping windows of tokens, in which every token has one place of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from federa.types import FederaError, IntArray


def window_starts(length: int, room: int, overlap: int) -> list[int]:
    """Return where windows of `room` tokens begin, so that two neighbours share `overlap` tokens or more.

    The last one ends with the text, so no window is shorter than it must be.
    """
    if length <= room:
        return [0]
    return [*range(0, length - room, room - overlap), length - room]


def owners(length: int, room: int, overlap: int) -> IntArray:
    """Return the window in which each token has the most context on its poorer side, `(length,)`."""
    starts = np.array(window_starts(length, room, overlap))
    token = np.arange(length)
    context = np.minimum(token - starts[:, None], starts[:, None] + room - 1 - token)
    owner: IntArray = context.argmax(axis=0)
    return owner


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text.

    Raises:
        FederaError: it puts them elsewhere.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    raise FederaError("model.name: its tokenizer puts special tokens inside a text")


def require_room(room: int, overlap: int, limit: int) -> None:
    """Raise unless windows of `room` tokens can overlap by `overlap` and get on.

    Raises:
        FederaError: they cannot.
    """
    if room <= overlap:
        raise FederaError(
            f"task.overlap: windows of {limit} tokens have room for {room}, which must be more than the "
            f"overlap of {overlap}; raise task.max_length or lower task.overlap"
        )
