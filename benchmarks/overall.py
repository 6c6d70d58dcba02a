"""What comparisons of several data sets say together: a table of methods by setting, and paired differences.

python benchmarks/overall.py docs/results/*.csv docs/results/{skews,head}/*.csv --settings dirichlet-

The files are those of rounds_csv.py. A run's score is the mean of its last `mean_of` evaluations, of what the
methods are judged by; differences are paired by setting and seed, and their interval is a bootstrap over
settings and over seeds within them (federa.statistics.paired).

A run that several files have counts as their mean. Where a method ran in a setting at several rates, its runs
are those of the rate with the best mean (of those with the most seeds). That is a choice by the test scores,
which flatters most who was tried at most: `--rates` shows what there was to choose from.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev

from federa.statistics import Paired, paired

METHODS = {"federa": "FeDeRA", "lora": "LoRA", "adapter": "adapter", "bitfit": "BitFit", "ft": "FT"}
PRIMARY = ("semeval_f1", "f1", "accuracy")  # the first that a setting has
Scores = dict[str, dict[tuple[str, int], float]]  # by method, then by setting and seed
Rate = tuple[float, float]  # of what is adapted, and of the head
Tried = dict[tuple[str, str], dict[Rate, dict[int, list[float]]]]  # by method and setting, rate, seed


def read(files: Sequence[Path], head_rates: bool) -> Tried:
    """Return the final scores of runs, one a file, in percent; perhaps of heads with another rate, too."""
    tried: Tried = {}
    for file in files:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        scored = {(row["setting"], name) for row in rows for name in PRIMARY if row.get(name)}
        runs: dict[tuple[str, str, Rate, int], list[tuple[float, int]]] = {}
        for row in rows:
            metric = next(name for name in PRIMARY if (row["setting"], name) in scored)
            rate = float(row["lr"]), float(row.get("head_lr") or row["lr"])
            if row[metric] and (head_rates or rate[0] == rate[1]):
                run = (row["method"], row["setting"], rate, int(row["seed"]))
                runs.setdefault(run, []).append((100 * float(row[metric]), int(row["mean_of"])))
        for (method, setting, rate, seed), found in runs.items():
            final = mean(score for score, _ in found[-found[0][1] :])
            tried.setdefault((method, setting), {}).setdefault(rate, {}).setdefault(seed, []).append(final)
    return tried


def at_best_rates(tried: Tried) -> Scores:
    """Return the runs of every method's best rate in every setting."""
    scores: Scores = {}
    for (method, setting), rates in tried.items():
        found = [{seed: mean(repeats) for seed, repeats in runs.items()} for runs in rates.values()]
        best = max(found, key=lambda runs: (len(runs), mean(runs.values())))
        scores.setdefault(method, {}).update({(setting, seed): score for seed, score in best.items()})
    return scores


def rates_table(tried: Tried, settings: Sequence[str]) -> list[str]:
    """Return Markdown: the mean over seeds of every method at every rate, each file's runs by themselves."""
    lines = ["| setting | method | rate (of the head, if another): mean over seeds |", "|---|---|---|"]
    for setting in settings:
        for method in METHODS:
            cells = []
            for (lr, head), runs in sorted(tried.get((method, setting), {}).items()):
                files = zip_longest(*runs.values())
                means = [mean(s for s in repeat if s is not None) for repeat in files]
                rate = f"{lr:g}" if head == lr else f"{lr:g} ({head:g})"
                cells.append(f"{rate}: {' and '.join(f'{m:.1f}' for m in means)} ({len(runs)})")
            lines.append(f"| {setting} | {METHODS[method]} | {', '.join(cells)} |")
    return lines


def differences(scores: Scores, settings: Sequence[str]) -> dict[str, Paired]:
    """Return FeDeRA minus every other method on these settings, over the runs that both have."""
    first = {key: score for key, score in scores["federa"].items() if key[0] in settings}
    found = {name: paired(first, scores[name]) for name in METHODS if name in scores and name != "federa"}
    return {name: pair for name, pair in found.items() if pair is not None}


