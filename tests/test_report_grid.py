"""The page of a grid: right numbers, sound with cells missing, self-contained, the same bytes twice."""

from __future__ import annotations

import html as htmllib
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federa.report.bands import band
from federa.report.cells import ALL_SETTINGS, merged, read_grid
from federa.report.costs import facts, to_target
from federa.report.drift import drift, in_blocks
from federa.report.forest import by_setting, differences
from federa.report.grid import GridCell, Pair, Reached, write_grid_report
from federa.report.heat import heat_map
from federa.report.recipes import environment, unlike
from federa.report.scores import missing, results, sentence
from federa.types import FederaError
from test_report import CHROMIUM, FLAGS, check, curve_paths, make_run, read_rounds, write_rounds

LAYERS = [f"encoder.layer.{i}.attention.self.{name}" for i in range(3) for name in ("query", "value")]
RATES = {"federa": 3e-3, "lora": 1e-3, "ft": 1e-4}
SETTINGS = ("newsgroups20, dirichlet 0.1, minilm", "newsgroups20, dirichlet 1, minilm")


def make_cell(
    folder: Path, method: str = "federa", seed: int = 0, final: float = 0.6, rounds: int = 5, **changed: Any
) -> Path:
    """Write the run directory of a cell whose metric climbs to `final`."""
    changed = {"method": {"name": method, "rank": 4}, "seed": seed} | changed
    make_run(folder, rounds, **{"client": {"lr": RATES.get(method, 1e-3)}} | changed)
    records = read_rounds(folder)
    for record in records:
        record["accuracy"] = final * (1 - 0.5 ** record["round"]) / (1 - 0.5**rounds)
        record["seconds_round"] = 2.0 + seed
    write_rounds(folder, records)
    told = json.loads((folder / "result.json").read_text()) | {"final": final, "best": final}
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def write_drift(
    folder: Path, cosine: float, error: float | None, rounds: int = 5, layers: Any = LAYERS
) -> None:
    def figures(shift: float) -> dict[str, Any]:
        one = {"cosine": cosine + shift, "norm_mean": 1.0, "norm_spread": 0.2}
        return one | {"aggregation_error": error}

    lines = [
        {
            "round": r,
            "clients": 4,
            **figures(0.0),
            "layers": {n: figures(0.01 * i) for i, n in enumerate(layers)},
        }
        for r in range(1, rounds + 1)
    ]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def score_of(setting: int, method: str, seed: int) -> float:
    return {"federa": 0.62, "lora": 0.60, "ft": 0.55}.get(method, 0.5) + 0.1 * setting + 0.01 * seed


def make_cells(
    to: Path, settings: Any = SETTINGS, methods: Any = RATES, seeds: Any = (0, 1, 2), **changed: Any
) -> list[GridCell]:
    return [
        GridCell(
            setting,
            method,
            seed,
            make_cell(to / f"{i}-{j}-{seed}", method, seed, score_of(i, method, seed), **changed),
        )
        for i, setting in enumerate(settings)
        for j, method in enumerate(methods)
        for seed in seeds
    ]


def make_pairs(settings: Any = SETTINGS, methods: Any = ("lora", "ft")) -> list[Pair]:
    gap = {"lora": 0.02, "ft": 0.07}
    return [
        Pair(where, m, gap.get(m, 0.12), 0.004, gap.get(m, 0.12) - 0.01, gap.get(m, 0.12) + 0.01, 3, 3)
        for where in (ALL_SETTINGS, *settings)
        for m in methods
    ]


def make_reached(settings: Any = SETTINGS) -> list[Reached]:
    target = "90 % of full fine-tuning's best (0.61)"
    return [
        entry
        for where in settings
        for entry in (
            Reached(where, "federa", target, 3.0, 9e6, 6.5, 3, 3),
            Reached(where, "lora", target, 4.3333, 13e6, 9.5, 3, 3),
            Reached(where, "ft", target, None, None, None, 2, 3),
        )
    ]


