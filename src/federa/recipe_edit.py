"""Changing keys of a recipe file and nothing else: its comments and its order stay."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from federa.config import parse_config, set_key
from federa.types import FederaError


def edit_recipe(text: str, changes: Mapping[str, Any], folder: Path | None = None) -> str:
    """Return a recipe's text with dotted keys set, as overrides set them.

    A new component's name takes along the keys that it does not know, and nothing is returned that would not
    run.

    Args:
        text: YAML.
        changes: values by dotted key, such as `engine.name`; at most one dot.
        folder: the recipe's, for the plugins that it lists.

    Raises:
        FederaError: a recipe that is written in a way that cannot be edited here; the message has the keys to
            set by hand.
    """
    try:
        before = _read(text)
        wanted = {key: deepcopy(value) for key, value in before.items()}  # one by one: no two share a part
        for key, value in sorted(changes.items(), key=lambda pair: not pair[0].endswith(".name")):
            set_key(wanted, key, value)
        for section in dict.fromkeys(key.partition(".")[0] for key in changes):
            text = _change(text, section, before.get(section), wanted[section])
        if _read(text) == wanted:
            parse_config(wanted, folder)
            return text
    except (yaml.YAMLError, FederaError) as error:
        raise _by_hand(changes) from error
    raise _by_hand(changes)


def _read(text: str) -> dict[str, Any]:
    read = yaml.safe_load(text)
    if not isinstance(read, dict | None):
        raise FederaError("a recipe is a mapping of keys to values")
    return read or {}


def _by_hand(changes: Mapping[str, Any]) -> FederaError:
    words = ", ".join(f"{key}: {_flow(value)}" for key, value in changes.items())
    return FederaError(f"the recipe is written in a way that cannot be edited in place; set by hand: {words}")


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return str(dumped).removesuffix("\n...\n").strip()


def _change(text: str, section: str, before: Any, wanted: Any) -> str:
    """Change a key of the recipe: a section that is there key by key, anything else as a whole."""
    if not isinstance(before, dict) or not isinstance(wanted, dict):
        return text if before == wanted else _set(text, "", section, wanted)
    for key, value in wanted.items():
        if key not in before or before[key] != value:
            text = _set(text, section, key, value)
    for key in before.keys() - wanted.keys():
        text = _remove(text, section, key)
    return text


def _set(text: str, section: str, key: str, value: Any) -> str:
    parent = _node(text, section)
    found = next((node for name, node in parent.value if name.value == key), None) if parent else None
    if found is not None:
        start, end = found.start_mark.index, found.end_mark.index
        space = " " if start == end else ""  # nothing is there but the colon
        return text[:start] + space + _flow(value) + text[end:]
    if parent is not None and parent.flow_style:
        at = parent.start_mark.index + 1
        rest = ", " if parent.value else ""
        return f"{text[:at]}{key}: {_flow(value)}{rest}{text[at:]}"
    if parent is None or not section:
        return f"{text.rstrip()}\n{key}: {_flow(value)}\n".lstrip("\n")
    at = parent.start_mark.index
    return f"{text[:at]}{key}: {_flow(value)}\n{' ' * parent.start_mark.column}{text[at:]}"


def _remove(text: str, section: str, key: str) -> str:
    parent = _node(text, section)
    pairs = parent.value if parent is not None else []
    at = next((i for i, (name, _) in enumerate(pairs) if name.value == key), None)
    if parent is None or at is None:  # it came from elsewhere, by a merge
        return text
    name, value = pairs[at]
    if not parent.flow_style:  # its lines, with their comments
        start = name.start_mark.index - name.start_mark.column
        end = text.find("\n", value.end_mark.index) + 1 or len(text)
    elif at:
        start, end = pairs[at - 1][1].end_mark.index, value.end_mark.index
    else:
        start = name.start_mark.index
        end = pairs[1][0].start_mark.index if len(pairs) > 1 else value.end_mark.index
    return text[:start] + text[end:]


def _node(text: str, section: str) -> yaml.MappingNode | None:
    """Return the mapping of a section as it stands in the text, or with no name that of the whole recipe."""
    node = yaml.compose(text)
    if section and isinstance(node, yaml.MappingNode):
        node = next((value for name, value in node.value if name.value == section), None)
    return node if isinstance(node, yaml.MappingNode) else None
