"""Editing recipes: the keys that were asked for, and not a character more."""

import pytest
import yaml

from federa.config import parse_config
from federa.recipe_edit import edit_recipe
from federa.types import FederaError

RECIPE = """\
# ours
seed: 1
engine:   # how fast
  name: serial  # one at a time
client: {lr: 1.0e-3, precision: auto}
rounds: 3
"""
SERIAL = {"engine.name": "serial", "engine.threads": 2}


def test_a_key_that_is_there_is_replaced_and_comments_stay():
    assert edit_recipe(RECIPE, {"engine.name": "processes", "rounds": 5}) == RECIPE.replace(
        "serial  #", "processes  #"
    ).replace("rounds: 3", "rounds: 5")


def test_new_keys_go_into_their_section():
    changes = {"engine.threads": 2, "client.head_lr": 0.1, "task.max_length": 64, "track": "tensorboard"}
    text = edit_recipe(RECIPE, changes)
    assert yaml.safe_load(text) == {
        "seed": 1,
        "engine": {"name": "serial", "threads": 2},
        "client": {"lr": 0.001, "precision": "auto", "head_lr": 0.1},
        "rounds": 3,
        "task": {"max_length": 64},
        "track": "tensorboard",
    }
    assert all(comment in text for comment in ("# ours", "# how fast", "# one at a time"))


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_recipe_gets_its_first_keys(text):
    changed = edit_recipe(text, {"engine.name": "serial", "rounds": 2})
    assert yaml.safe_load(changed) == {"engine": {"name": "serial"}, "rounds": 2}
    assert changed.startswith(text)


@pytest.mark.parametrize(
    "engine",
    [
        "engine: {name: processes, workers: 2}",
        "engine: {workers: 2, name: processes}",
        "engine: {name: stacked, clients: 8, threads: 1}  # why",
        "engine: {workers: 1,\n  # why\n  name: ray, address: auto}",
        "engine:\n  name: processes  # why\n  workers: 2  # of them",
        "engine:\n  workers: 2  # of them\n  name: processes  # why",
        "engine:\n  name: processes\n  # why\n  workers:",
        "engine:\n  clients:\n    8\n  name: stacked  # why",
        "engine: processes  # why",
        "engine: # why",
        "{engine: processes}",
        '{"rounds": 3}',
    ],
)
def test_another_engine_takes_along_what_it_does_not_know(engine):
    rest = "rounds: 3" if not engine.startswith("{") else ""
    text = f"# mine\n{engine}\n{rest}\n"
    changed = edit_recipe(text, SERIAL)
    assert yaml.safe_load(changed)["engine"] == {"name": "serial", "threads": 2}
    assert yaml.safe_load(changed).get("rounds") == yaml.safe_load(text).get("rounds")
    parse_config(yaml.safe_load(changed))
    assert changed.startswith("# mine\n") and ("# why" in changed) == ("# why" in text)


def test_a_key_with_nothing_after_it_gets_its_value():
    text = edit_recipe("engine:\n  name: processes\n  workers:\n", {"engine.workers": 2})
    assert text == "engine:\n  name: processes\n  workers: 2\n"


@pytest.mark.parametrize(
    "text",
    [
        "engine: 3\n",
        "- engine\n",
        "aggregator: &x {name: mean}\nengine: {name: stacked}\nserver_optimizer: {name: *x}\n",
        "aggregator: &x {}\nengine: *x\n",
        "seed: 1\n...\n",
        "engine:\n  name: |-\n    processes\nseed: 1\n",
        "engine: {name: &x processes}\nplugins: [*x]\n",
        "engine: {<<: {workers: 2}, name: processes}\n",
        "engine: [\n",
        "unknown: 1\nengine: serial\n",
    ],
)
def test_what_cannot_be_edited_is_refused_with_the_lines_to_write(text):
    with pytest.raises(FederaError, match=r"set by hand: engine\.name: serial, engine\.threads: 2"):
        edit_recipe(text, SERIAL)


def test_values_are_yaml():
    assert yaml.safe_load(edit_recipe("target: 1\n", {"target": None})) == {"target": None}
    assert yaml.safe_load(edit_recipe("model: {name: a}\n", {"model.name": "yes"})) == {
        "model": {"name": "yes"}
    }


def test_plugins_are_beside_the_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("")
    text = edit_recipe("plugins: [mine.py]\n", {"rounds": 2}, tmp_path)
    assert yaml.safe_load(text) == {"plugins": ["mine.py"], "rounds": 2}
