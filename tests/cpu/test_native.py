"""Building the kernels: kept between uses, whole or absent, and training goes on without them."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import stat
from pathlib import Path

import pytest
import torch

from federa.cpu import native


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module decide anew, and forget the decision after the test."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that this machine's compiler made."""
    try:
        return native.build(tmp_path_factory.mktemp("real"))
    except native.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiled(real: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    return Path(shutil.copy2(real, folder))


def script(path: Path, *lines: str) -> str:
    """Write a compiler; return its path."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def copier(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes no time: it copies what the true one made. Its version is in a file."""
    (tmp_path / "version").write_text("1")
    says = f"[ $1 = --version ] && exec cat '{tmp_path / 'version'}'"
    monkeypatch.setenv("CXX", script(tmp_path / "cc", says, "for last; do :; done", f"cp '{real}' $last"))
    return tmp_path


def test_a_library_is_compiled_once(copier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copier / "kernels"
    first = native.build(folder)
    changed = first.stat().st_mtime_ns
    assert native.build(folder) == first
    assert first.stat().st_mtime_ns == changed
    assert list(folder.iterdir()) == [first]
    processor = native._processor()
    monkeypatch.setattr(native, "_processor", lambda: processor + " another")
    other = native.build(folder)
    (copier / "version").write_text("2")
    assert len({first, other, native.build(folder)}) == 3


@pytest.mark.parametrize("left", [0, 100, 40_000])
def test_a_library_that_was_cut_short_is_made_again(copier: Path, left: int) -> None:
    library = native.build(copier / "kernels")
    whole = library.read_bytes()
    assert left < len(whole)
    library.write_bytes(whole[:left])
    again = native.build(copier / "kernels")
    assert again.read_bytes() == whole
    native._bind(native.ctypes.CDLL(str(again)))


def test_what_is_kept_is_the_users_alone_whatever_the_umask(copier: Path) -> None:
    before = os.umask(0o002)
    try:
        library = native.build(copier / "cache" / "federa" / "kernels")
        assert native.build(library.parent) == library
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.parents[1].stat().st_mode) == 0o775
    assert [stat.S_IMODE(path.stat().st_mode) for path in (library.parent, library)] == [0o700, 0o700]


@pytest.mark.parametrize("whose", ["folder", "library", "above"])
def test_what_others_can_write_to_is_not_loaded(compiled: Path, whose: str) -> None:
    folder = compiled.parent
    path = {"folder": folder, "library": compiled, "above": folder.parent}[whose]
    path.chmod(0o777)
    with pytest.raises(native.CannotBuildError, match=str(path)):
        native.build(folder)
    path.chmod(0o1777 if whose == "above" else 0o755)  # in a sticky folder nobody can rename what is mine
    assert native.build(folder) == compiled


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["folder", "library"])
def test_what_belongs_to_another_user_is_not_loaded(
    afresh: None,
    compiled: Path,
    whose: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = compiled if whose == "library" else compiled.parent
    os.chown(path, 12345, -1)
    monkeypatch.setenv("FEDERA_CACHE", str(compiled.parents[1]))
    assert native.load() is None
    assert f"{path} belongs to another user" in caplog.text


def test_a_compiler_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "[ $1 = --version ] && exit", "for last; do :; done", "echo half > $last"
    says = "echo 'note: the ABI changed' >&2", "echo 'error: no such flag' >&2", "exit 1"
    monkeypatch.setenv("CXX", script(tmp_path / "cc", *lines, *says))
    with pytest.raises(native.CannotBuildError, match="cc failed: error: no such flag"):
        native.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_may_be_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"sh '{script(tmp_path / 'my cc', 'echo error: $1 >&2', 'exit 1')}'")
    with pytest.raises(native.CannotBuildError, match="error: -std=c"):
        native.build(tmp_path / "cache")
    for wrong in ("g++ '", "/no/such/compiler"):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(native.CannotBuildError, match=r"quotation|No such file"):
            native.build(tmp_path / "cache")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_compiles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    native._bind(native.ctypes.CDLL(str(native.build(tmp_path))))


@pytest.mark.parametrize(("tiles", "said"), [(1, "fused"), (0, "fused, without matrix tiles")])
def test_the_status_tells_whether_there_are_tiles(
    tiles: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def has_tiles(self) -> int:
            return tiles

    monkeypatch.setattr(native, "_load", lambda: (Library(), ""))
    assert native.status() == said


def test_workers_of_a_run_must_share_what_computes_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from federa.engines import ray

    said = {}
    for status in ("fused", "fused, without matrix tiles", "FEDERA_KERNELS=off", "there is no C++ compiler"):
        monkeypatch.setattr(native, "status", lambda status=status: status)
        said[status] = ray._arithmetic()
    assert said["FEDERA_KERNELS=off"] == said["there is no C++ compiler"]
    assert len(set(said.values())) == 3


def test_without_a_compiler_that_is_said(
    afresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDERA_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    assert "no C++ compiler" in caplog.text
    assert "no C++ compiler" in native.status()


def test_switched_off_is_quiet(
    afresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDERA_KERNELS", "off")
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    assert caplog.text == ""
    assert native.status() == "FEDERA_KERNELS=off"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64's levels")
def test_a_processor_with_fewer_instructions_drops_the_same(tmp_path: Path) -> None:
    if "avx2" not in native._processor():
        pytest.skip("this processor cannot run the other library")
    flags = [flag for flag in native.FLAGS if not flag.startswith("-march")]
    library = tmp_path / "older.so"
    command = [*native._compiler(), *flags, "-march=x86-64-v3", str(native.SOURCE), "-o", str(library)]
    done = native._run(command)
    assert done.returncode == 0, done.stderr
    older, ours = ctypes.CDLL(str(library)), native.load()
    if ours is None:
        pytest.skip(str(native.status()))
    older.dropout_f32.argtypes, older.gelu_bf16.argtypes = ours.dropout_f32.argtypes, ours.gelu_bf16.argtypes
    x = torch.randn(5000)
    made = [torch.empty_like(x) for _ in range(2)]
    for own, y in zip((older, ours), made, strict=True):
        own.dropout_f32(x.data_ptr(), y.data_ptr(), len(x), 0.3, 12345678912345, 1)
    assert torch.equal(*made)
    wide = torch.linspace(-9, 9, 4800).bfloat16()
    slope, out = torch.empty_like(wide), torch.empty_like(wide)
    older.gelu_bf16(wide.data_ptr(), None, out.data_ptr(), slope.data_ptr(), 10, 480, 1)
    assert torch.allclose(out.float(), torch.nn.functional.gelu(wide.float()), atol=1e-3, rtol=8e-3)
