"""The page: what the runs say, set in a template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from federa.report.curves import all_curves
from federa.report.load import RunRecord, flatten, load_run
from federa.report.naming import differing, headline, labels
from federa.report.parts import legend_entry, partitions
from federa.report.svg import inline_svg
from federa.report.tables import Table, comparison, rejections, repeats, rounds_table, tiles, warnings
from federa.report.template import render
from federa.report.words import plural
from federa.state import write_atomically
from federa.types import FederaError


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Write one self-contained page about a run, or about several side by side.

    It needs no network and no other file, and the same run directories give the same bytes.

    Args:
        folders: run directories; what is missing in them is left out of the page.
        to: the page's path.

    Returns:
        The page's path.

    Raises:
        FederaError: no folder, or one that is not a run directory.
    """
    if not folders:
        raise FederaError("no run to report; give at least one run directory")
    runs = [load_run(Path(folder)) for folder in folders]
    write_atomically(to, render("page.html.j2", ["page.css"], _context(runs)))
    return to


def _context(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the template fills in."""
    title, sentence = headline(runs)
    names = labels(runs)
    several = len(runs) > 1
    unlike = differing(runs) if several else {}
    curves = [
        (curve.title, inline_svg(curve.figure, f"c{i}", f"{curve.title}: {', '.join(names)}"))
        for i, curve in enumerate(all_curves(runs))
    ]
    return {
        "title": title,
        "sentence": sentence,
        "several": several,
        "legend": [legend_entry(slot, name) for slot, name in enumerate(names)],
        "tiles": [] if several else tiles(runs[0]),
        "warnings": [
            *repeats(runs),
            *(
                f"{name}: {note}" if several else note
                for run, name in zip(runs, names, strict=True)
                for note in warnings(run)
            ),
        ],
        "comparison": comparison(runs, names) if several else None,
        "unlike": Table(["key", *names], [[key, *row] for key, row in unlike.items()], wordy=True),
        "curves": curves,
        "partitions": partitions(runs, names),
        "runs": [_details(run, name) for run, name in zip(runs, names, strict=True)],
    }


def _details(run: RunRecord, name: str) -> dict[str, Any]:
    """Return what one run has to itself: rounds, rejections, recipe, environment."""
    rejected = rejections(run)
    total = run.total("rejected") or 0
    return {
        "name": name,
        "folder": run.folder.name,
        "rounds": rounds_table(run),
        "rejections": rejected,
        "rejected": plural(int(total), "update") + " did not count",
        "any_rejected": total > 0 or rejected is not None,
        "recipe": run.recipe,
        "environment": Table(
            ["what", "value"], [[key, str(value)] for key, value in flatten(run.environment)], wordy=True
        ),
        "finished": plural(len(run.rounds), "round"),
    }
