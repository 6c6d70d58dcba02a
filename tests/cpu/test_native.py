"""Building the kernels: kept between uses, whole or absent, and training goes on without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from federa.cpu import native


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module decide anew, and forget the decision after the test."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        first = native.build(tmp_path)
    except native.CannotBuildError as error:
        pytest.skip(str(error))
    changed = first.stat().st_mtime_ns
    assert native.build(tmp_path) == first
    assert first.stat().st_mtime_ns == changed
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native.build(tmp_path) != first


def test_a_compiler_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\nfor last; do :; done\necho half > $last\necho 'no such flag' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.CannotBuildError, match="no such flag"):
        native.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


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