def test_the_page_says_of_how_many_evaluations_a_score_is_the_mean(tmp_path: Path) -> None:
    for name, numbers, words in (
        ("one", (3, 3), "Accuracy as the mean of the last 3 evaluations, in points"),
        ("two", (1, 3), "Accuracy as the mean of the last 1 to 3 evaluations, in points"),
    ):
        cells = [
            cell
            for setting, mean_of in zip(SETTINGS, numbers, strict=True)
            for cell in make_cells(tmp_path / name / setting, settings=(setting,), final_mean_of=mean_of)
        ]
        page = write_grid_report("A grid", cells, [], [], tmp_path / f"{name}.html")
        assert words in " ".join(" ".join(check(page).text).split())


def rows_of(table: Any) -> dict[str, list[str]]:
    """The cells of a table's rows by the text of the first, which has a coloured marker."""
    return {re.sub(r"<[^>]*>\S* ?", "", str(row[0])).strip(): list(row[1:]) for row in table.rows}


def test_the_page_says_who_leads_and_by_how_much(tmp_path: Path) -> None:
    page = write_grid_report(
        "A <grid>", make_cells(tmp_path), make_pairs(), make_reached(), tmp_path / "deep" / "grid.html"
    )
    text = " ".join(" ".join(check(page).text).split())
    for words in (
        "A <grid>",
        "3 methods in 2 settings with 3 seeds each, newsgroups20, minilm throughout.",
        "FeDeRA leads with 68.0 points of accuracy on the mean over settings; its paired difference to LoRA, "
        "the second, is +2.0 points (95 % interval +1.0 to +3.0).",
        "Accuracy after the last round, in points",
        "mean over settings",
        "63.0 ± 1.0",
        "dirichlet 0.1",
        "Paired differences to FeDeRA",
        "All settings",
        "+6.0 to +8.0",
        "Partition of seed 0",
        "Its partition is the one of dirichlet 0.1.",
        "dirichlet 1: 90 % of full fine-tuning's best (0.61)",
        "not reached",
        "2 of 3",
        "Recipe: dirichlet 0.1",
        "name: some/tiny-model",
        "method.name",
        "hardware.cores",
        "Written by federa from 18 runs.",
    ):
        assert words in text
    assert "Update drift" not in text
    html = page.read_text()
    assert html.count("<svg") == 3 + 2 * 4 + 1
    assert [curve_paths(html, f"s{i}") for i in range(4)] == [2 * 4 + 3 * (i > 0) for i in range(3)] + [0]
    assert len(re.findall(r"<details[^>]* open", html)) == 2, "the first setting and the numbers"


def test_results_mark_the_best_and_say_how_many_seeds(tmp_path: Path) -> None:
    cells = make_cells(tmp_path)
    cells = [c for c in cells if not (c.setting == SETTINGS[0] and c.method == "lora")]
    cells = [c for c in cells if not (c.setting == SETTINGS[1] and c.method == "ft" and c.seed == 1)]
    grid = read_grid(cells, make_pairs(), [])
    table = results(grid)
    assert list(table.head) == ["method", "mean over settings", "dirichlet 0.1", "dirichlet 1"]
    assert rows_of(table) == {
        "FeDeRA": ["68.0", "63.0 ± 1.0", "73.0 ± 1.0"],
        "LoRA": ["–", "–", "71.0 ± 1.0"],
        "full fine-tuning": ["–", "56.0 ± 1.0", "66.0 ± 1.4 (2 of 3)"],
    }
    assert table.best == {(0, 2), (0, 3)}
    assert missing(grid) == [
        "LoRA in dirichlet 0.1: no finished run.",
        "Full fine-tuning in dirichlet 1: 2 of 3 seeds finished.",
    ]
    assert "FeDeRA leads with 68.0" in sentence(grid, make_pairs())
    assert "no other method finished every run" in sentence(grid, make_pairs())
    heat = heat_map(grid)
    assert heat is not None and "66.0" not in str(heat.rows), "a mean of two seeds beside those of three"


