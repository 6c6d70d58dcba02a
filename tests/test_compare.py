"""`federa compare`: same partitions and cohorts for all, tuning off the test set, tables that add up."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from federa.checkpoint import RunDirectory
from federa.compare import ALL, Comparison, compare_methods, terminal_tables, time_estimate
from federa.compare.execute import jobs_for
from federa.compare.grid import Grid, Setting
from federa.compare.tables import COLUMNS, latex, markdown, overall_lines
from federa.config import parse_config
from federa.data.datasets import read_splits
from federa.methods import METHODS
from federa.state import load_state
from federa.types import FederaError, RoundFailedError
from running import alive, federa, short_reports
from small import small_recipe

SKEWS = "dirichlet:0.5,iid"


def write(recipe, path):
    path.write_text(yaml.safe_dump(recipe))
    return path


def comparison(recipe, tmp_path, **changes):
    options = {"methods": "federa,lora", "seeds": "0,1", "skews": SKEWS, "lrs": {"lora": "1e-2,1e-6"}}
    options |= {"tune_rounds": 1, "jobs": 1, **changes}
    return Comparison.load([write(recipe, tmp_path / "recipe.yaml")], ["rounds=2"], options)


@pytest.fixture(scope="module")
def done(encoder, train_csv, test_csv, tmp_path_factory):
    """Two settings, two methods, two seeds, run once for all tests: the comparison, its folder, outcome, words."""
    to, said = tmp_path_factory.mktemp("compare"), []
    recipe = small_recipe(encoder("bert"), train_csv, test_csv)
    made = comparison(recipe, to)
    with pytest.MonkeyPatch.context() as patch:
        short_reports(patch)
        return made, to / "out", compare_methods(made, to / "out", said.append), said


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch):
    short_reports(monkeypatch)


def rows_of(folder):
    with (folder / "cells.csv").open() as file:
        return list(csv.DictReader(file))


# What is run


def test_cells_are_written_with_the_columns_of_the_contract(done):
    _, folder, _, _ = done
    rows = rows_of(folder)
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    names = [(r["skew"], r["seed"], r["method"]) for r in rows]
    assert names == [(k, s, m) for k in ("dirichlet 0.5", "iid") for s in "01" for m in ("federa", "lora")]
    for row in rows:
        result = json.loads((folder / row["folder"] / "result.json").read_text())
        assert float(row["metric"]) == result["final"]
        assert float(row["bytes"]) == result["bytes_up"] + result["bytes_down"]


def test_all_methods_meet_the_same_clients_and_settings_meet_others(done):
    _, folder, _, _ = done
    met = {}
    for row in rows_of(folder):
        cell = folder / row["folder"]
        records = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
        cohorts = json.dumps([sorted(r["verdicts"]) for r in records])
        met.setdefault((row["skew"], row["seed"]), set()).add((cell / "partition.json").read_text() + cohorts)
    assert all(len(one) == 1 for one in met.values())
    assert len({next(iter(one)) for one in met.values()}) == 4


def test_tuning_never_sees_the_test_set_and_its_choice_is_used(done):
    _, folder, _, _ = done
    for slug in ("dirichlet-0.5", "iid"):
        (tuned,) = [p for p in (folder / "tune").iterdir() if slug in p.name]
        assert sorted(p.name for p in tuned.iterdir()) == [
            "lora-lr0.01-rounds1-seed0",
            "lora-lr1e-06-rounds1-seed0",
        ]
        scores = {}
        for run in tuned.iterdir():
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert config["data"]["evaluate_on"] == "validation" and config["rounds"] == 1
            scores[config["client"]["lr"]] = json.loads((run / "result.json").read_text())["final"]
        best = max(scores, key=lambda lr: scores[lr])
        cells = folder / "cells" / tuned.name
        for seed in "01":
            used = yaml.safe_load((cells / f"lora-seed{seed}" / "config.yaml").read_text())
            assert used["client"]["lr"] == best and used["data"]["evaluate_on"] == "test"


@pytest.mark.parametrize("validation", ["of its own", "of train"])
def test_where_runs_are_judged_on_validation_rates_are_not(recipe, tmp_path, train_csv, validation):
    header, *rows = train_csv.read_text().splitlines()
    for name, part in (("train", rows[:-40]), ("validation", rows[-40:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *part]))
    data = {**recipe["data"], "train": str(tmp_path / "train.csv"), "evaluate_on": "validation"}
    if validation == "of its own":
        data["validation"] = str(tmp_path / "validation.csv")
    else:
        data["validation_fraction"] = 0.2
    made = comparison({**recipe, "data": data}, tmp_path, skews=None)
    setting = made.settings[0]
    cell, tuning = (
        read_splits(one.config.data, one.config.task)
        for one in (made.cell(setting, "lora", 0, 1e-3), made.tuning(setting, "lora", 1e-3, 1))
    )
    judged, chosen, trained = (
        set(table["text"]) for table in (cell.evaluation, tuning.evaluation, tuning.train)
    )
    assert judged and chosen and not chosen & judged and not chosen & trained and not trained & judged
    assert chosen | trained == set(cell.train["text"])


def test_what_was_chosen_stays_though_a_run_that_failed_would_not_again(recipe, tmp_path, monkeypatch):
    from federa.compare import execute

    def judged(config, folder):
        if folder.parts[-3] != "tune":
            return run_cell(config, folder)
        if config.client.lr == 1e-2 and troubled:
            return None, "the machine was out of memory"
        summary, wrong = run_cell(config, folder)
        return {**summary, "final": config.client.lr}, wrong  # the larger the better

    run_cell, troubled = execute.run_cell, True
    monkeypatch.setattr(execute, "run_cell", judged)
    made = comparison(recipe, tmp_path, methods="lora", seeds="0", skews=None)
    (row,) = compare_methods(made, tmp_path / "out", lambda line: None).rows
    assert row["lr"] == 1e-6
    troubled = False
    assert compare_methods(made, tmp_path / "out", lambda line: None).rows == [row]
    shutil.rmtree(tmp_path / "out" / "cells")  # with no run made, nothing keeps from choosing among all
    assert compare_methods(made, tmp_path / "out", lambda line: None).rows[0]["lr"] == 1e-2
    shutil.rmtree(tmp_path / "out" / "cells")
    other = comparison(recipe | {"cohort": 2}, tmp_path, methods="lora", seeds="0", skews=None)
    with pytest.raises(FederaError, match="was started with cohort=3, not 2; compare into another directory"):
        compare_methods(other, tmp_path / "out", lambda line: None)


def test_a_score_that_is_no_number_is_not_the_best(recipe, tmp_path, monkeypatch):
    from federa.compare import execute

    finals = {1e-2: 0.5, 1e-3: float("nan"), 1e-4: 0.9, 1e-5: 0.1}

    def judged(config, folder):
        summary, wrong = run_cell(config, folder)
        tuned = folder.parts[-3] == "tune"
        return {**summary, "final": finals[config.client.lr] if tuned else 0.5}, wrong

    run_cell = execute.run_cell
    monkeypatch.setattr(execute, "run_cell", judged)
    rates = {"lora": "1e-2,1e-3,1e-4,1e-5"}
    made = comparison(recipe, tmp_path, methods="lora", seeds="0", skews=None, lrs=rates)
    assert compare_methods(made, tmp_path / "out", lambda line: None).rows[0]["lr"] == 1e-4


def test_what_no_one_foresaw_is_one_runs_failure(recipe, tmp_path, monkeypatch):
    from federa.compare import execute

    def breaks(config, folder, **options):
        if config.method.name == "federa":
            raise RuntimeError("no memory left\non the device")
        return run(config, folder, **options)

    run, said = execute.run, []
    monkeypatch.setattr(execute, "run", breaks)
    made = comparison(recipe, tmp_path, seeds="0", skews=None, lrs=None)
    rows = compare_methods(made, tmp_path / "out", said.append).rows
    assert [row["status"] for row in rows] == ["failed", "done"]
    told = tmp_path / "out" / "cells" / made.settings[0].slug / "federa-seed0-error.txt"
    assert f"federa-seed0: RuntimeError: no memory left (all of it: {told})" in said[0]
    assert "Traceback" in told.read_text()
    monkeypatch.undo()
    assert all(row["status"] == "done" for row in compare_methods(made, tmp_path / "out", said.append).rows)
    assert not told.exists()


def test_finished_cells_are_not_run_again(done):
    made, folder, outcome, _ = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert len(before) == 12
    again = compare_methods(made, folder, lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == before
    assert again.rows == outcome.rows and again.tables == outcome.tables


def test_a_cell_that_is_missing_is_run_and_nothing_else(done, tmp_path):
    made, folder, outcome, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    lost = copy / outcome.rows[3]["folder"]
    shutil.rmtree(lost)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("result.json")}
    again = compare_methods(made, copy, lambda line: None)
    assert again.rows[3]["metric"] == outcome.rows[3]["metric"]
    assert {p: t for p, t in before.items() if p.stat().st_mtime_ns != t} == {}
    assert (lost / "result.json").is_file()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2e-4, {"federa": 2e-4, "ft": 2e-4}),
        (3e-3, {"federa": 3e-3, "ft": 1e-4}),
        (None, {"federa": 3e-3, "ft": 1e-4}),
    ],
)
def test_a_rate_that_the_recipe_gives_is_every_methods(given, expected, recipe, tmp_path):
    recipe["client"] = {**recipe["client"], "lr": given}
    made = comparison(recipe, tmp_path, methods="federa,ft", lrs=None, skews=None)
    (setting,) = made.settings
    assert {m: made.cell(setting, m, 0, None).config.client.lr for m in expected} == expected
    assert {m: made.cell(setting, m, 0, 0.5).config.client.lr for m in expected} == dict.fromkeys(
        expected, 0.5
    )
    for method, lr in expected.items():
        assert f"  run  {method:10} seeds 0, 1; lr {lr:g}, 2 rounds" in made.describe()


def test_halving_gives_the_better_half_twice_the_rounds(recipe, tmp_path):
    said = []
    rates = "1e-2,3e-3,1e-6,1e-7"
    made = comparison(
        recipe,
        tmp_path,
        methods="lora",
        seeds="0",
        skews=None,
        lrs={"lora": rates},
        tune="halving",
        tune_rounds=2,
    )
    (setting,) = made.settings
    assert made.rungs(setting, "lora") == [(4, 1), (2, 2)]
    compare_methods(made, tmp_path / "out", said.append)
    names = sorted(p.name for p in (tmp_path / "out" / "tune").glob("*/*"))
    assert len(names) == 6
    first = {
        name: json.loads((tmp_path / "out" / "tune" / setting.slug / name / "result.json").read_text())[
            "final"
        ]
        for name in names
        if name.endswith("rounds1-seed0")
    }
    second = {name.removesuffix("rounds2-seed0") for name in names if name.endswith("rounds2-seed0")}
    best = sorted(first.values())[-2:]
    assert sorted(first[f"{name}rounds1-seed0"] for name in second) == best


@pytest.mark.parametrize(
    ("bad", "rung", "expected"),
    [
        ({"1e-06", "1e-07"}, (1, 2), "1e-08"),  # good for one round, not for two: the next one down
        ({"1e-06", "1e-07", "1e-08", "1e-09"}, (1,), None),
    ],
)
def test_a_rate_that_fails_makes_room_for_the_next(recipe, tmp_path, monkeypatch, bad, rung, expected):
    """What fails at every rate is a failed method; the others' runs go on."""
    from federa.compare import execute

    def judged(config, folder):
        lr = f"{config.client.lr:g}"
        if folder.parts[-3] != "tune" or config.method.name == "bitfit":
            return run_cell(config, folder)
        if config.rounds in rung and (config.rounds == 2 or expected is None) and lr in bad:
            return None, "diverged"
        summary, wrong = run_cell(config, folder)
        return {**summary, "final": config.client.lr}, wrong  # the larger the better

    run_cell, said = execute.run_cell, []
    monkeypatch.setattr(execute, "run_cell", judged)
    rates = {"lora": "1e-9,1e-8,1e-7,1e-6", "bitfit": "1e-3,1e-4"}
    options = {"methods": "lora,bitfit", "seeds": "0", "skews": None, "lrs": rates}
    made = comparison(recipe, tmp_path, **options, tune="halving", tune_rounds=2)
    rows = compare_methods(made, tmp_path / "out", said.append).rows
    assert [row["status"] for row in rows] == ["failed" if expected is None else "done", "done"]
    if expected is None:
        assert any("lora failed at every learning rate" in line for line in said)
        assert not (tmp_path / "out" / rows[0]["folder"]).exists()
        assert "failed" in (tmp_path / "out" / "table.md").read_text()
    else:
        assert f"{rows[0]['lr']:g}" == expected


