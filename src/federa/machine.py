"""What a process finds on its machine: cores, and a place to keep things between runs."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import tempfile
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Return the number of cores that this process may use, which in a container may be few of many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control group, or one whose quota is "max"
        return cores


def cache_folder() -> Path:
    """Return where starts and compiled kernels are kept: `$FEDERA_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("FEDERA_CACHE"):
        return Path(chosen).resolve()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches).resolve() / "federa"
    try:
        return Path.home() / ".cache" / "federa"
    except RuntimeError:  # a user without a home, as in a container that is started under any number
        return Path(tempfile.gettempdir()) / f"federa-{os.getuid()}"


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even by SIGKILL (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
