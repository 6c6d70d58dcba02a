"""All randomness comes from (seed, purpose, round, client): nothing random needs a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_for(root: int, *path: int | str) -> int:
    """Return the 63-bit seed of one purpose, independent of every other path.

    Args:
        root: the recipe's seed.
        path: what the randomness is for, for example `("cohort", round)`; words are hashed with CRC-32.
    """
    key = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in path]
    sequence = np.random.SeedSequence(root, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(root: int, *path: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded for one purpose (see `seed_for`)."""
    return np.random.default_rng(seed_for(root, *path))


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's generators seeded, and leave them as they were found."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
