"""Components by name, plugins, and one-line messages."""

import sys
from typing import Literal

import pytest
from pydantic import Field

from federa.registry import Component, Registry, load_plugins, nearest
from federa.types import FederaError


class Shape(Component):
    sides: int = Field(default=0, ge=0)


@pytest.fixture
def shapes():
    registry = Registry("shape")

    @registry.register
    class Square(Shape):
        name: Literal["square"] = "square"
        sides: int = Field(default=4, ge=0)
        corners: tuple[str, ...] | Literal["all"] = "all"

    @registry.register
    class Circle(Shape):
        name: Literal["circle"] = "circle"

    return registry


def test_parse_takes_a_name_a_mapping_or_a_component(shapes):
    square = shapes.parse("square")
    assert (square.name, square.sides) == ("square", 4)
    assert shapes.parse({"name": "square"}) == square == shapes.parse(square)
    assert shapes.parse({"name": "square", "sides": "5"}).sides == 5
    assert shapes.names() == ["circle", "square"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sqare", "unknown shape 'sqare' (did you mean 'square'?); known: circle, square"),
        ("zzz", "unknown shape 'zzz'; known: circle, square"),
        (["square"], "shape: expected a name or a mapping with 'name', got ['square']"),
        (None, "shape: expected a name or a mapping with 'name', got None"),
        ({"sides": 3}, "shape: expected a name or a mapping with 'name', got {'sides': 3}"),
        ({"name": ["oval"]}, "unknown shape ['oval']; known: circle, square"),
        ({"name": None}, "unknown shape None; known: circle, square"),
        (
            {"name": "square", "side": 3},
            "unknown key 'shape.side' (did you mean 'sides'?); known: name, sides, corners",
        ),
        ({"name": "square", "sides": -1}, "shape.sides: input should be greater than or equal to 0, got -1"),
        (
            {"name": "square", "sides": "many"},
            "shape.sides: input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ({"name": "square", "corners": 3}, "shape.corners: input should be a list, got 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line_that_says_what_does(shapes, value, message):
    with pytest.raises(FederaError) as raised:
        shapes.parse(value)
    assert str(raised.value) == message


def test_a_name_belongs_to_one_class(shapes):
    with pytest.raises(FederaError, match="shape 'square' is registered already, by test_registry"):

        @shapes.register
        class Other(Shape):
            name: Literal["square"] = "square"

    with pytest.raises(FederaError, match="Nameless: give it"):

        @shapes.register
        class Nameless(Shape):
            pass


def test_components_are_frozen(shapes):
    with pytest.raises(ValueError, match="frozen"):
        shapes.parse("square").sides = 7


def test_nearest():
    assert nearest("cohrt", ["cohort", "rounds"]) == " (did you mean 'cohort'?)"
    assert nearest("x", ["cohort"]) == ""


def test_plugins_are_files_beside_the_recipe_or_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import sys\nsys.loaded_mine = getattr(sys, 'loaded_mine', 0) + 1\n")
    load_plugins(["mine.py", "json"], tmp_path)
    load_plugins([str(tmp_path / "mine.py")], tmp_path)
    assert sys.loaded_mine == 1, "loaded once, by whatever path"
    for plugin, message in (
        ("missing.py", f"plugins: {tmp_path}/missing.py does not exist"),
        ("no_such_module_here", "plugins: no module 'no_such_module_here' is installed"),
    ):
        with pytest.raises(FederaError) as raised:
            load_plugins([plugin], tmp_path)
        assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_a_plugin_that_fails_is_named_and_can_be_mended(tmp_path):
    plugin = tmp_path / "broken_plugin.py"
    for content, reason in (
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ):
        plugin.write_text(content)
        with pytest.raises(FederaError, match=f"plugins: {plugin} fails: {reason}"):
            load_plugins([plugin.name], tmp_path)
    plugin.write_text("import sys; sys.mended = True")
    load_plugins([plugin.name], tmp_path)
    assert sys.mended