@pytest.mark.parametrize(("of", "rounds", "expected"), [(1, 2, (0, 1)), (2, 1, (1, 1)), (2, 2, (1, 2))])
def test_rates_are_judged_by_as_many_evaluations_as_runs_are(recipe, tmp_path, of, rounds, expected):
    made = comparison(
        recipe | {"evaluate_every": 1, "final_mean_of": of}, tmp_path, methods="lora", skews=None
    )
    config = made.tuning(made.settings[0], "lora", 1e-3, rounds).config
    assert (config.evaluate_every, config.final_mean_of) == expected


def test_a_best_rate_at_the_edge_of_those_tried_is_said(recipe, tmp_path):
    said = []
    made = comparison(
        recipe, tmp_path, methods="lora", seeds="0", skews=None, lrs={"lora": "1e-2,1e-7,1e-8"}, tune_rounds=2
    )
    compare_methods(made, tmp_path / "out", said.append)
    assert any("at the edge" in line and "0.01" in line for line in said)
    told = "LoRA: the rate is at the edge of those tried in data0, dirichlet 0.5, bert (0.01)."
    assert told in (tmp_path / "out" / "report.html").read_text()
    again = []
    compare_methods(made, tmp_path / "out", again.append)
    assert told in (tmp_path / "out" / "report.html").read_text(), "though it is not chosen anew"