def test_what_failed_for_all_is_said_and_no_mean_goes_over_the_rest(tmp_path: Path) -> None:
    cells = [
        replace(c, folder=None) if c.setting == SETTINGS[0] or c.seed == 2 else c
        for c in make_cells(tmp_path)
    ]
    grid = read_grid(cells, make_pairs(), [])
    assert missing(grid)[0] == f"{SETTINGS[0]}: no finished run of any method; it is not on this page."
    assert sum(note.endswith(": 2 of 3 seeds finished.") for note in missing(grid)) == 3
    assert "none leads over all" in sentence(grid, make_pairs())
    check(write_grid_report("A grid", cells, make_pairs(), [], tmp_path / "grid.html"))


def test_the_first_method_is_the_one_that_pairs_do_not_name(tmp_path: Path) -> None:
    cells = [c for c in make_cells(tmp_path) if (c.setting, c.method) != (SETTINGS[0], "federa")]
    grid = read_grid(cells, make_pairs(), [])
    assert grid.methods == ("federa", "lora", "ft"), "though it failed where the first cell is"
    assert read_grid(cells, [], []).methods == ("federa", "lora", "ft"), "another setting tells the order"


def test_a_leader_that_is_not_the_first_method(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, methods=("ft", "lora", "federa"))
    pairs = [Pair(ALL_SETTINGS, "federa", -0.07, 0.01, -0.09, 0.01, 0, 6)]
    pairs += [Pair(ALL_SETTINGS, "lora", -0.05, 0.01, -0.08, -0.02, 0, 6)]
    told = sentence(read_grid(cells, pairs, []), pairs)
    assert told.endswith(
        "FeDeRA leads with 68.0 points of accuracy on the mean over settings; LoRA follows with 66.0. Its paired "
        "difference to full fine-tuning is +7.0 points (95 % interval −1.0 to +9.0, which includes zero)."
    )
    two = [cell for cell in cells if cell.method != "federa"]
    told = sentence(read_grid(two, pairs[1:], []), pairs[1:])
    assert told.endswith("to full fine-tuning, the second, is +5.0 points (95 % interval +2.0 to +8.0).")


def test_nobody_finished_everywhere(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, methods=("federa", "lora"), seeds=(0,))
    cells = [cells[0], cells[3]]
    page = write_grid_report("t", cells, [], [], tmp_path / "grid.html")
    text = " ".join(check(page).text)
    assert "No method finished every run, so none leads over all settings." in " ".join(text.split())
    assert "with 1 seed" in text
    assert "none" in text
    assert "Paired differences" not in text
    assert "Cost to a target" not in text


def test_the_heat_map_shades_what_is_behind(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, seeds=(0,))
    found = heat_map(read_grid(cells, [], []))
    assert found is not None
    assert [name for name, _ in found.rows] == ["dirichlet 0.1", "dirichlet 1", "mean over settings"]
    row = found.rows[0][1]
    assert [(c.value, c.behind, c.best) for c in row] == [
        ("62.0", "best", True),
        ("60.0", "−2.0", False),
        ("55.0", "−7.0", False),
    ]
    assert [float(c.shade) for c in row] == [0.0, pytest.approx(0.55 * 2 / 7, abs=1e-3), 0.55]
    assert found.most == "7.0"
    assert heat_map(read_grid(cells[:1], [], [])) is None


def test_one_cell_is_a_grid(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=("here",), methods=("federa",), seeds=(4,))
    text = " ".join(check(write_grid_report("t", cells, [], [], tmp_path / "g.html")).text)
    assert "1 method on here with 1 seed. FeDeRA leads with 66.0 points of accuracy." in text
    assert "Partition of seed 4" in text
    with pytest.raises(FederaError, match="at least one"):
        write_grid_report("t", [], [], [], tmp_path / "g.html")
    with pytest.raises(FederaError, match="not a run directory"):
        write_grid_report("t", [GridCell("a", "b", 0, tmp_path)], [], [], tmp_path / "g.html")


