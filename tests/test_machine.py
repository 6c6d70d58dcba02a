"""What a process finds on its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from federa import machine


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("max 100000", 8),
    ],
)
def test_a_containers_share_of_the_cores_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CPU_MAX", tmp_path / "cpu.max")
    assert machine.available_cores() == 8
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.available_cores() == cores


def test_the_cache_folder_is_absolute_and_an_empty_setting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDERA_CACHE", ".")
    assert machine.cache_folder() == tmp_path
    monkeypatch.setenv("FEDERA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert machine.cache_folder() == tmp_path / "caches" / "federa"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path / ".cache" / "federa"


def test_a_user_without_a_home_has_a_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDERA_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path / "federa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert machine.cache_folder().name == f"federa-{os.getuid()}"