def test_two_at_a_time_give_what_one_at_a_time_gives(done, recipe, tmp_path):
    _, _, outcome, _ = done
    made = comparison({**recipe, "engine": {"name": "serial", "threads": 1}}, tmp_path, skews="iid", jobs=2)
    again = compare_methods(made, tmp_path / "out", lambda line: None)
    expected = {(r["seed"], r["method"]): r["metric"] for r in outcome.rows if r["skew"] == "iid"}
    assert {(r["seed"], r["method"]): r["metric"] for r in again.rows} == expected


@pytest.mark.slow
def test_a_killed_comparison_leaves_nobody_behind_and_goes_on(recipe, tmp_path):
    path = write({**recipe, "rounds": 16}, tmp_path / "recipe.yaml")
    words = ["compare", path, "--methods", "federa,lora", "--seeds", "0", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "federa.cli", *map(str, words), "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("out/cells/*/*/metrics.jsonl"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        children = [
            int(word)
            for task in os.listdir(f"/proc/{process.pid}/task")
            for word in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split()
        ]
        assert children
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while any(alive(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)
    assert federa(*words, "--jobs", 1) == 0
    assert len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("engine", "asked", "expected"),
    [("serial", None, 6), ("processes", None, 1), ("serial", 1, 1), ("stacked", None, 1), ("stacked", 1, 1)],
)
def test_the_number_of_runs_at_a_time(recipe, engine, asked, expected, monkeypatch):
    monkeypatch.setattr("federa.compare.execute.available_cores", lambda: 6)
    config = parse_config({**recipe, "engine": {"name": engine}})
    assert jobs_for(config, asked) == expected
    side_by_side = parse_config({**recipe, "engine": {"name": "stacked", "clients": 2}})
    assert jobs_for(side_by_side, 3) == 3
    with pytest.raises(FederaError, match="--jobs 3: every run would plan with all free memory"):
        jobs_for(side_by_side.replace(**{"engine.clients": None}), 3)
    threads = parse_config({**recipe, "engine": {"name": "serial", "threads": 4}})
    assert jobs_for(threads, None) == 1
    monkeypatch.setattr("federa.compare.execute.pick_device", lambda name: torch.device("cuda"))
    serial = parse_config({**recipe, "engine": {"name": "serial"}})
    assert jobs_for(serial, None) == 1, "one GPU is not for as many runs as there are cores"
    assert jobs_for(serial, 3) == 3


# What is said