def test_pairs_in_numbers(tmp_path: Path) -> None:
    grid = read_grid(make_cells(tmp_path, seeds=(0,)), make_pairs(), [])
    pairs = [
        Pair(SETTINGS[0], "ft", 0.0, math.nan, math.nan, math.nan, 0.5, 1),
        Pair(SETTINGS[0], "lora", -0.0002, 0.01, -0.02, 0.03, 1, 3),
        Pair(ALL_SETTINGS, "ft", 0.07, 0.01, 0.01, 0.09, 6, 6),
    ]
    groups = by_setting(grid, pairs)
    assert [(name, [p.method for p in rows]) for name, rows in groups.items()] == [
        ("All settings", ["ft"]),
        ("dirichlet 0.1", ["lora", "ft"]),
    ]
    table = differences(grid, groups)
    assert [list(row[1:]) for row in table.rows] == [
        ["+7.0", "1.0", "+1.0 to +9.0", "6 of 6"],
        ["+0.0", "1.0", "−2.0 to +3.0", "1 of 3"],
        ["+0.0", "–", "–", "0.5 of 1"],
    ]
    assert table.best == {(0, 1), (0, 3)}
    assert table.groups == {0: "All settings", 1: "dirichlet 0.1"}


def test_one_setting_is_not_shown_twice(tmp_path: Path) -> None:
    grid = read_grid(make_cells(tmp_path, settings=("here",)), make_pairs(("here",)), [])
    assert list(by_setting(grid, make_pairs(("here",)))) == ["here"]
    assert list(by_setting(grid, make_pairs(()))) == ["All settings"]
    assert list(results(grid).head) == ["method", "here"]


def test_what_it_costs(tmp_path: Path) -> None:
    grid = read_grid(make_cells(tmp_path), [], [])
    table = facts(grid, grid.setting(SETTINGS[0]))
    assert rows_of(table)["LoRA"] == ["0.001", "12 k", "1 %", "3 MB", "3.00 s", "5", "60.0 · 61.0 · 62.0"]
    table = to_target(grid, make_reached())
    assert table.groups[3] == "dirichlet 1: 90 % of full fine-tuning's best (0.61)"
    assert table.best == {(row, column) for row in (0, 3) for column in (1, 2, 3)}
    assert rows_of(table)["LoRA"] == ["4.3", "13 MB", "9.50 s", "3 of 3"]
    assert rows_of(table)["full fine-tuning"] == ["not reached", "–", "–", "2 of 3"]


def test_bands_reach_over_seeds_where_all_measured() -> None:
    line = band(1, [{1: 2.0, 2: 4.0, 3: 9.0}, {1: 4.0, 2: 4.0}], [{1: 10, 2: 20, 3: 30}, {1: 20, 2: 40}])
    assert (line.slot, line.x.tolist(), line.y.tolist()) == (1, [15.0, 30.0], [3.0, 4.0])
    assert line.low is not None
    assert line.high is not None
    assert (line.low.tolist(), line.high.tolist()) == ([2.0, 4.0], [4.0, 4.0])
    alone = band(0, [{5: 1.0}])
    assert (alone.x.tolist(), alone.low) == ([5.0], None)
    assert band(0, [{1: 1.0}, {2: 1.0}]).x.size == 0


def test_drift_by_round_and_by_layer(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=("a", "b"), seeds=(0, 1))
    for cell in cells:
        if cell.setting == "a":
            whole = cell.method == "ft"
            layers = (
                ["embeddings.word", *LAYERS, "encoder.layer.2.output", "pooler.dense"] if whole else LAYERS
            )
            write_drift(cell.folder, 0.4 + 0.1 * cell.seed, None if whole else 0.05, layers=layers)
    grid = read_grid(cells, [], [])
    assert drift(grid, "b") is None
    found = drift(grid, "a")
    assert found is not None
    assert [c.title for c in found.curves] == [
        f"{title}, by {by}"
        for title in ("Cosine to the mean update", "Spread of the updates' lengths", "Aggregation error")
        for by in ("round", "layer")
    ]
    rounds, layers, errors = (found.curves[i].figure.axes[0] for i in (0, 1, 4))
    assert len(rounds.lines) == 3
    assert np.asarray(rounds.lines[0].get_ydata()).tolist() == pytest.approx([0.45] * 5)
    assert len(errors.lines) == 2, "a method without factors has no aggregation error"
    assert np.asarray(layers.lines[0].get_xdata()).tolist() == [1, 2, 3, 4, 5, 6]
    assert np.asarray(layers.lines[2].get_xdata()).tolist() == list(range(9))
    assert [label.get_text() for label in layers.get_xticklabels()] == ["0", "1", "2"]
    assert layers.get_xticks().tolist() == [1, 3, 5]
    assert found.layers is not None
    assert found.layers.rows[0] == ["embeddings.word", "0", "–", "–", "0.450"]
    html = write_grid_report("t", cells, [], [], tmp_path / "g.html")
    text = " ".join(check(html).text)
    assert "Update drift" in text
    assert html.read_text().count("<svg") == 2 * 4 + 1 + 6


