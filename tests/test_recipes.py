"""The recipes that come with the source: each resolves, and the data that they name are read as they say."""

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


def test_20_newsgroups_from_a_hub(monkeypatch):
    """What the recipe says of the hub's copy: number and name of a label in two columns."""
    rows = [
        {"text": f"{name} {i}", "label": i % 2, "label_text": name} for i in range(6) for name in ("a", "b")
    ]
    hub = {split: datasets.Dataset.from_list(rows) for split in ("train", "test")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or hub)
    words = (FOLDER / "newsgroups20.yaml").read_text().split("With a hub:\n# ")[1].split(".\n")[0].split()
    config = load_config(FOLDER / "newsgroups20.yaml", words)
    splits = read_splits(config.data, config.task)
    assert asked == [("SetFit/20_newsgroups", None)]
    assert config.task.labels(splits.train, config.data) == ["a", "b"]
    assert len(splits.train) == len(splits.evaluation) == 12
