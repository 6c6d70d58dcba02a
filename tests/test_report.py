"""The page of a run: sound whatever the run directory holds, self-contained, the same bytes twice."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml

from federa.report.load import load_run
from federa.report.naming import headline, labels
from federa.report.page import write_report
from federa.report.partition import partition_figure
from federa.report.svg import inline_svg, save_figure
from federa.report.tables import comparison, rejections, sizes_table, tiles
from federa.report.tables import warnings as notes
from federa.report.words import byte_unit, clip, count, listing, plural, rough, size_words, time_words
from federa.types import FederaError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "no-first-run",
    "hide-scrollbars",
)
GROUPS = ["business", "politics", "sport"]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checker(HTMLParser):
    """Collects what a browser would load or stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
                self.urls.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: Path) -> Checker:
    """Parse a page, and hold it to what every page must be."""
    html = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.errors
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in checker.urls)
    references = re.findall(r"url\(([^)]*)\)", html)
    assert all(url.startswith("#") and url[1:] in checker.ids for url in references)
    assert all(url[1:] in checker.ids for url in checker.urls if url.startswith("#"))
    assert "@import" not in html
    assert "<script" not in html
    return checker


def make_run(folder: Path, rounds: int = 6, clients: int = 8, finished: bool = True, **changed: Any) -> Path:
    """Write a run directory with plausible contents; `changed` replaces keys of the recipe."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    counts = rng.multinomial(60, rng.dirichlet([0.3] * len(GROUPS), size=clients))
    config: dict[str, Any] = {
        "seed": 0,
        "rounds": rounds,
        "cohort": 4,
        "target": 0.5,
        "model": {"name": "some/tiny-model"},
        "task": {"name": "classification"},
        "method": {"name": "federa", "rank": 4},
        "partition": {"name": "dirichlet", "clients": clients, "alpha": 0.3},
    }
    config |= changed
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "hardware": {"cores": 2}}))
    partition = {"client_sizes": [60] * clients, "groups": GROUPS, "counts": counts.tolist()}
    (folder / "partition.json").write_text(json.dumps(partition))
    records = [
        {
            "round": r,
            "loss": 2.0 / r,
            "accuracy": 1 - 0.8 / r,
            "clients": 4,
            "rejected": 0,
            "verdicts": {str(c): "ok" for c in range(4)},
            "bytes_up": 1_000_000,
            "bytes_down": 2_000_000,
            "examples": 240,
            "seconds_train": 3.5,
            "seconds_round": 2.0,
        }
        for r in range(1, rounds + 1)
    ]
    write_rounds(folder, records)
    if finished:
        (folder / "result.json").write_text(json.dumps(result(rounds)))
    return folder


def result(rounds: int) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "final": 0.8667,
        "best": 0.8667,
        "best_round": rounds,
        "rounds": rounds,
        "trainable_parameters": 12_000,
        "travelling_parameters": 11_000,
        "total_parameters": 1_200_000,
        "bytes_up": 1_000_000 * rounds,
        "bytes_down": 2_000_000 * rounds,
        "seconds_start": 1.5,
        "seconds_train": 3.5 * rounds,
        "seconds_total": 2.0 * rounds + 1.5,
        "per_client": {"mean": 0.85, "p10": 0.7, "worst": 0.55},
        "target": {"value": 0.5, "round": 2, "seconds": 4.0, "bytes": 6_000_000},
    }


def write_rounds(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve_paths(html: str, colour: str) -> int:
    """Count the lines (paths that are not filled) drawn in a colour of the palette."""
    return len(re.findall(rf'style="fill: none; [^"]*stroke: var\(--{colour}\)', html))


def test_one_run_says_what_ran_and_its_figures(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "a")], tmp_path / "deep" / "report.html")
    text = " ".join(check(page).text)
    for words in (
        "FeDeRA on tiny-model",
        "Rank 4 · classification on the embedded data · 8 clients, 4 a round · Dirichlet skew, α = 0.3",
        "0.8667",
        "round 6 of 6",
        "1 % of 1.2 M · 11 k travel",
        "18 MB",
        "6 MB up · 12 MB down",
        "13.5 s",
        "mean 0.8500 · 10th percentile 0.7000",
        "hardware.cores",
        "name: some/tiny-model",
        "business",
    ):
        assert words in text
    html = page.read_text()
    assert curve_paths(html, "s0") == 4
    assert html.count("<svg") == 5
    assert "not finished" not in text.lower()


def test_several_runs_share_axes_and_a_table(tmp_path: Path) -> None:
    methods = ["federa", "lora", "adapter"]
    folders = [make_run(tmp_path / m, method={"name": m, "rank": 4}) for m in methods]
    better = result(6) | {"final": 0.95, "per_client": None, "target": None}
    (folders[1] / "result.json").write_text(json.dumps(better))
    page = write_report(folders, tmp_path / "report.html")
    checker = check(page)
    text, html = " ".join(checker.text), page.read_text()
    assert "FeDeRA, LoRA and adapters compared on tiny-model" in text
    assert [curve_paths(html, f"s{i}") for i in range(4)] == [4, 4, 4, 0]
    assert html.count("<svg") == 5, "a partition that runs share is drawn once"
    assert "method.name" in text
    table = comparison([load_run(f) for f in folders], methods)
    assert (1, 1) in table.best
    assert (0, 1) not in table.best
    assert not any(column == 4 for _, column in table.best), "no best among equals"
    assert table.rows[0][-1] == "round 2, 6 MB"
    assert table.rows[1][-1] == "–"


def test_a_different_partition_is_drawn_for_each(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", clients=5)]
    page = write_report(folders, tmp_path / "report.html")
    check(page)
    assert page.read_text().count("<svg") == 6


def test_twenty_runs_are_told_apart_and_drawn(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"r{seed}", rounds=2, seed=seed) for seed in range(20)]
    page = write_report(folders, tmp_path / "report.html")
    check(page)
    html = page.read_text()
    assert sum(curve_paths(html, f"s{i}") for i in range(8)) == 4 * 20
    assert all(f"FeDeRA · seed {seed}" in html for seed in range(20))


def test_bytes_are_the_same_twice_and_matplotlib_is_left_alone(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    before = dict(mpl.rcParams)
    first = write_report(folders, tmp_path / "1.html").read_bytes()
    assert write_report(folders, tmp_path / "2.html").read_bytes() == first
    assert dict(mpl.rcParams) == before


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<b onload=\"x('&')\">$\\frac$</b>"
    folder = make_run(tmp_path / "a", method={"name": evil}, model={"name": evil}, task={"name": evil})
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    partition = {"client_sizes": [3, 4], "groups": [evil, "\x00$x\n"], "counts": [[1, 2], [4, 0]]}
    (folder / "partition.json").write_text(json.dumps(partition))
    records = read_rounds(folder)
    records[0] |= {"verdicts": {evil: evil}, "rejected": 1}
    write_rounds(folder, records)
    html = write_report([folder], tmp_path / "report.html")
    assert "b" not in check(html).tags
    assert "<b " not in html.read_text()
    check(write_report([folder, make_run(tmp_path / "b")], tmp_path / "two.html"))


def test_nan_loss_is_a_gap_and_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    records = read_rounds(folder)
    records[2]["loss"] = math.nan
    records[3]["accuracy"] = math.inf
    write_rounds(folder, records)
    page = write_report([folder], tmp_path / "report.html")
    text = " ".join(check(page).text)
    assert "The loss was not a finite number in round 3." in text
    assert "Accuracy was not a finite number in round 4." in text
    assert not re.search(r' d="[^"]*(nan|inf)', page.read_text())
    for record in records:
        record["loss"] = math.nan
    write_rounds(folder, records)
    assert "nothing recorded yet" in write_report([folder], tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("repeats", "said"), [(0, False), (2, False), (3, True), (200, True)])
def test_evaluating_on_what_is_trained_on_is_said(tmp_path: Path, repeats: int, said: bool) -> None:
    folder = make_run(tmp_path / "a")
    held = json.loads((folder / "partition.json").read_text())
    held |= {"evaluation_examples": 200, "evaluation_examples_trained_on": repeats}
    (folder / "partition.json").write_text(json.dumps(held))
    note = f"{repeats} of 200 evaluation examples read to the model like training examples: scores flatter."
    assert (note in " ".join(check(write_report([folder], tmp_path / "report.html")).text)) == said


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("finished", [True, False])
def test_few_rounds(tmp_path: Path, rounds: int, finished: bool) -> None:
    folder = make_run(tmp_path / "a", rounds=rounds, finished=finished)
    page = write_report([folder], tmp_path / "report.html")
    text = " ".join(check(page).text)
    assert ("nothing recorded yet" in text) == (rounds == 0)
    assert ("Not finished" in text) != finished


def test_an_unfinished_run_takes_its_figures_from_its_rounds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rounds=4, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "lo')  # the run was killed here
    run = load_run(folder)
    found = {tile.label: (tile.value, tile.note) for tile in tiles(run)}
    assert found["Final accuracy"] == ("0.8000", "")
    assert found["Best accuracy"] == ("0.8000", "round 4 of 4")
    assert found["Bytes sent"] == ("12 MB", "4 MB up · 8 MB down")
    assert found["Time"][0] == "8.00 s"
    assert notes(run) == ["Not finished: 4 rounds of 4 recorded."]


def test_a_final_score_says_of_how_many_evaluations_it_is_the_mean(tmp_path: Path) -> None:
    for finished, rounds, note in (
        (True, 4, "mean of the last 3 evaluations"),
        (True, 2, "mean of the last 2 evaluations"),
        (False, 4, ""),
    ):
        folder = make_run(tmp_path / f"{finished}-{rounds}", rounds, finished=finished, final_mean_of=3)
        assert next(t.note for t in tiles(load_run(folder)) if t.label.startswith("Final")) == note


def test_only_a_recipe_gives_a_page_even_an_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    page = write_report([folder, folder], tmp_path / "report.html")
    assert "nothing recorded yet" in " ".join(check(page).text)
    for name in ("metrics.jsonl", "environment.json", "partition.json", "result.json"):
        (folder / name).write_text("")
    check(write_report([folder], tmp_path / "report.html"))
    for name in ("environment.json", "partition.json", "result.json"):
        (folder / name).write_text('{"counts": [[1], [2, 3]], "client_sizes": "x", "target": 3, "groups": 1}')
    check(write_report([folder], tmp_path / "report.html"))


def test_what_is_no_run_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FederaError, match=r"not a run directory \(no config.yaml\); give") as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    with pytest.raises(FederaError, match="at least one"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(FederaError, match="not YAML") as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)


def test_a_round_that_ran_again_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rounds=3)
    records = read_rounds(folder)
    write_rounds(folder, [*records, records[1] | {"loss": 9.0}])
    assert load_run(folder).column("loss").tolist() == [2.0, 9.0, pytest.approx(2 / 3)]


def test_rejections_by_client_and_reason(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rounds=3)
    records = read_rounds(folder)
    for record, reason in zip(records, ("not finite", "not finite", "too large"), strict=True):
        record |= {"verdicts": {"7": reason, "1": "ok"}, "rejected": 1}
    records[0]["verdicts"]["12"] = "wrong shape"
    write_rounds(folder, records)
    table = rejections(load_run(folder))
    assert table is not None
    assert table.rows == [["7", "3", "not finite (2); too large (1)"], ["12", "1", "wrong shape (1)"]]
    page = write_report([folder], tmp_path / "report.html")
    assert "Rejected updates" in " ".join(check(page).text)


def test_the_metric_is_found_by_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", finished=False)
    records = [{"round": 1, "loss": 1.0, "bleu": 0.3, "seconds_round": 1.0}]
    write_rounds(folder, records)
    assert load_run(folder).metric == "bleu"
    write_rounds(folder, [records[0] | {"f1": 0.5}])
    assert load_run(folder).metric == "f1"
    assert "Final F1" in [tile.label for tile in tiles(load_run(folder))]


def test_labels_use_the_fewest_settings(tmp_path: Path) -> None:
    cells = [("federa", 0, 8), ("federa", 1, 8), ("lora", 0, 8)]
    folders = [
        make_run(tmp_path / f"{i}", method={"name": name, "rank": rank}, seed=seed)
        for i, (name, seed, rank) in enumerate(cells)
    ]
    runs = [load_run(folder) for folder in folders]
    assert labels(runs) == ["FeDeRA · seed 0", "FeDeRA · seed 1", "LoRA · seed 0"]
    assert labels(runs[1:]) == ["FeDeRA", "LoRA"]
    assert labels([runs[0], runs[0]]) == ["FeDeRA · 0", "FeDeRA · 0"]
    assert headline(runs[:2])[0] == "2 runs of FeDeRA on tiny-model"
    assert "seed" not in headline(runs[:2])[1]


@pytest.mark.parametrize("clients", [1, 5, 30, 31, 1000])
@pytest.mark.parametrize("groups", [0, 1, 4, 90])
def test_partition_pictures_of_any_size(clients: int, groups: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 20, size=(clients, groups))
    sizes = counts.sum(axis=1) if groups else rng.integers(1, 20, size=clients)
    names = [f"group {i}" for i in range(groups)]
    svg = inline_svg(partition_figure(counts, names, sizes), "p", "a <partition>")
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == "a <partition>"
    assert len(svg) < 150_000
    texts = ["".join(node.itertext()) for node in root.iter("text")]
    assert ("group 0" in texts) == (groups > 0)
    assert len(texts) < 80


def test_a_skewed_partition_is_sorted_into_a_diagonal() -> None:
    counts = np.array([[0, 9], [5, 5], [9, 1], [0, 0], [0, 4]])
    figure = partition_figure(counts, ["a", "b"])
    ticks = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert ticks == ["2", "1", "0", "4", "3"], "purest first, empty clients last"


def test_a_saved_partition_stands_alone_and_does_not_vary(tmp_path: Path) -> None:
    counts = np.arange(12).reshape(4, 3)
    for name in ("partition.svg", "partition.png"):
        saved = [
            save_figure(partition_figure(counts, GROUPS), tmp_path / d / name).read_bytes() for d in "ab"
        ]
        assert saved[0] == saved[1]
        assert saved[0]
    root = ET.parse(tmp_path / "a" / "partition.svg").getroot()
    assert "politics" in "".join(root.itertext())
    assert "var(" not in (tmp_path / "a" / "partition.svg").read_text()


def test_sizes_in_a_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "partition.json").write_text(
        json.dumps({"counts": [[10, 0], [3, 1], [0, 0]], "groups": ["a", "b"]})
    )
    table = sizes_table(load_run(folder))
    assert table is not None
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["clients"] == "3"
    assert row["examples"] == "14"
    assert row["median"] == "4"
    assert row["empty"] == "1"
    assert row["largest group, mean share"] == "88 %"


def test_words() -> None:
    assert count(1234567) == "1\u2009234\u2009567"
    assert [rough(v) for v in (950, 12_345, 22_900_000, 1.3e9, None)] == [
        "950",
        "12.3 k",
        "22.9 M",
        "1.3 B",
        "–",
    ]
    assert [size_words(v) for v in (12, 6e6, 123.4e6, 1.2e9, math.nan)] == [
        "12 B",
        "6 MB",
        "123 MB",
        "1.2 GB",
        "–",
    ]
    assert [time_words(v) for v in (0.5, 90, 345, 7384, None)] == [
        "0.500 s",
        "90.0 s",
        "5.75 min",
        "2 h 03 min",
        "–",
    ]
    assert byte_unit(0) == (1.0, "B")
    assert plural(1, "round") == "1 round"
    assert [listing(w) for w in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert clip("x" * 60) == "x" * 11 + "…" + "x" * 12
    assert clip("a\nb") == "a b"


@pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: no browser to take a screenshot with"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_in_light_and_dark(tmp_path: Path, width: int) -> None:
    from matplotlib.image import imread

    page = write_report([make_run(tmp_path / "a")], tmp_path / "report.html")
    # A frame, because a window of headless Chromium is at least 500 pixels wide.
    frame = tmp_path / "frame.html"
    style = f"width:{width}px;height:1400px;border:0"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe></body>')
    pictures = {}
    for scheme, value in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                str(CHROMIUM),
                *(f"--{flag}" for flag in FLAGS),
                f"--user-data-dir={tmp_path / scheme}",
                f"--blink-settings=preferredColorScheme={value}",
                f"--window-size={max(width, 500)},1400",
                f"--screenshot={shot}",
                frame.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        pictures[scheme] = imread(shot)[:, :width, :3]
    for scheme, ground in (("light", "#ffffff"), ("dark", "#14171a")):
        picture = np.round(pictures[scheme] * 255).astype(int)
        wanted = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(picture[2, 2] - wanted).max() <= 2
        curve = {"light": (0, 114, 178), "dark": (74, 168, 224)}[scheme]
        assert (np.abs(picture - curve).max(axis=2) <= 4).sum() > 200, "the curves are drawn in their colour"
