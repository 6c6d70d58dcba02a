"""Fused CPU kernels, compiled from `kernels.cpp` on this machine at the first use, and kept.

Where there is no compiler everything works without them, more slowly: `load` says why once, and
`status` goes into a run's `environment.json`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from federa.machine import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()  # noqa: SIM905
)
COMPILE_SECONDS = 120
_log = logging.getLogger(__name__)
_switched_off = ContextVar("switched_off", default=False)


class CannotBuildError(Exception):
    """The kernels cannot be had here; the message says why."""


def build(folder: Path) -> Path:
    """Return the compiled library in a folder, compiling it if this source and processor are new to it.

    Raises:
        CannotBuildError: no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotBuildError("there is no C++ compiler (c++, g++, clang++)")
    wide = ["-mprefer-vector-width=512"] if "avx512f" in _processor() else []
    command = [compiler, *FLAGS, *wide]
    key = hashlib.sha256("\n".join([*command, _processor(), SOURCE.read_text()]).encode()).hexdigest()[:16]
    library = folder / f"kernels-{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "kernels.so"
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
                check=False,
            )
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise CannotBuildError(f"{compiler} failed: {reason}")
            made.replace(library)  # in one step: other processes see all of it or nothing
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(str(error)) from error
    return library


def load() -> ctypes.CDLL | None:
    """Return the kernels, or None where they cannot be had; `FEDERA_KERNELS=off` turns them off."""
    return None if _switched_off.get() else _load()[0]


@contextmanager
def without() -> Iterator[None]:
    """Do without the kernels in a block."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def status() -> str:
    """Return `fused`, or the reason why the kernels are not in use."""
    return _load()[1] or "fused"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("FEDERA_KERNELS") == "off":
        return None, "FEDERA_KERNELS=off"
    try:
        return _bind(ctypes.CDLL(str(build(cache_folder())))), ""
    except (CannotBuildError, OSError) as error:
        _log.warning("fused CPU kernels are not in use, training is slower: %s", error)
        return None, str(error)


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    p, i64, i32, f32, u64 = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_uint64,
    )
    for dtype in ("f32", "bf16"):
        for name, types in {
            "gelu": [p] * 4 + [i64, i64, i32],
            "norm": [p] * 8 + [i64, i64, f32, f32, u64, i32],
            "norm_backward": [p] * 6 + [i64, i64, f32, u64, i32],
            "dropout": [p, p, i64, f32, u64, i32],
        }.items():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = types, None
    if library.has_tiles():
        library.attention.argtypes = [p] * 7 + [i64] * 4 + [f32, f32, u64, i32]
        library.attention_backward.argtypes = [p] * 11 + [i64] * 4 + [f32, f32, u64, i32]
        library.attention.restype = library.attention_backward.restype = None
    return library


@functools.cache
def _processor() -> str:
    """Return what a processor can do, so that one home folder serves different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
