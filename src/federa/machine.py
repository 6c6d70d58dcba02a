"""What a process finds on its machine: cores, memory, and a place to keep things between runs."""

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


def free_main_memory() -> int:
    """Return the bytes of main memory that this process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # none
        return free
    return max(0, min(free, limit - used))


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
