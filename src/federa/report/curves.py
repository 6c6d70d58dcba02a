"""Curves of one or several runs on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from federa.report.load import Floats, RunRecord, number
from federa.report.palette import DASHES, LIGHT, MARKERS, SERIES, series_colour
from federa.report.svg import drawing
from federa.report.words import byte_unit, capital, metric_words, time_unit

_MARKERS_A_LINE = 12
_LOG_FROM = 20.0
"""Runs whose costs differ by more than this factor share a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """One series of a figure.

    Attributes:
        slot: its place in the list of series, which gives its colour, marker and dash.
        x: finite.
        y: finite.
        low: the lower edge of a band around it, if it has one.
        high: the upper edge.
    """

    slot: int
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Curve:
    """A figure with what the page says about it."""

    title: str
    figure: Figure


def all_curves(runs: Sequence[RunRecord]) -> list[Curve]:
    """Return the metric and the loss over rounds, and the metric against bytes and seconds."""
    name = " / ".join(dict.fromkeys(metric_words(run.metric) for run in runs))
    targets = {number(run.setting("target")) for run in runs}
    level = targets.pop() if len(targets) == 1 else None
    metrics = [run.column(run.metric) for run in runs]
    rounds = [run.column("round") for run in runs]
    losses = [run.column("loss") for run in runs]
    sent, spent = [bytes_sent(run) for run in runs], [seconds_spent(run) for run in runs]
    size, byte_name = byte_unit(_most(sent))
    second, time_name = time_unit(_most(spent))
    by_size, by_time = [bytes_ / size for bytes_ in sent], [seconds / second for seconds in spent]
    return [
        Curve(
            f"{capital(name)} over rounds",
            curve_figure(_lines(rounds, metrics), "round", name, level, whole=True),
        ),
        Curve(
            "Training loss over rounds",
            curve_figure(_lines(rounds, losses), "round", "mean loss of clients", whole=True),
        ),
        Curve(
            f"{capital(name)} against bytes sent",
            curve_figure(_lines(by_size, metrics), f"sent, up and down ({byte_name})", name, level),
        ),
        Curve(
            f"{capital(name)} against time",
            curve_figure(_lines(by_time, metrics), f"time in rounds ({time_name})", name, level),
        ),
    ]


def bytes_sent(run: RunRecord) -> Floats:
    """Return the bytes sent up and down by the end of each round."""
    sent: Floats = np.nancumsum(run.column("bytes_up")) + np.nancumsum(run.column("bytes_down"))
    return sent


def seconds_spent(run: RunRecord) -> Floats:
    """Return the seconds in rounds by the end of each round."""
    spent: Floats = np.nancumsum(run.column("seconds_round"))
    return spent


def curve_figure(
    lines: Sequence[Line], x_label: str, y_label: str, level: float | None = None, *, whole: bool = False
) -> Figure:
    """Return lines on one pair of axes.

    Args:
        lines: empty ones leave no trace.
        x_label: with its unit.
        y_label: with its unit.
        level: the target, drawn across.
        whole: x counts rounds.
    """
    with drawing():
        figure = Figure(figsize=(4.5, 2.75), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if level is not None:
            axes.axhline(level, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                "target",
                (0, level),
                (2, 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
            )
        _scale(axes, lines, whole)
    return figure


def _lines(xs: Sequence[Floats], ys: Sequence[Floats]) -> list[Line]:
    """Return one line a run, of the points that were measured."""
    lines = []
    for slot, (x, y) in enumerate(zip(xs, ys, strict=True)):
        measured = np.isfinite(x) & np.isfinite(y)
        lines.append(Line(slot, x[measured], y[measured]))
    return lines


def _draw(axes: Axes, line: Line) -> None:
    if line.low is not None and line.high is not None:
        axes.fill_between(
            line.x, line.low, line.high, color=series_colour(line.slot), alpha=0.15, linewidth=0
        )
    axes.plot(
        line.x,
        line.y,
        color=series_colour(line.slot),
        marker=MARKERS[line.slot % SERIES],
        linestyle=DASHES[line.slot // SERIES % len(DASHES)],
        markevery=max(1, len(line.x) // _MARKERS_A_LINE),
    )


def _scale(axes: Axes, lines: Sequence[Line], whole: bool) -> None:
    """Choose the ticks: whole rounds, or a logarithm where the runs' costs lie far apart."""
    ends = [float(line.x[-1]) for line in lines if line.x.size]
    if not ends:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", va="center")
    elif whole:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    elif min(ends) > 0 and max(ends) / min(ends) > _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _most(values: Sequence[Floats]) -> float:
    return max((float(value[-1]) for value in values if value.size), default=0.0)
