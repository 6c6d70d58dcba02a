"""The recipes that come with the source: each resolves, and the data that they name are read as they say."""

from itertools import pairwise, takewhile
from pathlib import Path

import datasets
import pytest

from federa.compare import Comparison
from federa.config import load_config, read_yaml
from federa.data.datasets import read_splits

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "paper.yaml")
needs_data = pytest.mark.skipif(
    not (FOLDER.parents[1] / "shared" / "data").is_dir(), reason="needs ../shared/data"
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_and_names_its_task(path):
    config = load_config(path)
    assert config.method.name == "federa"
    assert config.task.name == {"squad": "qa", "mrqa": "qa", "wnut17": "ner", "crossner": "ner"}.get(
        path.stem, "classification"
    )


@needs_data
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_data_of_a_recipe_have_the_columns_of_its_task(path):
    config = load_config(path)
    splits = read_splits(config.data, config.task)
    assert len(splits.train) >= 700 and len(splits.evaluation) >= 1287
    if config.task.group_by is not None:
        assert len(set(splits.train[config.task.group_by])) > 4


@needs_data
def test_the_papers_grid_is_six_sets_two_skews_and_five_methods():
    made = Comparison.load([FOLDER / "paper.yaml"])
    assert len(made.settings) == 12 and len(made.grid.methods) == 5
    assert len({setting.config.data.train for setting in made.settings}) == 6
    assert {setting.config.partition.alpha for setting in made.settings} == {0.1, 1.0}
    assert all(setting.config.diagnostics for setting in made.settings)
    assert len(read_yaml(FOLDER / "paper.yaml")["grid"]["lrs"]) == 5


def test_the_papers_grid_compares_methods_not_step_sizes():
    grid = read_yaml(FOLDER / "paper.yaml")
    assert grid["final_mean_of"] > 1 and "tune_rounds" not in grid["grid"]
    for rates in grid["grid"]["lrs"].values():
        assert all(high / low == pytest.approx(2) for low, high in pairwise(sorted(rates)))


WORDS = {"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}
ANSWER = {
    "question": "who?",
    "context": "she",
    "title": "t",
    "answers": {"text": ["she"], "answer_start": [0]},
}
HUB = {  # a row of the hub's copy, and what the recipe's words are to ask for
    "newsgroups20": ({"text": "a", "label": 0, "label_text": "x"}, "SetFit/20_newsgroups", None),
    "semeval2010_task8": (
        {"sentence": "a", "relation": "Other"},
        "SemEvalWorkshop/sem_eval_2010_task_8",
        None,
    ),
    "wnut17": (WORDS, "leondz/wnut_17", "refs/convert/parquet"),
    "squad": (ANSWER, "rajpurkar/squad", None),
}


@pytest.mark.parametrize("name", HUB)
def test_the_words_for_a_hub(monkeypatch, name):
    """They leave nothing of this project's files, and the hub's copy has the columns that they name."""
    row, repository, revision = HUB[name]
    other = {**row, "label": 1, "label_text": "y"} if "label" in row else row
    splits = ("train", "validation") if name == "squad" else ("train", "test")
    hub = {split: datasets.Dataset.from_list([row, other] * 6) for split in splits}
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, revision: asked.append((*args, revision)) or hub
    )
    said = (FOLDER / f"{name}.yaml").read_text().replace("\n#", "").split("With a hub: ", 1)[1]
    words = [word.removesuffix(".") for word in takewhile(lambda word: "=" in word, said.split())]
    config = load_config(FOLDER / f"{name}.yaml", words)
    found = read_splits(config.data, config.task)
    assert asked == [(repository, None, revision)]
    assert len(found.train) == len(found.evaluation) == 12
    assert "shared" not in str(config.data)
    if name == "newsgroups20":  # number and name of a label in two columns
        assert config.task.labels(found.train, config.data) == ["x", "y"]