def test_damaged_diagnostics_are_left_out(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=("a",), seeds=(0,))
    (cells[0].folder / "diagnostics.jsonl").write_text(
        '{"round": 1, "cosine": "x", "layers": 3}\n{"round": 2'
    )
    (cells[1].folder / "diagnostics.jsonl").write_text('{"round": 1, "cosine": NaN, "layers": {"a": 1}}\n')
    (cells[2].folder / "diagnostics.jsonl").write_text('{"round": 1, "cosine": 0.5}\n')
    found = drift(read_grid(cells, [], []), "a")
    assert found is not None
    assert [curve.title for curve in found.curves] == ["Cosine to the mean update, by round"]
    check(write_grid_report("t", cells, [], [], tmp_path / "g.html"))


def test_layers_of_a_name_share_a_place_and_blocks_stay_together() -> None:
    own = [f"layer.{i}.adapter" for i in range(2)]
    whole = ["embed", *(f"layer.{i}.{name}" for i in range(2) for name in "qv"), "pooler"]
    expected = [
        "embed",
        "layer.0.q",
        "layer.0.v",
        "layer.0.adapter",
        "layer.1.q",
        "layer.1.v",
        "layer.1.adapter",
    ]
    found = in_blocks([own, whole])
    assert found[0] == "embed"
    assert found[-1] == "pooler"
    assert {*found[1:4]} == {*expected[1:4]}
    assert {*found[4:7]} == {*expected[4:7]}
    assert found.index("layer.0.q") < found.index("layer.0.v")


def test_lists_are_merged_in_order() -> None:
    assert merged([["q", "v"], ["e", "q", "k", "v", "p"]]) == ["e", "q", "k", "v", "p"]
    assert merged([["q", "x", "v"], ["q", "k", "v"]]) == ["q", "k", "x", "v"]
    assert merged([[], []]) == []


def test_recipes_and_environment_are_said_once(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, seeds=(0, 1))
    for cell in cells[:3]:
        told = {"torch": "2.14.0", "hardware": {"cores": 2}, "seconds_start": {"read": cell.seed + 0.5}}
        (cell.folder / "environment.json").write_text(json.dumps(told))
    grid = read_grid(cells, [], [])
    rows = dict(environment(grid).rows)
    assert rows == {"torch": "2.14.0 (3 runs); 2.13.0 (9 runs)", "hardware.cores": "2"}
    table = unlike(grid)
    assert table is not None
    assert table.rows == [["client.lr", "0.003", "0.001", "0.0001"], ["method.name", "federa", "lora", "ft"]]


def test_a_loss_that_is_not_finite_is_a_gap_and_is_said(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=("a",))
    records = read_rounds(cells[0].folder)
    records[2]["loss"] = math.nan
    write_rounds(cells[0].folder, records)
    page = write_grid_report("t", cells, [], [], tmp_path / "g.html")
    text = " ".join(check(page).text)
    assert "FeDeRA in a, seed 0: The loss was not a finite number in round 3." in text
    assert not re.search(r' d="[^"]*(nan|inf)', page.read_text())


