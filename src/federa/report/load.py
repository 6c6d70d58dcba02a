"""Reading a run directory, whatever of it is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from federa.types import FederaError, Record

Floats = npt.NDArray[np.float64]

KNOWN_METRICS = ("accuracy", "f1", "exact_match")
BOOKKEEPING = frozenset(("round", "loss", "clients", "rejected", "bytes_up", "bytes_down", "examples"))


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says; what is missing is empty.

    Attributes:
        folder: the run directory.
        recipe: `config.yaml` as it is written.
        config: the same, parsed.
        environment: versions, hardware, commit.
        rounds: one record a round, in order.
        partition: what `partition.json` says.
        result: the summary of a finished run.
    """

    folder: Path
    recipe: str
    config: Record
    environment: Record
    rounds: list[Record]
    partition: Record
    result: Record

    @property
    def metric(self) -> str:
        """The name of the primary metric, `score` where nothing names it."""
        named = self.result.get("metric")
        if isinstance(named, str) and named:
            return named
        seen = {key for record in self.rounds for key, value in record.items() if is_number(value)}
        others = sorted(key for key in seen - BOOKKEEPING if not key.startswith("seconds"))
        return next((name for name in (*KNOWN_METRICS, *others) if name in seen), "score")

    @property
    def sizes(self) -> Floats:
        """The number of examples of each client, empty where it is not known."""
        sizes = matrix(self.partition.get("client_sizes"), 1)
        return sizes if sizes.size else self.counts.sum(axis=1)

    @property
    def counts(self) -> Floats:
        """The examples by client (row) and group (column), of no rows where they are not known."""
        return matrix(self.partition.get("counts"), 2)

    @property
    def groups(self) -> list[str]:
        """The names of the groups."""
        groups = self.partition.get("groups")
        return [str(group) for group in groups] if isinstance(groups, list) else []

    def setting(self, key: str) -> Any:
        """Return a recipe's value by its dotted key, None where it is not set."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def column(self, key: str) -> Floats:
        """Return one value a round, NaN where there is none or it is not finite."""
        values = (number(record.get(key)) for record in self.rounds)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def total(self, key: str) -> float | None:
        """Return the result's total, or else the sum over the rounds so far."""
        stated = number(self.result.get(key))
        if stated is not None:
            return stated
        values = self.column(key)
        return float(np.nansum(values)) if np.isfinite(values).any() else None


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a number, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float | None:
    """Return a JSON value as a finite float, None where it is anything else."""
    return float(value) if is_number(value) and math.isfinite(value) else None


def matrix(values: Any, dimensions: int) -> Floats:
    """Return nested lists of numbers as an array; an empty one where they are anything else."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != dimensions or not np.isfinite(array).all():
        return np.empty((0,) * dimensions)
    return array


def load_run(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        FederaError: not a run directory, or its recipe cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FederaError(
            f"{folder} is not a run directory (no config.yaml); give what `federa run --out` wrote"
        )
    recipe = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise FederaError(f"{path} is not YAML ({line}); restore it or run again") from error
    return RunRecord(
        folder=folder,
        recipe=recipe,
        config=config if isinstance(config, dict) else {},
        environment=_read_object(folder / "environment.json"),
        rounds=read_records(folder / "metrics.jsonl"),
        partition=_read_object(folder / "partition.json"),
        result=_read_object(folder / "result.json"),
    )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their dotted keys."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))


def _parse(text: str) -> Record:
    """Return a JSON object; empty for text that is cut short, as a killed run leaves it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_object(path: Path) -> Record:
    return _parse(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_records(path: Path) -> list[Record]:
    """Return a file's records by round; of a round that a resume ran again, the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [record for record in map(_parse, lines) if is_number(record.get("round"))]
    by_round = {record["round"]: record for record in records}
    return [by_round[key] for key in sorted(by_round)]
