"""What clients keep for themselves from one of their rounds to the next."""

from __future__ import annotations

import tempfile
from pathlib import Path

from federa.state import load_state, save_state
from federa.types import Job, State


class KeptStates:
    """What clients keep for themselves (a local head), one small file a client and round.

    A job of round t reads the newest file from before t and writes that of t: a round that is run again after
    a crash finds what it found the first time.
    """

    def __init__(self, folder: Path | None, start: State) -> None:
        self.start = start
        self._own = tempfile.TemporaryDirectory(prefix="federa-") if folder is None else None
        self._folder = Path(self._own.name) if self._own is not None else Path(str(folder))

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
        save_state(self._folder / f"client-{job.client_id:06d}-round-{job.round:06d}.safetensors", state, {})
        for file in old[:-1]:
            file.unlink(missing_ok=True)

    def _files(self, client: int) -> list[Path]:
        return sorted(self._folder.glob(f"client-{client:06d}-round-*.safetensors"))


def _round_of(file: Path) -> int:
    return int(file.stem.rsplit("-", 1)[1])