def test_tables_hold_mean_spread_and_paired_difference(done):
    _, folder, outcome, _ = done
    rows = [row for row in rows_of(folder) if row["skew"] == "iid"]
    one, other = ([100 * float(r["metric"]) for r in rows if r["method"] == m] for m in ("federa", "lora"))
    text = (folder / "table.md").read_text()
    part = text[text.index(", iid, ") :]
    lora = next(line for line in part.splitlines() if line.startswith("| lora"))
    assert f"{np.mean(other):.1f} ± {np.std(other, ddof=1):.1f}" in lora
    gaps = np.subtract(one, other)
    assert f"{gaps.mean():+.1f} ± {gaps.std(ddof=1):.1f}" in lora
    assert f"{(gaps > 0).sum() + 0.5 * (gaps == 0).sum():g} of 2" in lora
    assert [title for title, _ in outcome.tables][-1] == ALL
    whole = [line.strip("| ").split(" | ") for line in text[text.index(ALL) :].splitlines() if "|" in line]
    table = {first: dict(zip(whole[0][1:], cells, strict=True)) for first, *cells in whole[2:8]}
    every = {
        m: [100 * float(r["metric"]) for r in rows_of(folder) if r["method"] == m] for m in ("federa", "lora")
    }
    assert table["mean"] == {m: f"{np.mean(scores):.1f}" for m, scores in every.items()}
    gaps = np.subtract(*every.values())
    assert table["federa minus it"]["lora"] == f"{gaps.mean():+.1f} ± {gaps.std(ddof=1):.1f}"
    assert table["wins"]["lora"] == f"{(gaps > 0).sum() + 0.5 * (gaps == 0).sum():g} of 4"
    iid = next(cells for setting, cells in table.items() if ", iid, " in setting)
    assert iid["lora"] == f"{np.mean(other):.1f} ± {np.std(other, ddof=1):.1f}"


def test_a_method_that_failed_in_a_setting_has_no_mean_over_all():
    rows = [
        {"method": method, "setting": setting, "seed": 0, "status": status, "metric": 0.5}
        for method, setting, status in [
            ("federa", "a", "done"),
            ("federa", "b", "done"),
            ("lora", "a", "done"),
            ("lora", "b", "failed"),
        ]
    ]
    assert overall_lines(rows, ["federa", "lora"], {})[1:4] == [
        ["a", "50.0", "50.0"],
        ["b", "50.0", "failed"],
        ["mean", "50.0", ""],
    ]
    rows += [{**row, "seed": 1} for row in rows]
    rows[-1] |= {"status": "done"}
    assert overall_lines(rows, ["federa", "lora"], {})[2:4] == [
        ["b", "50.0 ± 0.0", "50.0 (1 of 2)"],
        ["mean", "50.0", ""],
    ], "a mean over fewer seeds is no match for others'"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_read_well_at_any_width(done, width):
    """No word of a head or a cell is cut, at the cost of a second table with the first column again."""
    _, _, outcome, _ = done
    for title, lines in outcome.tables:
        console = Console(width=width, file=io.StringIO(), color_system=None)
        tables = terminal_tables(title, lines, console.width)
        console.print(*tables, sep="\n")
        text = console.file.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        assert all(word in text for line in lines for cell in line for word in cell.split())
        assert all(cell in text for line in lines[1:] for cell in line)
        assert [
            column.header for table in tables for column in table.columns if column.header != lines[0][0]
        ] == (lines[0][1:])
        assert all(table.columns[0].header == lines[0][0] for table in tables)
        assert len(tables) == 1 or width < 200


def test_the_files_open_in_what_they_are_for(done):
    _, folder, _, _ = done
    tex = (folder / "table.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") >= 3
    assert r"$\pm$" in tex and "%" not in tex.replace(r"\%", "").replace("% ", "")
    page = (folder / "report.html").read_text()
    assert (
        "FeDeRA" in page
        and "LoRA" in page
        and not re.search(r"(src|href|url\()\W{0,2}http|@import|<link|<script[^>]* src", page)
    )


def test_costs_to_shares_of_the_references_best(done):
    _, _, outcome, _ = done
    assert {one.target.split(" of")[0] for one in outcome.reached} == {"80%", "90%", "95%"}
    for one in outcome.reached:
        assert "FeDeRA's best" in one.target, "ft is not among the methods: the first one stands for it"
        cells = [r for r in outcome.rows if (r["setting"], r["method"]) == (one.setting, one.method)]
        best = {
            r["seed"]: r["best"]
            for r in outcome.rows
            if (r["setting"], r["method"]) == (one.setting, "federa")
        }
        share = float(one.target.split("%")[0]) / 100
        assert f"({share * np.mean(list(best.values())):.3f})" in one.target
        assert one.seeds == sum(r["best"] >= share * best[r["seed"]] for r in cells)
        assert one.method != "federa" or one.seeds == one.of == 2, "the reference reaches its own"
        assert (one.rounds is None) == (one.seeds < one.of)


def test_a_method_that_diverges_is_shown_as_failed(recipe, tmp_path):
    said = []
    recipe["max_update_norm"] = 1e-9  # every update is rejected
    made = comparison(recipe, tmp_path, lrs=None, methods="federa", skews=None)
    compare_methods(made, tmp_path / "out", said.append)
    assert "failed" in (tmp_path / "out" / "table.md").read_text()
    assert "min_success" in said[0]


def test_a_cost_is_of_all_seeds_or_none(done, recipe, tmp_path, monkeypatch):
    """A method that diverged with one seed has not reached the target with that seed."""
    from federa.compare import execute

    def fails(config, folder):
        return (None, "diverged") if folder.name == "lora-seed1" else run_cell(config, folder)

    run_cell = execute.run_cell
    monkeypatch.setattr(execute, "run_cell", fails)
    made = comparison(recipe, tmp_path, lrs=None, skews=None, targets="0.01")
    outcome = compare_methods(made, tmp_path / "out", lambda line: None)
    told = {one.method: (one.seeds, one.of, one.rounds is None) for one in outcome.reached}
    assert told == {"federa": (2, 2, False), "lora": (1, 2, True)}


