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
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from federa.machine import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
FLAGS += ["-shared", "-fPIC", "-Wno-psabi"]
COMPILE_SECONDS = 120
_log = logging.getLogger(__name__)
_switched_off = ContextVar("switched_off", default=False)


class CannotBuildError(Exception):
    """The kernels cannot be had here; the message says why."""


class Map(ctypes.Structure):
    """`Map` in `kernels.cpp`: one of several products that share what goes in or what comes out."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("transposed", ctypes.c_bool),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("low", ctypes.c_void_p),
    )


def build(folder: Path) -> Path:
    """Return the compiled library in a folder, compiling it if this source and machine are new to it.

    The name of a library tells what went into it and what came out: one that was cut short, which would kill
    the process that loads it, is made again.

    Raises:
        CannotBuildError: no compiler, or it failed; others can change what is in the folder.
    """
    try:
        compiler = _compiler()
        wide = ["-mprefer-vector-width=512"] if "avx512f" in _processor() else []
        command = [*compiler, *FLAGS, *wide, str(SOURCE)]
        version = _run([*compiler, "--version"]).stdout
        key = _digest("\n".join([*command, version, _processor(), SOURCE.read_text()]).encode())
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(folder)
        for library in folder.glob(f"kernels-{key}-*.so"):
            _check_owner(library)
            if library.stem.endswith(_digest(library.read_bytes())):
                return library
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "kernels.so"
            done = _run([*command, "-o", str(made)])
            if done.returncode != 0:
                raise CannotBuildError(f"{shlex.join(compiler)} failed: {_reason(done.stderr)}")
            made.chmod(0o700)
            with made.open("rb") as file:
                library = folder / f"kernels-{key}-{_digest(file.read())}.so"
                os.fsync(file)
            return made.replace(library)  # in one step: other processes see all of it or nothing
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(str(error)) from error


def _compiler() -> list[str]:
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))  # it may be two words: ccache g++
    except ValueError as error:
        raise CannotBuildError(f"CXX: {error}") from error
    found = [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path]
    if not chosen and not found:
        raise CannotBuildError("there is no C++ compiler (c++, g++, clang++)")
    return chosen or found[:1]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _reason(stderr: str) -> str:
    """Return the line that says why a compiler failed: warnings may come before it."""
    lines = stderr.strip().splitlines() or ["no message"]
    telling = (line for line in lines if any(word in line for word in ("error", "cannot find", "undefined")))
    return next(telling, lines[0])


def _check_owner(path: Path) -> None:
    """Refuse code that another user could have put there."""
    found, above = path.stat(), path.parent.stat().st_mode
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise CannotBuildError(f"{path} belongs to another user, or others can write to it")
    if above & stat.S_IWOTH and not above & stat.S_ISVTX:  # anyone can put another one in its place
        raise CannotBuildError(f"everybody can write to {path.parent}, which code is not loaded from")


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
    """Return `fused`, `fused, without matrix tiles`, or the reason why the kernels are not in use."""
    library, reason = _load()
    if library is None:
        return reason
    return "fused" if library.has_tiles() else "fused, without matrix tiles"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("FEDERA_KERNELS") == "off":
        return None, "FEDERA_KERNELS=off"
    try:
        return _bind(ctypes.CDLL(str(build(cache_folder() / "kernels")))), ""
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
            "attention_one": [p] * 7 + [i64] * 4 + [f32, f32, u64, i32],
            "attention_one_backward": [p] * 9 + [i64] * 4 + [f32, f32, u64, i32],
        }.items():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = types, None
    if library.has_tiles():
        for name, types in {
            "attention": [p] * 7 + [i64] * 4 + [f32, f32, u64, i32],
            "attention_backward": [p] * 11 + [i64] * 4 + [f32, f32, u64, i32],
            "pack": [p, p, i64, i64, i32],
            "linear": [p] * 5 + [i64] * 3 + [p, p, i32, i64, f32, p, i32],
            "linear_each": [p, ctypes.POINTER(Map)] + [i64] * 4 + [i32],
            "linear_sum": [ctypes.POINTER(Map), i64, p, p] + [i64] * 3 + [i32],
            "linear_gelu": [p] * 5 + [i64] * 3 + [i32],
            "linear_norm": [p] * 9 + [i64] * 3 + [f32, f32, u64, i32],
            "sum_of_products": [p] * 3 + [i64] * 3 + [i32, i32],
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
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
