"""What several comparisons say together: repeats are averaged, methods stand at their best rate, means say of what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def call(script, *words):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_the_results_in_the_documentation_are_read():
    results = BENCHMARKS.parent / "docs" / "results"
    files = [file for where in ("", "skews/", "head/") for file in results.glob(f"{where}*.csv")]
    out = call("overall.py", *files, "--settings", "dirichlet-")
    page = (results.parent / "results.md").read_text()
    scores = [cell for line in out.splitlines()[2:14] for cell in line.split(" | ")[2:]]
    assert len(scores) == 12 * 5
    missing = [cell for cell in scores if cell.rstrip(" |") and cell.strip("*| ") not in page]
    assert not missing, "docs/results.md has other figures"