def test_a_seed_has_the_references_best_with_it_for_a_target(recipe, tmp_path, monkeypatch):
    """Seeds far apart: of the mean of .9 and .5 the second would never reach 80 %."""
    from federa.compare import execute

    def plays(config, folder):
        top = {0: 0.9, 1: 0.5, 2: 0.7}[config.seed] - 0.05 * (config.method.name == "lora")
        summary, _ = run_cell(config, folder)
        records = RunDirectory(folder).records()
        for record, share in zip(records, (0.7, 1.0), strict=True):
            record["accuracy"] = share * top
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if (config.seed, config.method.name) == (2, "federa"):
            return None, "diverged"
        return {**summary, "best": top, "final": top}, ""

    run_cell = execute.run_cell
    monkeypatch.setattr(execute, "run_cell", plays)
    made = comparison(recipe, tmp_path, lrs=None, skews=None, seeds="0,1,2", targets="0.8,0.95,1.0")
    outcome = compare_methods(made, tmp_path / "out", lambda line: None)
    told = {(one.target[:3], one.method): (one.seeds, one.of, one.rounds) for one in outcome.reached}
    assert told == {
        ("80%", "federa"): (2, 2, 2.0),
        ("80%", "lora"): (2, 2, 2.0),
        ("95%", "federa"): (2, 2, 2.0),
        ("95%", "lora"): (0, 2, None),
        ("100", "federa"): (2, 2, 2.0),
        ("100", "lora"): (0, 2, None),
    }, "seed 2, with which the reference failed, has no target"
    assert "FeDeRA's best with the same seed" in (tmp_path / "out" / "table.md").read_text()


def test_signs_of_the_formats_are_escaped():
    lines = [["a|b", "5 % & _x"], ["± #", "$"], ["a^b~c", r"{\d}"]]
    assert r"a\textasciicircum{}b\textasciitilde{}c & \{\textbackslash{}d\}" in latex(lines)
    assert r"a\|b" in markdown(lines)
    assert r"5 \% \& \_x" in latex(lines) and r"$\pm$ \# & \$" in latex(lines)


def test_the_time_of_all_runs_is_estimated(recipe, tmp_path):
    said = []
    made = comparison(recipe, tmp_path)
    seconds = time_estimate(made, said.append)
    assert len(said) == 4 and 0 < seconds < 600


def test_a_method_that_an_encoder_gives_nothing_to_do_is_no_end(recipe, encoder, tmp_path):
    """BitFit on an encoder without biases; on the other one it runs, and so do the other methods on both."""
    models = f"{encoder('modernbert')},{encoder('bert')}"
    changes = {"methods": "lora,bitfit", "seeds": "0", "skews": "iid", "models": models, "lrs": {}}
    made, said = comparison(recipe, tmp_path, **changes), []
    assert time_estimate(made, said.append) > 0
    assert sum("no biases" in line for line in said) == 1 and len(said) == 4
    outcome = compare_methods(made, tmp_path / "out", said.append)
    done = {(row["setting"].split()[-1], row["method"]): row["status"] for row in outcome.rows}
    assert sorted(done.values()) == ["done", "done", "done", "failed"]
    assert [row["method"] for row in outcome.rows if row["status"] == "failed"] == ["bitfit"]
    assert any("bitfit-seed0: method 'bitfit': this encoder has no biases" in line for line in said)
    alone = comparison(
        recipe, tmp_path, **{**changes, "methods": "bitfit", "models": str(encoder("modernbert"))}
    )
    with pytest.raises(FederaError, match="no method fits this encoder"):
        time_estimate(alone, said.append)


def test_the_estimate_is_near_what_it_takes(recipe, tmp_path):
    """Runs of two rounds, which are mostly their start; tuning runs have one too. Other work may be running beside."""
    made = comparison(recipe, tmp_path, skews="iid")
    began = time.perf_counter()
    time_estimate(made, lambda line: None)  # makes what is cached, and warms up
    expected = time_estimate(made, lambda line: None)
    middle = time.perf_counter()
    compare_methods(made, tmp_path / "out", lambda line: None)
    took = time.perf_counter() - middle
    assert took / 4 < expected < 4 * took, (expected, took, middle - began)


def test_every_run_of_an_estimate_has_its_start(recipe, tmp_path, monkeypatch):
    made = comparison(recipe, tmp_path, skews="iid")  # two methods, two seeds, and two rates for one of them
    monkeypatch.setattr(
        "federa.compare.make_plan",
        lambda config: SimpleNamespace(seconds=10.0, start={"federa": 9.0, "lora": 4.0}[config.method.name]),
    )
    said = []
    # 4 runs, and 2 of half the rounds; each starts in 4 seconds: what federa made was there for the next.
    assert time_estimate(made, said.append) == 4 * (4 + 10) + 2 * (4 + 5)
    assert [line.split(": ")[-1] for line in said] == ["14.0 s a run"] * 2
    # Three at a time: both rates, and when they are known, three runs and one more.
    monkeypatch.setattr("federa.compare.jobs_for", lambda config, asked: 3)
    assert time_estimate(made, said.append) == (4 + 5) + 2 * (4 + 10)


# How it is asked for


