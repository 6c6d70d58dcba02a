"""Changing keys of a recipe file and nothing else: its comments and its order stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from federa.types import FederaError


def edit_recipe(text: str, changes: Mapping[str, Any]) -> str:
    """Return a recipe's text with dotted keys set.

    Args:
        text: YAML.
        changes: values by dotted key, such as `engine.name`; at most one dot.

    Raises:
        FederaError: a recipe that is written in a way that cannot be edited here; the message has the keys to
            set by hand.
    """
    expected = yaml.safe_load(text) or {}
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        if not section:
            expected[key] = value
        elif isinstance(expected.get(section, {}), dict):
            expected[section] = {**expected.get(section, {}), key: value}
        else:
            raise _by_hand(changes)
        text = _set(text, section, key, value)
    if yaml.safe_load(text) != expected:
        raise _by_hand(changes)
    return text


def _by_hand(changes: Mapping[str, Any]) -> FederaError:
    words = ", ".join(f"{key}: {_scalar(value)}" for key, value in changes.items())
    return FederaError(f"the recipe is written in a way that cannot be edited in place; set by hand: {words}")


def _scalar(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()


def _set(text: str, section: str, key: str, value: Any) -> str:
    root = yaml.compose(text)
    parent: yaml.Node | None = root if isinstance(root, yaml.MappingNode) else None
    if section:
        parent = _child(parent, section)
        if parent is None:
            return f"{text.rstrip()}\n{section}:\n  {key}: {_scalar(value)}\n".lstrip("\n")
    found = _child(parent, key)
    if found is not None:
        return text[: found.start_mark.index] + _scalar(value) + text[found.end_mark.index :]
    if not isinstance(parent, yaml.MappingNode):
        return f"{text.rstrip()}\n{key}: {_scalar(value)}\n".lstrip("\n")
    at = parent.start_mark.index
    if parent.flow_style:
        rest = ", " if parent.value else ""
        return f"{text[: at + 1]}{key}: {_scalar(value)}{rest}{text[at + 1 :]}"
    return f"{text[:at]}{key}: {_scalar(value)}\n{' ' * parent.start_mark.column}{text[at:]}"


def _child(parent: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(parent, yaml.MappingNode):
        return None
    return next((value for name, value in parent.value if name.value == key), None)