def test_evaluating_on_what_is_trained_on_is_said_once_a_setting(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=("a", "b"), methods=("federa", "lora"))
    for cell in cells:
        if cell.setting == "b":
            held = json.loads((cell.folder / "partition.json").read_text())
            held |= {"evaluation_examples": 1200, "evaluation_examples_trained_on": 1100}
            (cell.folder / "partition.json").write_text(json.dumps(held))
    (note,) = missing(read_grid(cells, [], []))
    assert note == (
        "b: 1\u2009100 of 1\u2009200 evaluation examples read to the model like training examples: scores flatter."
    )


def test_many_notes_are_counted(tmp_path: Path) -> None:
    cells = make_cells(
        tmp_path, settings=[f"s{i}" for i in range(11)], methods=("federa", "lora"), seeds=(0,)
    )
    notes = missing(read_grid([c for c in cells if c.method == "federa" or c.setting == "s0"], [], []))
    assert len(notes) == 8
    assert notes[-1] == "3 more notes like these."


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<b onload=\"x('&')\">$\\frac$</b>"
    folder = make_cell(tmp_path / "a", evil, model={"name": evil}, task={"name": evil})
    other = make_cell(tmp_path / "b", "lora")
    write_drift(folder, 0.5, 0.1, layers=[evil, f"{evil}.3.x"])
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    (folder / "result.json").write_text(json.dumps({"metric": evil, "final": 0.5}))
    cells = [GridCell(evil, evil, 0, folder), GridCell(evil, "lora", 0, other)]
    pairs = [Pair(evil, "lora", 0.1, math.nan, math.nan, math.nan, 1, 1)]
    reached = [Reached(evil, evil, evil, None, None, None, 0, 1)]
    page = write_grid_report(evil, cells, pairs, reached, tmp_path / "g.html")
    assert "b" not in check(page).tags
    assert "<b " not in page.read_text()


def test_bytes_are_the_same_twice(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, settings=SETTINGS[:1], seeds=(0, 1))
    for cell in cells:
        write_drift(cell.folder, 0.4, 0.05)
    given = ("t", cells, make_pairs(SETTINGS[:1]), make_reached(SETTINGS[:1]))
    first = write_grid_report(*given, tmp_path / "1.html").read_bytes()
    assert write_grid_report(*given, tmp_path / "2.html").read_bytes() == first


def test_twelve_settings_and_nine_methods(tmp_path: Path) -> None:
    settings = [f"data{i // 3}, dirichlet {(0.1, 1, 10)[i % 3]}, model{i % 2}" for i in range(12)]
    methods = ["federa", "lora", "ft", "bitfit", "adapter", *(f"plugin{i}" for i in range(4))]
    cells = make_cells(tmp_path, settings, methods, seeds=(0,), rounds=2)
    pairs = make_pairs(settings, methods[1:])
    page = write_grid_report("t", cells, pairs, make_reached(settings), tmp_path / "g.html")
    html = page.read_text()
    check(page)
    assert html.count("<svg") == 13 + 12 * 4 + 1
    assert html.count('class="part"') == 12
    assert len(re.findall(r"<details[^>]* open", html)) == 1, "so many numbers are folded away"


