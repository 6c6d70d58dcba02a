"""Rows of a table that was read, and a share of them held out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from federa.types import FederaError, IntArray, RowError

if TYPE_CHECKING:
    from federa.data.datasets import DataConfig


class Needs(Protocol):
    """What a task asks of a table; see `Task`."""

    def inputs(self, data: DataConfig) -> list[str]: ...  # noqa: D102

    def answers(self, data: DataConfig) -> list[str]: ...  # noqa: D102

    def strata(self, table: Any, data: DataConfig) -> list[str] | None: ...  # noqa: D102

    def kinds(self, table: Any, data: DataConfig) -> Sequence[Collection[str]] | None: ...  # noqa: D102

    def units(self, table: Any, data: DataConfig) -> list[str] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a table that was read.

    Attributes:
        table: the rows.
        name: of the table that they come from: train, validation or test.
        rows: `(num_rows,)`, their numbers there.
    """

    table: Any
    name: str
    rows: IntArray

    def select(self, places: IntArray) -> Split:
        """Return some of the rows, in their order here."""
        places = np.sort(places)
        return Split(self.table.select(places), self.name, self.rows[places])

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let mistakes in these rows name the table that they were read from, and their number there.

        Raises:
            FederaError: where there is a `RowError` in the block.
        """
        try:
            yield
        except RowError as error:
            row = self.rows[error.row]
            raise FederaError(f"data: row {row} of the {self.name} table: {error.what}") from error


def hold_out(split: Split, config: DataConfig, task: Needs, fraction: float) -> tuple[Split, Split]:
    """Return the rows without a share of them, and that share.

    Rows of equal inputs stay together: no example is trained on and held out. What is seen in one place only
    of the label set (a rare label, an entity's type) is trained on.

    Raises:
        FederaError: nothing can be held out.
    """
    from sklearn.model_selection import GroupShuffleSplit  # half a second of every start

    rows = np.arange(len(split.table))
    with split.named():
        units, strata = task.units(split.table, config), task.strata(split.table, config)
        kinds = task.kinds(split.table, config)
    try:
        if units is not None:
            # By numbers: an array of texts is as wide as its longest one.
            number = {unit: i for i, unit in enumerate(sorted(set(units)))}
            unit = np.array([number[name] for name in units])
            shuffle = GroupShuffleSplit(1, test_size=fraction, random_state=config.split_seed)
            held = next(shuffle.split(rows, groups=unit))[1]
        else:
            unit = _first_like(split.table, task.inputs(config))
            drawn = _drawn(rows[unit == rows], strata, fraction, config.split_seed)
            held = rows[np.isin(unit, drawn)]
    except ValueError as error:
        raise FederaError(f"data: cannot hold out {fraction:.0%} of {len(rows)} rows ({error})") from error
    if kinds is not None:
        known = set().union(*(kinds[row] for row in np.setdiff1d(rows, held)))
        for row in held:
            if not known.issuperset(kinds[row]):
                known.update(*(kinds[like] for like in rows[unit == unit[row]]))
                held = held[unit[held] != unit[row]]
    if len(held) == 0:
        raise FederaError(
            f"data: cannot hold out {fraction:.0%} of {len(rows)} rows: no label has two different inputs"
        )
    return split.select(np.setdiff1d(rows, held)), split.select(held)


def _first_like(table: Any, columns: Sequence[str]) -> IntArray:
    """Return the first row with the inputs of each row, `(num_rows,)`."""
    first: dict[str, int] = {}
    inputs = zip(*(table[column] for column in columns), strict=True)
    return np.array([first.setdefault(repr(cells), row) for row, cells in enumerate(inputs)])


def _drawn(rows: IntArray, strata: Sequence[str] | None, fraction: float, seed: int) -> IntArray:
    """Return a share of the rows: of each stratum alike, where there are enough rows of each."""
    from sklearn.model_selection import train_test_split

    if strata is not None:
        strata = [strata[row] for row in rows]
        times = Counter(strata)
        repeated = [times[value] > 1 for value in strata]
        rows, strata = rows[repeated], [*compress(strata, repeated)]
        if len(rows) == 0:
            return rows
        if min(fraction, 1 - fraction) * len(rows) < len(set(strata)):
            strata = None
    held: IntArray = train_test_split(rows, test_size=fraction, random_state=seed, stratify=strata)[1]
    return held
