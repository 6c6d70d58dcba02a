"""`federa compare`: same partitions and cohorts for all, tuning off the test set, tables that add up."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from federa.compare import COLUMNS, Comparison, compare_methods
from federa.config import parse_config
from federa.types import FederaError
from small import small_recipe


def comparison(recipe: dict[str, Any], **changes: Any) -> Comparison:
    words: dict[str, Any] = {
        "methods": "federa,lora,bitfit",
        "seeds": "0,1",
        "lrs": ["lora=1e-2,1e-6"],
        "tune_rounds": 2,
    }
    words |= changes
    return Comparison.parse(parse_config(recipe), **words)


@pytest.fixture(scope="module")
def folder(
    encoder: Callable[[str], Path], train_csv: Path, test_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    to = tmp_path_factory.mktemp("compare")
    compare_methods(comparison(small_recipe(encoder("bert"), train_csv, test_csv)), to, lambda line: None)
    return to


def test_cells_are_written_with_the_columns_of_the_contract(folder: Path) -> None:
    with (folder / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert [(r["method"], r["seed"]) for r in rows] == [
        (m, s) for s in "01" for m in ("federa", "lora", "bitfit")
    ]
    for row in rows:
        result = json.loads(
            (folder / "cells" / f"{row['method']}-seed{row['seed']}" / "result.json").read_text()
        )
        assert float(row["metric"]) == result["final"]
        assert float(row["bytes"]) == result["bytes_up"] + result["bytes_down"]
        assert row["skew"] == "dirichlet 0.5"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2e-4, {"federa": 2e-4, "ft": 2e-4}),
        (3e-3, {"federa": 3e-3, "ft": 1e-4}),
        (None, {"federa": 3e-3, "ft": 1e-4}),
    ],
)
def test_a_rate_that_the_recipe_gives_is_every_methods(
    given: float | None,
    expected: dict[str, float],
    encoder: Callable[[str], Path],
    train_csv: Path,
    test_csv: Path,
) -> None:
    recipe = small_recipe(encoder("bert"), train_csv, test_csv)
    recipe["client"] = {**recipe["client"], "lr": given}
    compared = comparison(recipe, methods="federa,ft", lrs=[])
    assert {m: compared.cell(m, 0, None).client.lr for m in compared.methods} == expected
    assert {m: compared.cell(m, 0, 0.5).client.lr for m in compared.methods} == dict.fromkeys(expected, 0.5)
    for method, lr in expected.items():
        assert f"run   {method:10} seed 1, lr {lr:g}, {compared.config.rounds} rounds" in compared.describe()


def test_all_methods_meet_the_same_clients(folder: Path) -> None:
    for seed in "01":
        parts, cohorts = set(), set()
        for method in ("federa", "lora", "bitfit"):
            cell = folder / "cells" / f"{method}-seed{seed}"
            parts.add((cell / "partition.json").read_text())
            records = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
            cohorts.add(json.dumps([sorted(r["verdicts"]) for r in records]))
        assert len(parts) == len(cohorts) == 1


def test_tuning_never_sees_the_test_set_and_its_choice_is_used(folder: Path) -> None:
    assert sorted(p.name for p in (folder / "tune").iterdir()) == ["lora-lr0.01", "lora-lr1e-06"]
    scores = {}
    for run in (folder / "tune" / "lora-lr0.01", folder / "tune" / "lora-lr1e-06"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["data"]["evaluate_on"] == "validation"
        assert config["rounds"] == 2
        scores[config["client"]["lr"]] = json.loads((run / "result.json").read_text())["final"]
    best = max(scores, key=lambda lr: scores[lr])
    used = yaml.safe_load((folder / "cells" / "lora-seed1" / "config.yaml").read_text())
    assert used["client"]["lr"] == best
    assert used["data"]["evaluate_on"] == "test"


def test_tables_hold_mean_spread_and_paired_difference(folder: Path) -> None:
    with (folder / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = {m: [100 * float(r["metric"]) for r in rows if r["method"] == m] for m in ("federa", "lora")}
    lines = (folder / "table.md").read_text().splitlines()
    mean = sum(scores["lora"]) / 2
    spread = abs(scores["lora"][0] - scores["lora"][1]) / 2**0.5
    lora = next(line for line in lines if line.startswith("| lora"))
    assert f"{mean:.1f} ± {spread:.1f}" in lora
    gap = sum(a - b for a, b in zip(scores["lora"], scores["federa"], strict=True)) / 2
    assert f"{gap:+.1f} ± " in lora
    latex = (folder / "table.tex").read_text()
    assert latex.count(r"\\") == 4
    assert r"$\pm$" in latex
    page = (folder / "report.html").read_text()
    assert all(method in page for method in ("FeDeRA", "LoRA", "BitFit"))


def test_finished_cells_are_not_run_again(folder: Path, recipe: dict[str, Any]) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    compare_methods(comparison(recipe), folder, lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == before


def test_a_method_that_diverges_is_shown_as_failed(recipe: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    recipe["max_update_norm"] = 1e-9  # every update is rejected
    compare_methods(comparison(recipe, lrs=[], methods="federa"), tmp_path, said.append)
    assert "failed" in (tmp_path / "table.md").read_text()
    assert "min_success" in said[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "federa,lorra"}, "did you mean 'lora'"),
        ({"methods": "lora,lora"}, "different methods"),
        ({"seeds": "0,x"}, "whole numbers"),
        ({"lrs": ["ft=1e-3"]}, "not among --methods"),
        ({"lrs": ["lora=fast"]}, "METHOD=LR"),
    ],
)
def test_mistakes_are_named(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FederaError, match=message):
        comparison(recipe, **changes)


def test_a_plan_names_every_run(recipe: dict[str, Any]) -> None:
    lines = comparison(recipe).describe()
    assert lines[-1] == "8 runs"
    assert sum(line.startswith("tune") for line in lines) == 2
