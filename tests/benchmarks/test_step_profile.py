"""The profile of a step is a command that runs, and its parts are those of a step."""

import subprocess
import sys
from pathlib import Path

import pytest

from federa.cpu import native

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_profile.py"


@pytest.mark.slow
def test_step_profile() -> None:
    library = native.load()
    if library is None or not library.has_tiles():
        pytest.skip("no matrix tiles here")
    command = [sys.executable, str(SCRIPT), "--shapes", "2x8", "--steps", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    share = {cells[0].strip(): float(cells[2].strip(" %")) for cells in rows if cells[-1].endswith("% ")}
    assert sum(share.values()) == pytest.approx(100, abs=1)
    assert share["products with GELU and its slope"] > 0
    assert share["attention, back"] > 0
    assert any(cells[0].strip() == "384 x 1536" for cells in rows)
