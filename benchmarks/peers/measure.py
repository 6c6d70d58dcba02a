"""Run one command and measure its whole process tree: wall, CPU seconds, peak memory. Linux only.

Daemons that a framework detaches stay in the tree: this process adopts orphans (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")
CPU_EVERY = 0.5  # seconds; a process that ends in between loses at most that much of its count
PSS_EVERY = 2.0  # a walk over the page tables of every process: not for free
GRACE = 10.0  # for what is left of a tree once its first process has ended


@dataclass(frozen=True)
class Measurement:
    """What one run cost.

    Attributes:
        returncode: of the command; None if it ran out of time.
        started: on CLOCK_MONOTONIC.
        wall: seconds until the first process ended.
        cpu: seconds of all processes of the tree, user and system.
        peak_pss: bytes; memory that processes share counts once.
        others: CPU seconds that the rest of the machine used meanwhile: noise, if it is not near zero.
    """

    returncode: int | None
    started: float
    wall: float
    cpu: float
    peak_pss: int
    others: float


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    born: int
    cpu: float


def read_process(pid: int) -> Process | None:
    """Return a process, or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold spaces and brackets
    return Process(pid, int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / TICKS)


def descendants(root: int) -> list[Process]:
    """Return all processes below one, itself left out."""
    found = [read_process(int(name)) for name in os.listdir("/proc") if name.isdigit()]
    children: dict[int, list[Process]] = {}
    for process in found:
        if process is not None:
            children.setdefault(process.parent, []).append(process)
    out, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        out += below
        todo += [process.pid for process in below]
    return out


def pss(pid: int) -> int:
    """Return a process's proportional set size in bytes, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def machine_cpu() -> float:
    """Return the CPU seconds that the machine has spent on anything since it started, on all cores."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / TICKS


@dataclass
class Sampler:
    """Follows a tree of processes."""

    root: int
    cpu: dict[tuple[int, int], float] = field(default_factory=dict)
    peak_pss: int = 0
    _cpu_at: float = 0.0
    _pss_at: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def sample(self) -> None:
        """Look at what is due."""
        now = time.monotonic()
        if now < self._cpu_at:
            return
        self._cpu_at = now + CPU_EVERY
        tree = descendants(self.root)
        for process in tree:
            self.cpu[process.pid, process.born] = process.cpu
        if now >= self._pss_at:
            # Soon again at first: a process that has not become its program yet is a few pages.
            self._pss_at = now + min(PSS_EVERY, max(0.1, now - self._began))
            self.peak_pss = max(self.peak_pss, sum(pss(process.pid) for process in tree))


def reap(leader: subprocess.Popen[bytes], sampler: Sampler) -> None:
    """Wait for what the first process left behind, end it if it stays, and collect every child."""
    until = time.monotonic() + GRACE
    while True:
        sampler.sample()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left:
            return
        if time.monotonic() > until:
            for process in left:  # children of ours, or adopted by us
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def run_measured(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    cores: Sequence[int] | None = None,
    timeout: float = 3600.0,
) -> Measurement:
    """Run a command to its end and return what it cost.

    Args:
        command: what to run. Nothing else may be running below this process.
        environment: all of its variables.
        log: a file for its output.
        cores: that it and all its children may use; None for all.
        timeout: seconds after which it is killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    sampler = Sampler(os.getpid())
    children, machine = resource.getrusage(resource.RUSAGE_CHILDREN), machine_cpu()
    with log.open("wb") as output:
        started = time.monotonic()
        leader = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )
        returncode: int | None = None
        try:
            while returncode is None and time.monotonic() - started < timeout:
                sampler.sample()
                with suppress(subprocess.TimeoutExpired):
                    returncode = leader.wait(timeout=0.25)
            wall = time.monotonic() - started
        finally:  # also when this process is interrupted: no contender may run beside the next one
            if returncode is None:
                leader.kill()
                leader.wait()
            reap(leader, sampler)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited = spent.ru_utime + spent.ru_stime - children.ru_utime - children.ru_stime
    # Two lower bounds: the kernel's sum misses children that nobody waited for, samples miss last moments.
    cpu = max(waited, sum(sampler.cpu.values()))
    return Measurement(
        returncode, started, wall, cpu, sampler.peak_pss, max(0.0, machine_cpu() - machine - cpu)
    )
