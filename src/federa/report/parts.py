"""Pieces that the page of runs and the page of a grid have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from federa.report.load import RunRecord
from federa.report.palette import DASHES, GLYPHS, SERIES
from federa.report.partition import partition_figure
from federa.report.svg import inline_svg
from federa.report.tables import sizes_table
from federa.report.words import plural

_DASH_WORDS = {"-": "", "--": " - -", ":": " ···", "-.": " -·-"}


def legend_entry(slot: int, name: str) -> tuple[str, str, str]:
    """Return a series' colour, marker with its dash, and name."""
    dash = _DASH_WORDS[DASHES[slot // SERIES % len(DASHES)]]
    return f"var(--s{slot % SERIES})", GLYPHS[slot % SERIES] + dash, name


def marked(slot: int, name: str) -> Markup:
    """Return a name behind its coloured marker, as the first cell of a row."""
    colour, glyph, _ = legend_entry(slot, name)
    return Markup('<span class="key" style="color: {}" aria-hidden="true">{}</span> {}').format(
        colour, glyph, name
    )


def holdings(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Return who holds what, in a form that can be compared."""
    keys = ("client_sizes", "groups", "counts")
    return tuple(dict.fromkeys(json.dumps([run.partition.get(key) for key in keys]) for run in runs))


def partitions(runs: Sequence[RunRecord], names: Sequence[str], key: str = "p") -> list[dict[str, Any]]:
    """Return each different partition once, with the runs that share it.

    Args:
        runs: those without a partition are passed over.
        names: of the runs.
        key: prefix of the ids inside the pictures, unique on the page.
    """
    shared: dict[tuple[str, ...], tuple[RunRecord, list[str]]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.sizes.size:
            shared.setdefault(holdings([run]), (run, []))[1].append(name)
    return [
        {
            "names": [] if len(shared) == 1 else who,
            "table": sizes_table(run),
            "svg": inline_svg(
                partition_figure(run.counts, run.groups, run.sizes),
                f"{key}{i}",
                f"Partition of the examples over {plural(len(run.sizes), 'client')}",
            ),
        }
        for i, (run, who) in enumerate(shared.values())
    ]
