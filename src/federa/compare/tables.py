"""The tables of a comparison: CSV of all runs, and per setting and over all settings what they say."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from federa.compare.execute import Summary
from federa.compare.grid import Cell, data_name, skew_name
from federa.progress import readable_bytes, readable_seconds
from federa.report.grid import Pair, Reached
from federa.state import write_atomically

COLUMNS = ("method", "data", "model", "skew", "seed", "lr", "metric", "rounds", "bytes", "seconds")
MORE_COLUMNS = (
    "metric_name",
    "best",
    "trainable_parameters",
    "total_parameters",
    "bytes_round",
    "status",
    "setting",
    "folder",
)
Row = dict[str, Any]
Lines = list[list[str]]
ALL = "all settings"


def row_of(cell: Cell, summary: Summary | None) -> Row:
    """Return one line of `cells.csv`."""
    config = cell.config
    row: Row = {
        "method": cell.method,
        "data": data_name(config.data.train),
        "model": config.model.name,
        "skew": skew_name(config),
        "seed": config.seed,
        "lr": config.client.lr,
        "metric_name": config.task.primary,
        "status": "failed" if summary is None else "done",
        "setting": cell.setting,
        "folder": str(cell.folder),
    }
    if summary is not None:
        sent = summary["bytes_up"] + summary["bytes_down"]
        row |= {
            "metric": summary["final"],
            "best": summary["best"],
            "rounds": summary["rounds"],
            "bytes": sent,
            "bytes_round": sent / summary["rounds"],
            "seconds": summary["seconds_rounds"],
            "trainable_parameters": summary["trainable_parameters"],
            "total_parameters": summary["total_parameters"],
        }
    return row


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all runs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *MORE_COLUMNS])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def setting_lines(rows: Sequence[Row], methods: Sequence[str], pairs: Mapping[str, Pair]) -> Lines:
    """Return a header and one line a method, of one setting: score, difference, size and cost."""
    first = methods[0]
    head = ["method", "lr", rows[0]["metric_name"], "seeds", f"{first} minus it", "95 % interval", "wins"]
    lines = [[*head, "trained", "sent a round", "time"]]
    for method in methods:
        cells = [row for row in rows if row["method"] == method and row["status"] == "done"]
        if not cells:
            lines.append([method, "", "failed", "0", *[""] * 6])
            continue
        share = cells[0]["trainable_parameters"] / cells[0]["total_parameters"]
        lines.append(
            [
                method,
                f"{cells[0]['lr']:g}",
                mean_spread([cell["metric"] for cell in cells]),
                str(len(cells)),
                *_pair_words(pairs.get(method)),
                f"{cells[0]['trainable_parameters']:,} ({share:.2%})",
                readable_bytes(cells[0]["bytes_round"]),
                readable_seconds(float(np.mean([cell["seconds"] for cell in cells]))),
            ]
        )
    return lines


def overall_lines(rows: Sequence[Row], methods: Sequence[str], pairs: Mapping[str, Pair]) -> Lines:
    """Return a header and a line a setting, a column a method; then their mean, and paired differences."""
    scores: dict[tuple[str, str], list[float]] = {}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    for row in rows:
        if row["status"] == "done":
            scores.setdefault((row["setting"], row["method"]), []).append(row["metric"])
    lines = [["setting", *methods]]
    for setting in settings:
        cells = [scores.get((setting, method), []) for method in methods]
        lines.append([setting, *(_cell_words(cell, seeds) for cell in cells)])
    means = []
    for method in methods:
        own = [scores.get((setting, method), []) for setting in settings]
        # A mean over fewer runs would stand beside means over all of them.
        whole = all(len(one) == seeds for one in own)
        means.append(mean_spread([float(np.mean([np.mean(one) for one in own]))]) if whole else "")
    lines.append(["mean", *means])
    told = [_pair_words(pairs.get(method)) for method in methods]
    titles = [f"{methods[0]} minus it", "95 % interval", "wins"]
    lines += [[title, *words] for title, words in zip(titles, zip(*told, strict=True), strict=True)]
    return lines


def reached_lines(reached: Sequence[Reached]) -> Lines:
    """Return what it took to reach shares of the reference's best score."""
    lines = [["setting", "target", "method", "rounds", "sent", "time", "seeds"]]
    for one in reached:
        cost = (
            [f"{one.rounds:.1f}", readable_bytes(one.bytes), readable_seconds(one.seconds)]
            if one.rounds is not None and one.bytes is not None and one.seconds is not None
            else ["not reached", "", ""]
        )
        lines.append([one.setting, one.target, one.method, *cost, f"{one.seeds} of {one.of}"])
    return lines


def _pair_words(pair: Pair | None) -> list[str]:
    if pair is None:
        return ["", "", ""]
    mean = f"{100 * pair.mean:+.1f}"
    if pair.pairs == 1:
        return [mean, "", f"{pair.wins:g} of 1"]
    interval = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    return [f"{mean} ± {100 * pair.spread:.1f}", interval, f"{pair.wins:g} of {pair.pairs}"]


def _cell_words(scores: Sequence[float], seeds: int) -> str:
    if not scores:
        return "failed"
    return mean_spread(scores) + (f" ({len(scores)} of {seeds})" if len(scores) < seeds else "")


def mean_spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation in points, for example `56.1 ± 0.9`."""
    mean = f"{100 * float(np.mean(values)):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


def markdown(lines: Lines) -> str:
    """Return a table for Markdown."""
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    ruled = [escaped[0], ["---"] * len(lines[0]), *escaped[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def latex(lines: Lines) -> str:
    """Return a table for LaTeX with booktabs."""
    signs = {sign: "\\" + sign for sign in "&%_#${}"}
    signs |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    escaped = str.maketrans(signs)

    def cells(line: list[str]) -> Iterator[str]:
        for text in line:
            yield text.translate(escaped)

    body = [" & ".join(cells(line)) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    middle = "\n".join(body[1:])
    ruled = ["\\toprule", body[0], "\\midrule", middle, "\\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *ruled, "\\end{tabular}", ""])
