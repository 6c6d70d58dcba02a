"""Templates set with the page's colours and styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from federa.report.palette import DARK, LIGHT, css_variables

_HERE = Path(__file__).parent


def render(template: str, styles: Sequence[str], context: Mapping[str, Any]) -> bytes:
    """Return a page that needs no other file.

    Args:
        template: its file name in this folder.
        styles: style sheets in this folder, set in the page one after another.
        context: what the template fills in; text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    css = Markup("".join((_HERE / name).read_text(encoding="utf-8") for name in styles))
    light, dark = (Markup(css_variables(colours)) for colours in (LIGHT, DARK))
    return environment.get_template(template).render(light=light, dark=dark, css=css, **context).encode()
