"""What a process finds on its machine: cores, and a place to keep things between runs."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return where starts and compiled kernels are kept: `$FEDERA_CACHE`, else the user's cache folder."""
    if "FEDERA_CACHE" in os.environ:
        return Path(os.environ["FEDERA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "federa"
