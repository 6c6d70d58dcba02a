"""Two processes never work in one run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from federa import FederaError, run
from federa.checkpoint import RunDirectory
from federa.config import parse_config

HOLD = "import sys; from pathlib import Path; from federa.checkpoint import RunDirectory\nwith RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"


def test_a_directory_that_another_process_works_in_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(recipe)
    folder = RunDirectory(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(config.to_yaml())
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FederaError, match="another process"):
            run(out=folder.path, resume=True)
        assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml"]
    finally:
        holder.kill()
        holder.wait()
    assert run(out=folder.path, resume=True).state.round == 3
