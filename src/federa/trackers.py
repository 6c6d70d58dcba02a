"""Trackers: where every round's numbers go beside `metrics.jsonl`, each an extra and none required."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from federa.types import FederaError, Record


class Tracker(Protocol):
    """Receives the record of every round."""

    def log(self, record: Record) -> None:
        """Take one line of `metrics.jsonl`."""

    def close(self) -> None:
        """Flush and let go."""


class TensorBoard:
    """Writes event files into the run directory (`tensorboard --logdir DIR`)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise FederaError(
                "track: tensorboard needs its package: pip install 'federa[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: Record) -> None:
        """Write every number of the record as a scalar of its round."""
        for key, value in record.items():
            if key != "round" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard}
