"""The key figures of a run: from its result, or else from the rounds so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from federa.report.load import RunRecord, number


@dataclass(frozen=True)
class Summary:
    """Key figures; None where nothing says.

    Attributes:
        final: the primary metric at the end: the mean of its last values, see `mean_of`.
        mean_of: so many last evaluations are in `final`.
        best: its best value.
        best_round: the round of the best value.
        worst: the metric of the worst client.
        rounds: finished rounds.
        trained: parameters that train.
        sent: bytes in both directions.
        seconds: wall time.
        target: `value`, `round`, `seconds`, `bytes` of the target, empty where it was not reached.
    """

    final: float | None
    mean_of: int
    best: float | None
    best_round: float | None
    worst: float | None
    rounds: float
    trained: float | None
    sent: float | None
    seconds: float | None
    target: Mapping[str, Any]


def summarize(run: RunRecord) -> Summary:
    """Return a run's key figures."""
    measured = run.column(run.metric)
    at = np.flatnonzero(np.isfinite(measured))
    final, best = number(run.result.get("final")), number(run.result.get("best"))
    best_round = number(run.result.get("best_round"))
    stated = run.setting("final_mean_of")
    mean_of = stated if final is not None and isinstance(stated, int) else 1
    mean_of = max(1, min(mean_of, at.size))  # a target may end a run before there are so many
    if final is None and at.size:
        final = float(measured[at[-1]])
    if best is None and at.size:
        top = int(np.nanargmax(measured))
        best, best_round = float(measured[top]), float(run.rounds[top]["round"])
    sent = [total for total in (run.total("bytes_up"), run.total("bytes_down")) if total is not None]
    seconds, rounds = number(run.result.get("seconds_total")), number(run.result.get("rounds"))
    target = run.result.get("target")
    return Summary(
        final=final,
        mean_of=mean_of,
        best=best,
        best_round=best_round,
        worst=number(per_client(run).get("worst")),
        rounds=len(run.rounds) if rounds is None else rounds,
        trained=number(run.result.get("trainable_parameters")),
        sent=sum(sent) if sent else None,
        seconds=run.total("seconds_round") if seconds is None else seconds,
        target=target if isinstance(target, Mapping) and number(target.get("round")) is not None else {},
    )


def per_client(run: RunRecord) -> Mapping[str, Any]:
    """Return the metric over clients: `mean`, `p10`, `worst`; empty where it was not measured."""
    found = run.result.get("per_client")
    return found if isinstance(found, Mapping) else {}
