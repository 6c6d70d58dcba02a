"""Lines over seeds: the mean, with a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from federa.report.curves import Curve, Line, bytes_sent, curve_figure, seconds_spent
from federa.report.load import Floats, RunRecord
from federa.report.words import byte_unit, capital, clip, metric_words, time_unit

Points = Mapping[float, float]
"""A run's values by round (or layer)."""


def band(slot: int, ys: Sequence[Points], xs: Sequence[Points] | None = None) -> Line:
    """Return the mean of several runs where all of them measured, with a band from lowest to highest.

    Args:
        slot: the line's colour and marker.
        ys: one mapping a run.
        xs: where the points stand, mean over runs; without it, at their keys.
    """
    common = sorted(set.intersection(*(set(run) for run in ys)))
    y = np.array([[run[key] for key in common] for run in ys], dtype=np.float64)
    x = np.array(common if xs is None else [np.mean([run[key] for run in xs]) for key in common])
    low, high = (y.min(axis=0), y.max(axis=0)) if len(ys) > 1 else (None, None)
    return Line(slot, x.astype(np.float64), y.mean(axis=0), low, high)


def by_round(run: RunRecord, values: Floats) -> Points:
    """Return what a run measured, by round."""
    rounds = run.column("round")
    return {
        float(at): float(value)
        for at, value in zip(rounds, values, strict=True)
        if np.isfinite(at) and np.isfinite(value)
    }


def setting_curves(methods: Mapping[int, Sequence[RunRecord]]) -> list[Curve]:
    """Return the metric in points over rounds, bytes and seconds, and the loss over rounds.

    Args:
        methods: the runs of one setting by the method's slot; at least one run each.
    """
    every = [run for runs in methods.values() for run in runs]
    name = metric_words(every[0].metric)
    label = clip(f"{name} (points)", 40)
    size, byte_name = byte_unit(max((float(bytes_sent(run)[-1]) for run in every if run.rounds), default=0))
    second, time_name = time_unit(
        max((float(seconds_spent(run)[-1]) for run in every if run.rounds), default=0)
    )
    over_rounds, over_bytes, over_time, losses = [], [], [], []
    for slot, runs in methods.items():
        ys = [by_round(run, 100 * run.column(run.metric)) for run in runs]
        over_rounds.append(band(slot, ys))
        over_bytes.append(band(slot, ys, [by_round(run, bytes_sent(run) / size) for run in runs]))
        over_time.append(band(slot, ys, [by_round(run, seconds_spent(run) / second) for run in runs]))
        losses.append(band(slot, [by_round(run, run.column("loss")) for run in runs]))
    return [
        Curve(f"{capital(name)} over rounds", curve_figure(over_rounds, "round", label, whole=True)),
        Curve(
            f"{capital(name)} against bytes sent",
            curve_figure(over_bytes, f"sent, up and down ({byte_name})", label),
        ),
        Curve(
            f"{capital(name)} against time",
            curve_figure(over_time, f"time in rounds ({time_name})", label),
        ),
        Curve(
            "Training loss over rounds",
            curve_figure(losses, "round", "mean loss of clients", whole=True),
        ),
    ]
