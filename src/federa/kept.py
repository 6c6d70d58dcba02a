"""What clients keep for themselves from one of their rounds to the next."""

from __future__ import annotations

import tempfile
from pathlib import Path

from federa.state import load_state, save_state
from federa.types import FederaError, Job, State


class KeptStates:
    """What clients keep for themselves (a local head), a folder a client and in it one small file a round.

    A job of round t reads the newest file from before t and writes that of t: a round that is run again after
    a crash finds what it found the first time. Neither looks at the folders of other clients.

    Args:
        folder: for all of it; None for one that is gone with this object.
        start: what a client has that has kept nothing yet; empty if clients keep nothing.

    Raises:
        FederaError: the folder is one of an earlier version's, whose heads nobody would find.
    """

    def __init__(self, folder: Path | None, start: State) -> None:
        self.start = start
        self._own = tempfile.TemporaryDirectory(prefix="federa-") if folder is None else None
        self._folder = Path(self._own.name) if self._own is not None else Path(str(folder))
        if any(self._folder.glob("client-*.safetensors")):
            raise FederaError(
                f"{self._folder} was kept by an earlier version of federa: go on with that one, or start anew"
            )

    def load(self, job: Job) -> State:
        """Return what the job's client kept last, or the common start."""
        if not self.start:
            return {}
        before = [f for f in self._files(job.client_id) if _round_of(f) < job.round]
        return load_state(before[-1])[0] if before else self.start

    def save(self, job: Job, state: State) -> None:
        """Keep a state for the client's next job; files that no resume can ask for go."""
        if not self.start:
            return
        old = [f for f in self._files(job.client_id) if _round_of(f) < job.round]
        save_state(self._of(job.client_id) / f"round-{job.round:06d}.safetensors", state, {})
        for file in old[:-1]:
            file.unlink(missing_ok=True)

    def _files(self, client: int) -> list[Path]:
        return sorted(self._of(client).glob("round-*.safetensors"))

    def _of(self, client: int) -> Path:
        return self._folder / f"client-{client:06d}"


def _round_of(file: Path) -> int:
    return int(file.stem.rsplit("-", 1)[1])