def test_a_recipe_may_hold_the_grid(recipe, tmp_path, train_csv):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.csv").write_text(train_csv.read_text())
    write(recipe, tmp_path / "one.yaml")
    write({**recipe, "data": {**recipe["data"], "train": str(other / "train.csv")}}, tmp_path / "two.yaml")
    grid = {"recipes": ["one.yaml", "two.yaml"], "methods": ["lora", "ft"], "seeds": [4], "skews": ["iid"]}
    write(
        {"grid": {**grid, "lrs": {"ft": [1e-4]}}, "rounds": 5, "client": {"batch_size": 4}},
        tmp_path / "grid.yaml",
    )
    made = Comparison.load([tmp_path / "grid.yaml"], ["cohort=2"], {"seeds": "7,8"})
    assert len(made.settings) == 2 and made.settings[1].name.startswith("other, iid, ")
    assert (
        made.grid.seeds == (7, 8) and made.grid.methods == ("lora", "ft") and made.grid.lrs == {"ft": (1e-4,)}
    )
    for setting in made.settings:
        assert (
            setting.config.rounds == 5
            and setting.config.client.batch_size == 4
            and setting.config.cohort == 2
        )
        assert setting.config.method.rank == 4, "what the grid's file does not say is the recipe's"
    assert federa("run", tmp_path / "grid.yaml") == 2


def test_subsets_of_one_data_set_are_several(recipe, tmp_path):
    recipes = []
    for subset in ("mrpc", "rte"):
        data = {"train": "nyu-mll/glue", "subset": subset}
        recipes.append(write({**recipe, "data": data}, tmp_path / f"{subset}.yaml"))
    names = [setting.name.split(",")[0] for setting in Comparison.load(recipes).settings]
    assert names == ["nyu-mll/glue mrpc", "nyu-mll/glue rte"]