def measured(page: Path, width: int) -> dict[str, Any]:
    """Return what a browser makes of the page at a width: its own width, and what sticks out or cannot be seen."""
    script = """
      const frame = document.querySelector('iframe');
      frame.onload = () => {
        const inside = frame.contentDocument, root = inside.documentElement;
        const boxes = [...inside.querySelectorAll('svg')].filter(s => !s.closest('details:not([open])'))
          .map(s => s.getBoundingClientRect());
        const out = [...inside.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
          && !e.closest('details:not([open])') && e.getBoundingClientRect().right > root.clientWidth + 1);
        document.body.dataset.found = JSON.stringify({client: root.clientWidth, scroll: root.scrollWidth,
          svgs: boxes.length, small: boxes.filter(b => b.width < 250 || b.height < 60).length,
          tall: [...inside.querySelectorAll('tr')].filter(r => r.getBoundingClientRect().height > 110).length,
          out: out.map(e => e.tagName + '.' + e.className)});
      };
    """
    frame = page.with_name(f"measure{width}.html")
    frame.write_text(
        f'<body style="margin:0"><iframe style="width:{width}px;height:900px;border:0" '
        f'src="{page.name}"></iframe><script>{script}</script></body>'
    )
    shown = subprocess.run(
        [
            str(CHROMIUM),
            *(f"--{flag}" for flag in FLAGS),
            "--allow-file-access-from-files",
            f"--user-data-dir={page.with_name(f'profile{width}')}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            frame.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    found = re.search(r'data-found="([^"]*)"', shown)
    assert found is not None
    return dict(json.loads(htmllib.unescape(found[1])))


def pictured(page: Path, width: int, scheme: str, height: int = 3000) -> np.ndarray:
    """Return a screenshot as `(height, width, 3)` bytes."""
    from matplotlib.image import imread

    # A frame, because a window of headless Chromium is at least 500 pixels wide.
    frame = page.with_name(f"frame{width}.html")
    style = f"width:{width}px;height:{height}px;border:0"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe></body>')
    shot = page.with_name(f"{scheme}{width}.png")
    subprocess.run(
        [
            str(CHROMIUM),
            *(f"--{flag}" for flag in FLAGS),
            f"--user-data-dir={page.with_name(f'{scheme}-profile{width}')}",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--window-size={max(width, 500)},{height}",
            f"--screenshot={shot}",
            frame.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return np.asarray(np.round(imread(shot)[:, :width, :3] * 255).astype(int))


@pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: no browser to take a screenshot with"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    settings = [f"a-data-set-with-a-long-name, dirichlet {alpha}, model" for alpha in (0.1, 1)]
    cells = make_cells(tmp_path, settings, ("federa", "lora", "ft", "bitfit", "adapter", "plugin"), (0, 1))
    for cell in cells:
        write_drift(cell.folder, 0.4 + 0.1 * cell.seed, 0.05)
    others = ("lora", "ft", "bitfit", "adapter", "plugin")
    page = write_grid_report(
        "A grid", cells, make_pairs(settings, others), make_reached(settings), tmp_path / "grid.html"
    )
    found = measured(page, width)
    assert found["scroll"] <= found["client"] <= width
    assert found["out"] == []
    assert found["tall"] == 0, "no name is squeezed into a column of letters"
    assert (found["svgs"], found["small"]) == (3 + 4 + 1 + 6, 0)
    grounds = {"light": "#ffffff", "dark": "#14171a"}
    curves = {"light": (0, 114, 178), "dark": (74, 168, 224)}
    shades = {"light": (0x2A, 0x78, 0xB0), "dark": (0x3B, 0xA8, 0xF6)}
    for scheme, ground in grounds.items():
        picture = pictured(page, width, scheme)
        paper = np.array([int(ground[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(picture[2, 2] - paper).max() <= 2
        assert (np.abs(picture - curves[scheme]).max(axis=2) <= 4).sum() > 200, "curves in their colour"
        strongest = np.round(0.55 * np.array(shades[scheme]) + 0.45 * paper)
        assert (np.abs(picture - strongest).max(axis=2) <= 3).sum() > 300, "the heat map is shaded"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: no browser to print with")
def test_print_opens_what_is_folded(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, seeds=(0,))
    page = write_grid_report("t", cells, [], [], tmp_path / "grid.html")
    folded = page.read_text()
    opened = tmp_path / "opened.html"
    opened.write_text(re.sub(r"<details(?![^>]* open)", "<details open", folded))
    pages = []
    for html in (page, opened):
        to = html.with_suffix(".pdf")
        subprocess.run(
            [
                str(CHROMIUM),
                *(f"--{flag}" for flag in FLAGS),
                f"--user-data-dir={tmp_path / 'print'}",
                f"--print-to-pdf={to}",
                html.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        pages.append(len(re.findall(rb"/Type\s*/Page\b", to.read_bytes())))
    assert pages[0] == pages[1] > 2
