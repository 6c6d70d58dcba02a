"""Tokenised tables, kept for the next experiment of this process: a comparison has dozens of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from federa.data.batches import Encoded

MAX_KEPT = 4  # two comparisons' worth of a training and a test set
OF_THE_LAST_CALL = ("truncation", "padding")  # a tokenizer remembers them; they come with every call
_kept: dict[str, Encoded] = {}


def tokenised(encode: Callable[[], Encoded], table: Any, tokenizer: Any, *settings: object) -> Encoded:
    """Return what `encode` makes of a table, computed once for the same content.

    Args:
        encode: tokenises.
        table: what it reads; its rows are part of the key, so a file that changed is tokenised again.
        tokenizer: what it tokenises with; its whole definition is part of the key.
        settings: all else that the result depends on, as things with a faithful `repr`.
    """
    digest = hashlib.sha256(repr((settings, _definition(tokenizer))).encode())
    digest.update(repr(table.features).encode(errors="surrogatepass"))  # the names behind numbers
    for column in sorted(table.column_names):
        digest.update(repr((column, list(table[column]))).encode(errors="surrogatepass"))
    key = digest.hexdigest()
    if key not in _kept:
        while len(_kept) >= MAX_KEPT:
            del _kept[next(iter(_kept))]  # the oldest
        _kept[key] = encode()
    return _kept[key]


def _definition(tokenizer: Any) -> Sequence[object]:
    """Return all that a fast tokenizer's result depends on, what it remembers of the last call apart."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return (
        {name: part for name, part in parts.items() if name not in OF_THE_LAST_CALL},
        type(tokenizer).__name__,
        tokenizer.model_max_length,
        tokenizer.special_tokens_map,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        tokenizer.pad_token_type_id,
    )