def test_several_recipes_are_several_data_sets(recipe, tmp_path, train_csv):
    """Named by their folder if they are called train, else by themselves."""
    recipes = []
    for name in ("news/train.csv", "mail.csv", "forum.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(train_csv.read_text())
        data = {**recipe["data"], "train": str(tmp_path / name)}
        recipes.append(write({**recipe, "data": data}, tmp_path / f"{len(recipes)}.yaml"))
    made = Comparison.load(recipes)
    assert [setting.name.split(",")[0] for setting in made.settings] == ["news", "mail", "forum"]
    with pytest.raises(FederaError, match=r"two settings are named 'news, .*'; give"):
        Comparison.load([recipes[0], recipes[0]])
    for name in ("a+b.csv", "a b.csv"):  # two names, one folder
        (tmp_path / name).write_text(train_csv.read_text())
    with pytest.raises(FederaError, match=r"two settings are named 'a\+b, .*' and 'a b, "):
        one, other = (
            {**recipe, "data": {**data, "train": str(tmp_path / n)}} for n in ("a+b.csv", "a b.csv")
        )
        Comparison.load([write(one, tmp_path / "p.yaml"), write(other, tmp_path / "q.yaml")])


def test_what_a_grid_leaves_empty_is_the_listed_recipes_own(recipe, tmp_path):
    write({**recipe, "task": {"name": "classification", "max_length": 17}}, tmp_path / "one.yaml")
    (tmp_path / "grid.yaml").write_text("grid: {recipes: [one.yaml]}\ntask:\nmethod:\n  rank: 3\n")
    (setting,) = Comparison.load([tmp_path / "grid.yaml"]).settings
    assert setting.config.task.max_length == 17 and setting.config.method.rank == 3


def test_paths_in_a_grids_file_are_beside_it(recipe, encoder, train_csv, tmp_path):
    """Not beside the recipes that it lists."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "own").symlink_to(encoder("bert"))
    (tmp_path / "rows.csv").write_text(train_csv.read_text())
    write(recipe, tmp_path / "sub" / "one.yaml")
    grid = {"recipes": "sub/one.yaml", "models": ["own"]}
    path = write({"data": {"test": "rows.csv"}, "grid": grid}, tmp_path / "grid.yaml")
    (setting,) = Comparison.load([path]).settings
    assert setting.config.data.test == str(tmp_path / "rows.csv")
    assert setting.config.data.train == recipe["data"]["train"]
    assert Path(setting.config.model.name) == Path(encoder("bert")).resolve()
    del grid["models"]
    (setting,) = Comparison.load([write({"data": "rows.csv", "model": "own", "grid": grid}, path)]).settings
    assert setting.config.data.train == str(tmp_path / "rows.csv")
    assert Path(setting.config.model.name) == Path(encoder("bert")).resolve()


def test_methods_of_a_plugin_are_compared(recipe, tmp_path):
    source = Path(__file__).parents[1] / "examples" / "plugin_method.py"
    (tmp_path / "own.py").write_text(source.read_text())
    try:
        raw = {**recipe, "plugins": ["own.py"], "method": {"name": "federa"}}
        path = write({**raw, "grid": {"methods": ["ffa_lora"]}}, tmp_path / "r.yaml")
        (setting,) = (made := Comparison.load([path])).settings
        assert made.cell(setting, "ffa_lora", 0, None).config.method.name == "ffa_lora"
        listed = {"plugins": ["own.py"], "grid": {"methods": "ffa_lora", "recipes": "sub/one.yaml"}}
        (tmp_path / "sub").mkdir()
        write(recipe, tmp_path / "sub" / "one.yaml")
        (setting,) = Comparison.load([write(listed, tmp_path / "grid.yaml")]).settings
        assert setting.config.plugins == (str(tmp_path / "own.py"),)
    finally:
        METHODS._classes.pop("ffa_lora", None)
        sys.modules.pop("federa_plugin_own", None)


@pytest.mark.parametrize("skew", ["dirichlet:0.1", "iid"])
def test_a_skew_takes_the_place_of_a_natural_one(recipe, tmp_path, skew):
    recipe["partition"] = {"name": "natural", "column": "label"}
    (setting,) = comparison(recipe, tmp_path, skews=skew, lrs=None).settings
    assert setting.config.partition.name == skew.split(":")[0] and setting.config.partition.clients == 20


# A folder that was used before


def test_another_recipe_precision_or_engine_wants_another_folder(done, recipe, tmp_path):
    _, folder, _, _ = done
    shutil.copytree(folder, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    for changes, message in (
        ({"client": {**recipe["client"], "precision": "bf16"}}, r"had client\.precision=fp32, not bf16"),
        ({"engine": {"name": "serial", "threads": 2}}, r"had engine\.threads=1, not 2"),
        ({"engine": {"name": "processes"}}, r"had engine\.name=serial, not processes"),
        ({"cohort": 2}, "was started with cohort=3, not 2; compare into another directory"),
    ):
        made = comparison({**recipe, **changes}, tmp_path)
        with pytest.raises(FederaError, match=message):
            compare_methods(made, tmp_path / "out", lambda line: None)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_other_data_in_the_same_folder_are_noticed(recipe, tmp_path, train_csv):
    """The first method is finished and is not looked at again; the second one meets other rows."""
    words = train_csv.read_text()
    (tmp_path / "mine.csv").write_text(words)
    recipe["data"] = {**recipe["data"], "train": str(tmp_path / "mine.csv")}
    options = {"skews": None, "lrs": None, "seeds": "0"}
    compare_methods(
        comparison(recipe, tmp_path, methods="lora", **options), tmp_path / "out", lambda line: None
    )
    header, *rows = words.splitlines()
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows[::-1]]))
    made = comparison(recipe, tmp_path, methods="lora,bitfit", **options)
    with pytest.raises(FederaError, match=r"lora-seed0 and .*bitfit-seed0 .* not run on the same data"):
        compare_methods(made, tmp_path / "out", lambda line: None)


def test_other_data_for_another_seed_are_noticed(recipe, tmp_path, train_csv):
    """Also where the first method failed with that seed: nothing but finished runs is compared."""
    (tmp_path / "mine.csv").write_text(train_csv.read_text())
    recipe["data"] = {**recipe["data"], "train": str(tmp_path / "mine.csv")}
    options = {"skews": None, "lrs": None, "methods": "lora,bitfit"}
    compare_methods(comparison(recipe, tmp_path, seeds="0", **options), tmp_path / "out", lambda line: None)
    (tmp_path / "mine.csv").write_text(train_csv.read_text().replace(" ", " and ", 1))
    made = comparison(recipe, tmp_path, seeds="0,1", **options)
    with pytest.raises(FederaError, match=r"lora-seed0 and .*lora-seed1 .* not run on the same data"):
        compare_methods(made, tmp_path / "out", lambda line: None)


def test_other_data_behind_a_failed_run_are_noticed(recipe, tmp_path, train_csv, monkeypatch):
    from federa.compare import execute

    def fails(config, folder):
        return (None, "diverged") if config.method.name == "federa" else run_cell(config, folder)

    run_cell = execute.run_cell
    monkeypatch.setattr(execute, "run_cell", fails)
    (tmp_path / "mine.csv").write_text(train_csv.read_text())
    recipe["data"] = {**recipe["data"], "train": str(tmp_path / "mine.csv")}
    options = {"skews": None, "lrs": None, "seeds": "0"}
    made = comparison(recipe, tmp_path, methods="federa,lora", **options)
    assert compare_methods(made, tmp_path / "out", lambda line: None).rows[0]["status"] == "failed"
    (tmp_path / "mine.csv").write_text(train_csv.read_text().replace(" ", " and ", 1))
    made = comparison(recipe, tmp_path, methods="federa,lora,bitfit", **options)
    with pytest.raises(FederaError, match=r"lora-seed0 and .*bitfit-seed0 .* not run on the same data"):
        compare_methods(made, tmp_path / "out", lambda line: None)


def test_another_model_in_the_same_folder_is_noticed(recipe, tmp_path):
    shutil.copytree(recipe["model"]["name"], tmp_path / "model")
    recipe["model"] = {**recipe["model"], "name": str(tmp_path / "model")}
    options = {"skews": None, "lrs": None, "seeds": "0"}
    compare_methods(
        comparison(recipe, tmp_path, methods="lora", **options), tmp_path / "out", lambda line: None
    )
    weights, _ = load_state(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file({**weights, name: -weights[name]}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    made = comparison(recipe, tmp_path, methods="lora,bitfit", **options)
    with pytest.raises(FederaError, match=r"lora-seed0 and .*bitfit-seed0 .* not run on the same model"):
        compare_methods(made, tmp_path / "out", lambda line: None)


def test_a_mistake_leaves_no_folder_that_remembers_it(recipe, tmp_path, capsys):
    path = write({**recipe, "rounds": 1, "engine": {"name": "serial", "threads": 640}}, tmp_path / "r.yaml")
    (tmp_path / "out").mkdir()
    words = ("compare", path, "--methods", "lora", "--seeds", 0, "--jobs", 1, "--out", tmp_path / "out")
    assert federa(*words) == 2
    assert list((tmp_path / "out").iterdir()) == []
    assert federa(*words, "engine.threads=1") == 0


def test_a_comparison_with_a_failed_run_says_so_in_its_status(recipe, tmp_path):
    path = write({**recipe, "rounds": 1, "max_update_norm": 1e-9}, tmp_path / "r.yaml")
    assert federa("compare", path, "--methods", "lora", "--seeds", 0, "--out", tmp_path / "out") == 1


def test_a_killed_run_is_one_line(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("federa.compare.execute._in_worker", _dies)
    made = comparison(recipe, tmp_path, skews=None, lrs=None, jobs=2)
    with pytest.raises(RoundFailedError, match="a run was killed"):
        compare_methods(made, tmp_path / "out", lambda line: None)


def _dies(recipe, folder):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "federa,lorra"}, "did you mean 'lora'"),
        ({"methods": "lora,lora"}, "different methods"),
        ({"methods": ""}, "grid.methods: expected at least one"),
        ({"seeds": ""}, "grid.seeds: expected at least one"),
        ({"targets": "0.9,0.9"}, "different targets"),
        ({"seeds": "0,x"}, r"grid\.seeds.*integer"),
        ({"seeds": "1,1"}, "different seeds"),
        ({"lrs": {"ft": "1e-3"}}, "'ft' is not among the methods federa, lora"),
        ({"lrs": {"lora": "fast"}}, r"grid\.lrs.*number"),
        ({"lrs": {"lora": "-1"}}, r"grid\.lrs.*greater than 0"),
        ({"skews": "dirichlett:1"}, "did you mean 'dirichlet'"),
        ({"skews": "iid:3"}, "iid takes no value"),
        ({"skews": "dirichlet:much"}, r"partition\.alpha"),
        ({"lrs": {"lora": "1e-3,1e-3"}}, "different rates for lora"),
        ({"reference": "bert"}, "unknown method 'bert'"),
        ({"tune": "guess"}, r"grid\.tune"),
        ({"tune_rounds": 0}, r"grid\.tune_rounds"),
        ({"jobs": 0}, r"grid\.jobs"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, changes, message):
    with pytest.raises(FederaError, match=message) as error:
        comparison(recipe, tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, ["seed=7"], "seed: a comparison has several; give --seeds"),
        ({}, ["method=ft"], "method: a comparison has several; give --methods"),
        ({}, ["method.name=ft"], "method.name: a comparison has several; give --methods"),
        ({"target": 0.8}, [], "target: a run of a comparison does not stop early"),
        ({"data": {"evaluate_on": "held_out"}}, [], "data.evaluate_on=held_out: rates are tuned on it"),
    ],
)
def test_what_a_comparison_settles_itself_is_not_for_its_recipe(recipe, tmp_path, changes, words, message):
    changes = {key: {**recipe[key], **value} if key == "data" else value for key, value in changes.items()}
    with pytest.raises(FederaError, match=message):
        Comparison.load([write({**recipe, **changes}, tmp_path / "recipe.yaml")], words)


def test_rates_of_the_command_line_join_those_of_the_file(recipe, tmp_path):
    grid = {"methods": ["federa", "lora", "ft"], "lrs": {"federa": [1e-3], "lora": [1e-3], "ft": [1e-4]}}
    path = write({**recipe, "grid": grid}, tmp_path / "recipe.yaml")
    made = Comparison.load([path], [], {"lrs": {"lora": "2e-3,4e-3"}})
    assert made.grid.lrs == {"federa": (1e-3,), "lora": (2e-3, 4e-3), "ft": (1e-4,)}
    fewer = Comparison.load([path], [], {"methods": "federa,lora"})
    assert fewer.grid.lrs == {"federa": (1e-3,), "lora": (1e-3,)}
    with pytest.raises(FederaError, match="'ft' is not among the methods"):
        Comparison.load([path], [], {"methods": "federa,lora", "lrs": {"ft": "1e-4"}})
    path = write({**recipe, "grid": {"lrs": {"lorra": [1e-3]}}}, tmp_path / "typo.yaml")
    with pytest.raises(FederaError, match="'lorra' is not among the methods"):
        Comparison.load([path], [], {"methods": "federa,lora"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("5", "expected keys and values, got 5"),
        ("[lora]", "expected keys and values"),
        ("{recipes: [1]}", "string"),
    ],
)
def test_a_section_that_is_none_is_named(tmp_path, section, message):
    (tmp_path / "r.yaml").write_text(f"grid: {section}\n")
    with pytest.raises(FederaError, match=message):
        Comparison.load([tmp_path / "r.yaml"])


def test_a_grid_in_one_of_several_recipes_is_not_dropped(recipe, tmp_path):
    one, two = (
        write({**recipe, **more}, tmp_path / name)
        for name, more in (("a.yaml", {}), ("b.yaml", {"grid": {}}))
    )
    with pytest.raises(FederaError, match=r"b\.yaml has one of its own"):
        Comparison.load([one, two])
    outer = write({"grid": {"recipes": ["b.yaml"]}}, tmp_path / "c.yaml")
    with pytest.raises(FederaError, match=r"b\.yaml has a grid of its own"):
        Comparison.load([outer])


def test_a_folder_that_is_something_else_is_left_alone(recipe, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FederaError, match="is no comparison"):
        compare_methods(comparison(recipe, tmp_path), tmp_path / "out", lambda line: None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    path = write(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setattr("federa.compare.time_estimate", lambda *args: pytest.fail("that takes long"))
    assert federa("compare", path, "--out", tmp_path / "out") == 2


def test_a_plan_counts_every_run(recipe, tmp_path):
    lines = comparison(recipe, tmp_path).describe()
    assert lines[-1] == "12 runs"
    assert sum(line.startswith("  tune") for line in lines) == 2


def test_a_dry_run_writes_nothing(recipe, tmp_path, capsys):
    path = write({**recipe, "rounds": 2}, tmp_path / "recipe.yaml")
    assert (
        federa(
            "compare", path, "--methods", "lora", "--lrs", "lora=1e-3", "--dry-run", "--out", tmp_path / "o"
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "3 runs" in out and "time expected" in out
    assert "lr 0.001" in out and "tune" not in out, "of one rate there is nothing to choose"
    assert not (tmp_path / "o").exists()


def test_a_slug_is_a_folder_everywhere(recipe):
    name = Setting("mail/news, natural author, microsoft/deberta", parse_config(recipe)).slug
    assert name == "mail-news-natural-author-microsoft-deberta"
    assert Grid().methods == ("federa", "lora", "adapter", "bitfit", "ft")
