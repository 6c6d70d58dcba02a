"""Shared fixtures: small encoders of every family with true architectures, and small tables of real words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from federa.cpu import native
from small import build_encoder, sentences, small_recipe, write_csv

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: what is left at the end is short, and no worker waits for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep starts and data sets of the tests out of the user's caches."""
    os.environ["FEDERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    native.load()  # compiled now, and not in a test that makes writing fail


@pytest.fixture(autouse=True)
def _threads() -> object:
    """Give every test the same number of threads: sums depend on it."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 sentences of three classes."""
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", sentences(240))


@pytest.fixture(scope="session")
def test_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 other sentences."""
    return write_csv(tmp_path_factory.mktemp("data") / "test.csv", sentences(90, seed=1))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to the folder of its small checkpoint."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = build_encoder(family, tmp_path_factory.mktemp("model") / family)
        return made[family]

    return get


@pytest.fixture()
def recipe(encoder: Callable[[str], Path], train_csv: Path, test_csv: Path) -> dict[str, object]:
    """A recipe that runs in a second; each test gets its own copy."""
    return small_recipe(encoder("bert"), train_csv, test_csv)
