"""Rivals that take turns, so that a slow minute hits them alike: used by the other benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Way = Callable[[], object]


def in_turns(
    ways: Mapping[str, Way], repeats: int, times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each way, once a turn; the first turn warms up.

    Args:
        ways: what to time, by name.
        repeats: turns that count.
        times: calls of a way in its turn, of which the mean counts.
        clock: `time.thread_time` for what one thread does: it stands still while others have the core.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = clock()
            for _ in range(times):
                way()
            if turn:
                seconds[name].append((clock() - began) / times)
    return seconds


def shown(values: list[float], unit: float = 1.0, digits: int = 2) -> str:
    """Return a median, with the least and the most in brackets."""
    middle, least, most = (
        f"{v / unit:.{digits}f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least}-{most})"


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: object) -> str:
    """Return the head of one."""
    return f"{row(*cells)}\n|{'---|' * len(cells)}"
