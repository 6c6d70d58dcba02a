"""Editing recipes: the keys that were asked for, and not a character more."""

import pytest
import yaml

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


def test_a_key_that_is_there_is_replaced_and_comments_stay():
    assert edit_recipe(RECIPE, {"engine.name": "processes", "rounds": 5}) == RECIPE.replace(
        "serial  #", "processes  #"
    ).replace("rounds: 3", "rounds: 5")


def test_new_keys_go_into_their_section():
    text = edit_recipe(
        RECIPE, {"engine.workers": 2, "client.head_lr": 0.1, "task.max_length": 64, "track": "x"}
    )
    assert yaml.safe_load(text) == {
        "seed": 1,
        "engine": {"name": "serial", "workers": 2},
        "client": {"lr": 0.001, "precision": "auto", "head_lr": 0.1},
        "rounds": 3,
        "task": {"max_length": 64},
        "track": "x",
    }
    assert all(comment in text for comment in ("# ours", "# how fast", "# one at a time"))


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_recipe_gets_its_first_keys(text):
    changed = edit_recipe(text, {"engine.name": "serial", "rounds": 2})
    assert yaml.safe_load(changed) == {"engine": {"name": "serial"}, "rounds": 2}
    assert changed.startswith(text)


@pytest.mark.parametrize("text", ["engine: 3\n", "a: &x {name: b}\nengine: *x\n"])
def test_what_cannot_be_edited_is_refused_with_the_lines_to_write(text):
    with pytest.raises(FederaError, match=r"engine\.name: processes"):
        edit_recipe(text, {"engine.name": "processes"})


def test_values_are_yaml():
    assert yaml.safe_load(edit_recipe("a: 1\n", {"a": None})) == {"a": None}
    assert yaml.safe_load(edit_recipe("a: 1\n", {"a": "yes"})) == {"a": "yes"}
