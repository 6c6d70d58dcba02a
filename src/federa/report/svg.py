"""Figures to files, and to SVG that lives inside a page."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from federa.report.palette import RC, VARIABLES

_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_REFERENCE = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with federa's plot settings, leaving matplotlib's global ones as they are."""
    with warnings.catch_warnings(), mpl.rc_context(RC):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has the font
        yield


def save_figure(figure: Figure, to: Path) -> Path:
    """Save a figure, in the format that the file's ending names; the same figure gives the same bytes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    metadata = _NO_METADATA if to.suffix == ".svg" else {"Software": None} if to.suffix == ".png" else None
    with drawing():
        figure.savefig(to, dpi=200, facecolor="white", metadata=metadata)
    return to


def inline_svg(figure: Figure, key: str, label: str) -> Markup:
    """Return a figure as an `<svg>` element that follows the page's colours.

    Args:
        figure: drawn in the light palette.
        key: prefix of the ids inside, unique on the page.
        label: what a screen reader says.
    """
    file = io.StringIO()
    with drawing():
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    root = ET.fromstring(file.getvalue())
    for parent in root.iter():
        for style in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(style)
    used = {name for node in root.iter() for value in node.attrib.values() for name in _references(value)}
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = _attributes(node.attrib, key, used)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode"))


def _references(value: str) -> list[str]:
    return [quoted or plain for quoted, plain in _REFERENCE.findall(value)]


def _attributes(attributes: dict[str, str], key: str, used: set[str]) -> dict[str, str]:
    """Return an element's attributes with ids made unique and colours made variables."""
    kept = {}
    for name, value in attributes.items():
        name = name.rpartition("}")[2]
        if name == "id":
            if value in used:
                kept[name] = f"{key}-{value}"
        elif name == "href" and not value.startswith("#"):
            kept[name] = value
        elif _references(value):
            kept[name] = value.replace("#", f"#{key}-", 1)
        else:
            kept[name] = _COLOUR.sub(lambda found: VARIABLES.get(found[0], found[0]), value)
    return kept
