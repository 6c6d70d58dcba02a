"""Trackers: where every round's numbers go beside `metrics.jsonl`, each an extra and none required."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from federa.errors import in_one_line
from federa.state import write_atomically
from federa.types import FederaError, Record

PROJECT = "federa"


class Tracker(Protocol):
    """Receives the record of every round."""

    def log(self, record: Record) -> None:
        """Take one line of `metrics.jsonl`."""

    def close(self) -> None:
        """Flush and let go."""


def _numbers(record: Record) -> dict[str, float]:
    """Return the numbers of a record, the round apart."""
    return {key: value for key, value in record.items() if key != "round" and isinstance(value, (int, float))}


def _name(folder: Path) -> str:
    """Return a run's name: its folder, with the one it is in, for the cells of a comparison are alike."""
    return "/".join(folder.resolve().parts[-2:])


def _id(folder: Path) -> str:
    """Return what tells a run from all others, also from one that was here before; a resumed one goes on."""
    file = folder / "tracker_id"
    if not file.exists():
        write_atomically(file, secrets.token_hex(8).encode())
    return file.read_text()


class TensorBoard:
    """Writes event files into the run directory (`tensorboard --logdir DIR`)."""

    package = "tensorboard"

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: Record) -> None:
        """Write every number of the record as a scalar of its round."""
        for key, value in _numbers(record).items():
            self._writer.add_scalar(key, value, record["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Trackio:
    """Logs to trackio, on this machine unless its own settings say otherwise (`trackio show`)."""

    package = "trackio"

    def __init__(self, folder: Path) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=f"{_name(folder)}-{_id(folder)[:6]}", resume="allow")

    def log(self, record: Record) -> None:
        """Log the numbers of the record at its round."""
        self._trackio.log(_numbers(record), step=record["round"])

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class WandB:
    """Logs to Weights & Biases; where and whether anything leaves the machine is up to its own settings."""

    package = "wandb"

    def __init__(self, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=_name(folder), id=_id(folder), dir=str(folder), resume="allow"
        )

    def log(self, record: Record) -> None:
        """Log the numbers of the record at its round."""
        self._run.log(_numbers(record), step=record["round"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """Logs to MLflow, where `MLFLOW_TRACKING_URI` says, else to its own default."""

    package = "mlflow"

    def __init__(self, folder: Path) -> None:
        import mlflow

        self._mlflow = mlflow
        experiment = mlflow.set_experiment(PROJECT)
        found = mlflow.search_runs(
            [experiment.experiment_id], f"tags.`federa.run` = '{_id(folder)}'", output_format="list"
        )
        if found:  # a resumed run goes on
            self._run = mlflow.start_run(run_id=found[0].info.run_id)
        else:
            self._run = mlflow.start_run(run_name=_name(folder), tags={"federa.run": _id(folder)})

    def log(self, record: Record) -> None:
        """Log the numbers of the record at its round."""
        self._mlflow.log_metrics(_numbers(record), step=record["round"], run_id=self._run.info.run_id)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def require_trackers(names: Iterable[str]) -> None:
    """Raise unless the packages of some trackers are installed.

    Raises:
        FederaError: one is not; it says how to install it.
    """
    for name in names:
        package = getattr(TRACKERS[name], "package", None)
        if package is not None and importlib.util.find_spec(package) is None:
            raise FederaError(f"track: {name} needs its package: pip install 'federa[{name}]'")


def start_tracker(name: str, folder: Path) -> Tracker:
    """Return a tracker that has begun to log a run.

    Raises:
        FederaError: it does not start: its server does not answer, say, or its settings are wrong.
    """
    try:
        return TRACKERS[name](folder)
    except Exception as error:  # each has its own kinds
        kind = type(error).__name__
        raise FederaError(f"track: {name} does not start ({kind}: {in_one_line(error)})") from error
