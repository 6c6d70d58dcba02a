"""What several comparisons say together: repeats are averaged, methods stand at their best rate, means say of what."""

import csv
import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from federa.statistics import paired

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def call(script, *words):
    """Return what a script prints; in this process, which has loaded torch."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return out.getvalue()


@pytest.fixture
def write(tmp_path):
    """Write a comparison's runs, `{(setting, method, lr, head_lr): final scores by seed}`, as a CSV file."""

    def written(name, runs):
        for (setting, method, lr, head), finals in runs.items():
            for seed, final in enumerate(finals):
                run = tmp_path / name / "cells" / setting / f"{method}-seed{seed}"
                run.mkdir(parents=True)
                recipe = {"client": {"lr": lr, "head_lr": head}, "final_mean_of": 2}
                (run / "config.yaml").write_text(yaml.safe_dump(recipe))
                (run / "result.json").write_text("{}")
                scores = [0.9, None, final - 0.1, final + 0.1]
                records = [{"round": i + 1, **({} if s is None else {"f1": s})} for i, s in enumerate(scores)]
                (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        call("rounds_csv.py", tmp_path / name, tmp_path / f"{name}.csv")
        return tmp_path / f"{name}.csv"

    return written


def test_repeats_are_averaged_and_the_best_rate_is_taken(write):
    files = [
        write("a", {("x", "federa", 1e-3, None): [0.5, 0.6], ("x", "lora", 1e-3, None): [0.4, 0.3]}),
        write("b", {("x", "federa", 1e-3, None): [0.3, 0.4], ("x", "lora", 2e-3, None): [0.5, 0.2]}),
        write("c", {("y", "federa", 1e-3, None): [0.2, 0.2], ("x", "lora", 1e-3, 4e-3): [0.45, 0.35]}),
    ]
    out = call("overall.py", *files, "--rates")
    assert "| x | LoRA | 0.001: 35.0 (2), 0.002: 35.0 (2) |" in out and "+8.3" not in out
    out = call("overall.py", *files, "--rates", "--head-rates")
    assert "| x | 2 | **45.0 ± 7.1** | 40.0 ± 7.1 |" in out
    assert "| y | 2 | **20.0 ± 0.0** |  |" in out
    assert "| **mean** | | 32.5 | 40.0 (of 1) |" in out
    assert "| FeDeRA minus it | |  | +5.0 |" in out and "| ahead in | |  | 1 of 2 |" in out
    assert "| x | FeDeRA | 0.001: 55.0 and 35.0 (2) |" in out
    assert "| x | LoRA | 0.001: 35.0 (2), 0.001 (0.004): 40.0 (2), 0.002: 35.0 (2) |" in out


def test_a_setting_that_is_asked_for(write):
    runs = {(s, m, 1e-3, None): [0.5] for s in ("x-0.1-a", "x-1-a") for m in ("federa", "lora")}
    assert "x-0.1-a" not in call("overall.py", write("a", runs), "--settings", "x-1-")


def rows_of(lines, first):
    """Return the tables' rows that begin so: their cells without what is bold, from the third on."""
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row[2:] for row in rows if first(row[0])]


def test_what_parts_are_worth_is_that_of_the_runs():
    overall = runpy.run_path(str(BENCHMARKS / "overall.py"))
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    section = page[page.index("## What closes the gap: placement") :].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if "[csv](" in line]
    assert len(rows) == 6
    for row in rows:
        file, *told = [cell.strip() for cell in row.replace("*", "").split("|")[3:6]]
        path = BENCHMARKS.parent / "docs" / file.removeprefix("[csv](").removesuffix(")")
        runs = {method: rates for (method, _), rates in overall["read"]([path], head_rates=True).items()}
        for method, cell in zip(("federa", "lora"), told, strict=True):
            (by_seed,) = runs.get(method, {None: {}}).values()  # one rate a file
            seeds = [by_seed[seed][0] for seed in (0, 1) if by_seed]
            listed = ", ".join(f"{score:.1f}" for score in seeds)
            assert cell == (f"{sum(seeds) / 2:.1f} ({listed})" if seeds else ""), row
    assert {path.name for path in (BENCHMARKS.parent / "docs/results/parts").iterdir()} <= {
        row.partition("parts/")[2].partition(")")[0] for row in rows
    }


PLACES = {
    "FeDeRA": ("federa", "qv32"), "LoRA": ("lora", "qv32"), "adapter": ("adapter", "rest"), "FT": ("ft", "rest"),
    "FeDeRA, all": ("federa", "all8"), "LoRA, all": ("lora", "all8"),
}  # fmt: skip


