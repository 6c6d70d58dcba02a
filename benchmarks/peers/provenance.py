"""What a figure was taken with: the code, the commit, the machine. Standard library only."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contenders import HERE, REPO, Contender

SHARED_CODE = ("learner.py", "workload.py", "plan.py", "flower_client.py", "nvflare_parts.py")


def code_of(contender: Contender, *more: str) -> str:
    """Return a short hash of the code that a contender's run depends on, and of more scripts here."""
    files = [HERE / name for name in (*SHARED_CODE, f"run_{contender.framework}.py", *more)]
    if contender.framework == "federa":
        files += sorted(p for p in (REPO / "src").rglob("*") if p.suffix in (".py", ".cpp"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


def mixed_code(contenders: Iterable[Contender], runs: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return a warning for every contender whose runs are not all of the code that is here now."""
    old = [c.name for c in contenders if any(run["code"] != code_of(c) for run in runs[c.name])]
    return [f"runs of {name} were made with other code than is here now; use a new --out" for name in old]


def commit() -> str:
    """Return federa's commit, with a plus sign if files under src differ from it."""
    git = ["git", "-C", str(REPO)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False
    )
    return (head.stdout.strip() or "no commit") + ("+" if changed.stdout.strip() else "")


def machine(cores: str) -> dict[str, Any]:
    """Return what the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    libc = " ".join(platform.libc_ver())
    about = {"processor": names[0] if names else platform.machine(), "cores": cores, "libc": libc}
    return about | {"kernel": platform.release(), "python": platform.python_version()}