def table(scores: Scores, settings: Sequence[str]) -> list[str]:
    """Return Markdown: a line a setting, then the mean over settings and the paired differences."""
    methods = [name for name in METHODS if name in scores]
    lines = ["| setting | seeds | " + " | ".join(METHODS[name] for name in methods) + " |"]
    lines.append("|---" * (2 + len(methods)) + "|")
    for setting in settings:
        cells = [[s for (where, _), s in scores[name].items() if where == setting] for name in methods]
        best = max((mean(cell) for cell in cells if cell), default=0.0)
        shown = [_cell(cell, best) for cell in cells]
        lines.append(f"| {setting} | {max(map(len, cells))} | " + " | ".join(shown) + " |")
    means = [_by_setting(scores[name], settings) for name in methods]
    cells = [
        f"{mean(found.values()):.1f}" + (f" (of {len(found)})" if len(found) < len(settings) else "")
        for found in means
    ]
    lines.append("| **mean** | | " + " | ".join(cells) + " |")
    found = differences(scores, settings)
    for title, cell in (
        ("FeDeRA minus it", lambda pair: f"{pair.mean:+.1f}"),
        ("95 % interval", lambda pair: f"{pair.low:+.1f} to {pair.high:+.1f}"),
        ("ahead in", lambda pair: f"{pair.wins:g} of {pair.pairs}"),
    ):
        cells = [cell(found[name]) if name in found else "" for name in methods]
        lines.append(f"| {title} | | " + " | ".join(cells) + " |")
    return lines


def _cell(scores: Sequence[float], best: float) -> str:
    if not scores:
        return ""
    text = f"{mean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else "")
    return f"**{text}**" if mean(scores) == best else text


def _by_setting(scores: Mapping[tuple[str, int], float], settings: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for (setting, _), score in scores.items():
        if setting in settings:
            found.setdefault(setting, []).append(score)
    return {setting: mean(values) for setting, values in found.items()}


def picture(scores: Scores, settings: Sequence[str], to: Path) -> None:
    """Draw FeDeRA minus every other method, a panel each: a line a setting, and all of them together."""
    from matplotlib.figure import Figure

    others = list(differences(scores, settings))
    figure = Figure(figsize=(2.6 * len(others) + 2.4, 0.36 * len(settings) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, others, strict=True):
        for place, group in enumerate([[setting] for setting in settings] + [list(settings)]):
            pair, whole = differences(scores, group).get(name), len(group) == len(settings)
            if pair is None:
                continue
            colour = "#b0413e" if whole else "#2f5d8a"
            axes.plot([pair.low, pair.high], [place, place], color=colour, lw=2.5 if whole else 1.5)
            axes.plot(pair.mean, place, "D" if whole else "o", color=colour, ms=6 if whole else 4)
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set_title(f"FeDeRA − {METHODS[name]}", fontsize=10)
        axes.set_xlabel("points")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(settings) + 1), [*settings, "all"], fontsize=8)
    panels[0].invert_yaxis()
    figure.savefig(to, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--settings", default="", help="only those that have this in their name")
    parser.add_argument(
        "--head-rates", action="store_true", help="count runs whose head had a rate of its own"
    )
    parser.add_argument("--rates", action="store_true", help="show every rate that ran")
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    tried = read(asked.files, asked.head_rates)
    scores = at_best_rates(tried)
    settings = sorted({where for found in scores.values() for where, _ in found if asked.settings in where})
    if not settings:
        parser.error("no such setting in these files")
    print("\n".join(table(scores, settings)))
    if asked.rates:
        print("\n".join(rates_table(tried, settings)))
    if asked.picture:
        picture(scores, settings, asked.picture)


if __name__ == "__main__":
    main()