def placed():
    """Return every run's score and every method's rate, by what the page calls method and place."""
    overall = runpy.run_path(str(BENCHMARKS / "overall.py"))
    folder = BENCHMARKS.parent / "docs/results/placement"
    tried = {
        place: overall["read"](sorted(folder.glob(f"*-{place}.csv")), head_rates=True)
        for place in ("qv32", "all8", "rest")
    }
    scores = {
        name: overall["at_best_rates"](tried[place])[method] for name, (method, place) in PLACES.items()
    }
    rates = {
        (name, setting): [lr for lr, _ in runs]
        for name, (method, place) in PLACES.items()
        for (found, setting), runs in tried[place].items()
        if found == method
    }
    return scores, rates


def cells_of(line):
    return [cell.strip() for cell in line.replace("*", "").strip("|").split("|")]


def test_what_placement_is_worth_is_that_of_the_runs():
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    section = page[page.index("## What closes the gap: placement on five") :].split("\n## ", 1)[0]
    lines = [cells_of(line) for line in section.splitlines() if line.startswith("|")]
    scores, rates = placed()
    order = ("FeDeRA", "LoRA", "FeDeRA, all", "LoRA, all", "adapter", "FT")
    settings = sorted({setting for setting, _ in scores["FT"]})
    names = {
        "CrossNER": "crossner",
        "MRQA": "mrqa",
        "20 News": "newsgroups20",
        "SemEval": "semeval",
        "SQuAD": "squad",
    }
    told = {key: line[1:] for line in lines for name, key in names.items() if line[0].startswith(name)}
    means = []
    for setting in settings:
        (row,) = [row for key, row in told.items() if setting.startswith(key)]
        for name, cell in zip(order, row, strict=True):
            runs = [score for (where, _), score in scores[name].items() if where == setting]
            (lr,) = rates[name, setting]  # one rate a file
            assert cell.startswith(f"{mean(runs):.1f} ± {stdev(runs):.1f} ("), (setting, name)
            rate, *rest = cell.rsplit("(", 1)[1].removesuffix(")").split("; ")
            assert float(rate) == lr and rest == ([] if len(runs) == 3 else ["2 seeds"]), (setting, name)
            means.append((name, mean(runs)))
    (whole,) = [line[1:] for line in lines if line[0] == "mean"]
    for name, cell in zip(order, whole, strict=True):
        assert cell == f"{mean(score for found, score in means if found == name):.1f}"
    pairs = {
        "FeDeRA minus LoRA, query and value": ("FeDeRA", "LoRA"),
        "FeDeRA minus LoRA, all linear layers": ("FeDeRA, all", "LoRA, all"),
        "LoRA, all linear layers minus query and value": ("LoRA, all", "LoRA"),
        "FeDeRA, all linear layers minus query and value": ("FeDeRA, all", "FeDeRA"),
        "FeDeRA, query and value, minus adapter": ("FeDeRA", "adapter"),
        "FeDeRA, query and value, minus FT": ("FeDeRA", "FT"),
        "LoRA, all linear layers, minus FT": ("LoRA, all", "FT"),
    }
    rows = {line[0]: line[1:] for line in lines if line[0] in pairs}
    assert rows.keys() == pairs.keys()
    for name, (one, other) in pairs.items():
        all_sets = paired(scores[one], scores[other])
        others = paired({k: v for k, v in scores[one].items() if "semeval" not in k[0]}, scores[other])
        interval = "{0.mean:+.1f} ({0.low:+.1f} to {0.high:+.1f})".format
        assert rows[name] == [
            interval(all_sets),
            f"{all_sets.wins:g} of {all_sets.pairs}",
            interval(others),
        ], name


def test_every_rate_that_was_chosen_was_the_best_of_its_tuning():
    with (BENCHMARKS.parent / "docs/results/placement/tuning.csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    _, rates = placed()
    for (name, setting), (lr,) in rates.items():
        method, place = PLACES[name]
        of = [t for t in tried if (t["setting"], t["placement"], t["method"]) == (setting, place, method)]
        assert lr == float(max(of, key=lambda one: float(one["score"]))["lr"]), (name, setting)


def test_the_results_in_the_documentation_are_those_of_the_runs():
    results = BENCHMARKS.parent / "docs" / "results"
    files = [file for where in ("", "skews/", "head/") for file in results.glob(f"{where}*.csv")]
    found = call("overall.py", *files, "--settings", "dirichlet-").splitlines()
    page = (results.parent / "results.md").read_text()
    page = page[page.index("## All data sets together") :].split("\n## ", 1)[0].splitlines()
    scores = rows_of(found, lambda name: "-dirichlet-" in name)
    assert len(scores) == 12 and all(len(row) == 5 for row in scores)
    kinds = ("accuracy", "F1")
    assert rows_of(page, lambda name: name.endswith(kinds) or "Task 8" in name) == scores
    for name, words in {"mean": 1, "FeDeRA minus it": 1, "95 % interval": 3, "ahead in": 3}.items():
        told, true = (rows_of(lines, lambda first, name=name: first == name) for lines in (page, found))
        assert len(told) == len(true) == 1
        shortened = [[cell.split()[:words] for cell in row] for row in (*told, *true)]
        assert shortened[0] == shortened[1], name
