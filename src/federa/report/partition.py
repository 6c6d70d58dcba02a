"""The picture of a partition: who holds how much of what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from federa.report.load import Floats
from federa.report.palette import LIGHT
from federa.report.svg import drawing
from federa.report.words import clip

_DOTS_TO = 30
"""With more clients or groups than this, a heat map takes the place of dots."""
_NAMES_TO = 24
_SHADES = 16


def partition_figure(
    counts: npt.ArrayLike, groups: Sequence[str] = (), sizes: npt.ArrayLike | None = None
) -> Figure:
    """Return a picture of a partition: bars of the clients' sizes above dots or a heat map of their groups.

    Clients are sorted by the group they hold most of, so skew shows as a diagonal. It stays readable
    from a handful of clients (dots whose area is the number of examples) to thousands (shades of the
    share of a client's examples).

    Args:
        counts: examples by client (rows) and group (columns).
        groups: the groups' names; numbers where there are none.
        sizes: examples by client; without them, the sums of `counts`.
    """
    table = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    amount = table.sum(axis=1) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if not table.size or len(table) != len(amount):
        table = np.zeros((len(amount), 0))
    order = _order(table, amount)
    table, amount = table[order], amount[order]
    names = [clip(groups[i] if i < len(groups) else i) for i in range(table.shape[1])]
    with drawing():
        if not names:
            figure = Figure(figsize=(9.4, 2.4), layout="constrained")
            top = bottom = figure.add_subplot()
            note = "sorted by size"
        else:
            lower = len(names) * _row_height(len(names))
            figure = Figure(figsize=(9.4, lower + 1.5), layout="constrained")
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[0.8, lower])
            dots = max(table.shape) <= _DOTS_TO
            (_dots if dots else _heat)(figure, bottom, table)
            note = "sorted by largest group" + (" (area of a dot: number of examples)" if dots else "")
            _name_groups(bottom, names)
        _bars(top, amount)
        _name_clients(bottom, order, note)
    return figure


def _row_height(groups: int) -> float:
    """Return the inches that a group's row takes: little where there are many."""
    return float(np.clip(4.0 / groups, 0.012, 0.28)) if groups > 20 else 0.28 - 0.004 * groups


def _order(table: Floats, amount: Floats) -> npt.NDArray[np.intp]:
    """Return the clients by dominant group, purest first; by size where there are no groups."""
    if not table.size:
        return np.argsort(-amount, kind="stable")
    shares = _shares(table)
    dominant = np.where(table.sum(axis=1) > 0, table.argmax(axis=1), table.shape[1])
    return np.lexsort((-shares.max(axis=1), dominant))


def _shares(table: Floats) -> Floats:
    shares: Floats = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    return shares


def _bars(axes: Axes, amount: Floats) -> None:
    """Draw the clients' sizes, as one path however many there are."""
    gap = 0.16 if len(amount) <= 60 else 0.0
    if gap:
        axes.bar(np.arange(len(amount)), amount, width=1 - gap, color=LIGHT["bar"], linewidth=0)
    else:
        axes.stairs(amount, np.arange(len(amount) + 1) - 0.5, fill=True, color=LIGHT["bar"], linewidth=0)
    axes.set_ylabel("examples")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.tick_params(axis="x", length=0)


def _dots(figure: Figure, axes: Axes, table: Floats) -> None:
    """Draw one dot per client and group; its area is the number of examples."""
    clients, groups = np.nonzero(table)
    values = table[clients, groups]
    cell = 72 * min(8.0 / max(len(table), 1), _row_height(table.shape[1]))
    most = float(values.max()) if values.size else 1.0
    area = np.pi / 4 * (cell * 1.1) ** 2 * values / most
    axes.scatter(clients, groups, s=area, color=LIGHT["heat"], alpha=0.9, linewidths=0)
    axes.grid(visible=True, axis="both")
    axes.set_ylim(table.shape[1] - 0.4, -0.6)


def _heat(figure: Figure, axes: Axes, table: Floats) -> None:
    """Shade each client's column by its shares; shades are opacities, so they suit a dark page too."""
    shade = np.linspace(0, 1, _SHADES)
    colours = np.column_stack([np.tile(to_rgb(LIGHT["heat"]), (_SHADES, 1)), shade])
    scale = ScalarMappable(Normalize(0, 1), ListedColormap(colours.tolist()))
    image = np.empty((table.shape[1], table.shape[0], 4))
    image[..., :3] = to_rgb(LIGHT["heat"])
    image[..., 3] = _shares(table).T
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    bar = figure.colorbar(scale, ax=figure.axes, fraction=0.025, pad=0.01, aspect=30)
    bar.set_label("share of the client's examples")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    bar.outline.set_visible(False)


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Name every group, or every few where they would overlap."""
    step = -(-len(names) // _NAMES_TO)
    axes.set_yticks(range(0, len(names), step), labels=names[::step])


def _name_clients(axes: Axes, order: npt.NDArray[np.intp], note: str) -> None:
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.set_xlabel(f"clients, {note}")
    if len(order) <= _DOTS_TO:
        axes.set_xticks(range(len(order)), labels=[str(client) for client in order])
    else:
        axes.set_xticks([])
