"""`federa split`: one data set as the tables of many clients, to try a federation on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml

from federa.config import RunConfig
from federa.data.datasets import read_splits
from federa.experiment import build_experiment, resolve
from federa.state import write_atomically
from federa.types import FederaError


def split(config: RunConfig, to: Path) -> list[int]:
    """Write `client-0.parquet` and so on, `test.parquet`, and `recipe.yaml` that goes with them.

    Each client has the rows that the simulator would give it, in the same order, so that a federation of
    these tables gives the metrics of the recipe's own run.

    Args:
        config: the recipe.
        to: the folder to write.

    Returns:
        The number of examples of each client.

    Raises:
        FederaError: the folder is there already, or a mistake in the recipe.
    """
    if to.exists() and any(to.iterdir()):
        raise FederaError(f"--to: {to} is there already and is not an empty directory; give another")
    config = resolve(config)
    experiment = build_experiment(config)
    splits = read_splits(config.data, config.task)
    to.mkdir(parents=True, exist_ok=True)
    for client, rows in enumerate(experiment.parts):
        examples = rows if experiment.train.example is None else np.unique(experiment.train.example[rows])
        _write(splits.train.select(examples), to / f"client-{client}.parquet")
    _write(splits.evaluation, to / "test.parquet")
    raw = config.model_dump(mode="json")
    raw["data"] |= {"train": "client-N.parquet", "test": "test.parquet", "validation": None}
    raw["data"] |= {
        "evaluate_on": "test",
        "max_train": None,
        "max_test": None,
        "subset": None,
        "revision": None,
    }
    raw["client"]["lr"] = config.client.lr
    # No file has that name: a node whose owner forgets it must not train on another client's data.
    head = "# The recipe of server and nodes alike; each node says its own: data.train=client-0.parquet.\n"
    write_atomically(to / "recipe.yaml", (head + yaml.safe_dump(raw, sort_keys=False)).encode())
    return [int(size) for size in experiment.counts.sum(axis=1)]


def _write(table: Any, path: Path) -> None:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # dozens of small files are no long work
    table.to_parquet(str(path))
    if shown:
        datasets.enable_progress_bars()
