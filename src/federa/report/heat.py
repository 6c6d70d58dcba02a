"""The heat map of a grid: how far each method is behind the best one, setting by setting.

It is a table whose cells are shaded, not a picture: its text can be selected, wraps on a phone and follows
the page's colours. One hue, more of it the further behind, reads alike to people who see colours differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from federa.report.cells import Grid, method_name
from federa.report.parts import marked
from federa.report.words import NONE, points

_STRONGEST = 0.55
"""The opacity of the furthest behind; text on it keeps a contrast of 4.5 in the light and in the dark."""


@dataclass(frozen=True)
class HeatCell:
    """One cell.

    Attributes:
        value: the score in points.
        behind: the difference to the best of its row, in words.
        shade: opacity of the cell's ground.
        best: of its row.
    """

    value: str
    behind: str
    shade: str
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells, one column a method.

    Attributes:
        head: the names of the columns.
        rows: the name of each row with its cells.
        most: the difference that the strongest shade stands for.
        strongest: its opacity.
    """

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]
    most: str
    strongest: str = f"{_STRONGEST:.3f}"


def heat_map(grid: Grid) -> HeatMap | None:
    """Return the heat map, None for a single method."""
    if len(grid.methods) < 2:
        return None
    table = {grid.name(s): [grid.whole(s, method) for method in grid.methods] for s in grid.settings}
    if len(grid.settings) > 1:
        table["mean over settings"] = [grid.overall(method) for method in grid.methods]
    gaps = {name: _behind(row) for name, row in table.items()}
    most = max((gap for row in gaps.values() for gap in row if gap is not None), default=0.0)
    rows = [
        (name, [_cell(value, gap, most) for value, gap in zip(row, gaps[name], strict=True)])
        for name, row in table.items()
    ]
    head = [marked(slot, method_name(method)) for slot, method in enumerate(grid.methods)]
    return HeatMap(head, rows, points(most))


def _behind(row: Sequence[float | None]) -> list[float | None]:
    best = max((value for value in row if value is not None), default=0.0)
    return [None if value is None else best - value for value in row]


def _cell(value: float | None, gap: float | None, most: float) -> HeatCell:
    if value is None or gap is None:
        return HeatCell(NONE, "none", "0.000", best=False)
    shade = _STRONGEST * gap / most if most else 0.0
    return HeatCell(points(value), f"−{points(gap)}" if gap else "best", f"{shade:.3f}", best=not gap)
