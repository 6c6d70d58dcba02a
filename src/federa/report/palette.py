"""Colours and plot settings: one palette, as hex for matplotlib and as CSS variables for the page.

Figures are drawn in `LIGHT`, so that a saved one is sound by itself. On the page each of its colours
becomes the CSS variable of the same name, which `DARK` overrides for readers who prefer it.
"""

from __future__ import annotations

from typing import Any

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1c2024",
    "muted": "#5f6770",
    "line": "#d9dde2",
    "bar": "#b4bbc3",
    "heat": "#2a78b0",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#008a65",
    "s3": "#b5568c",
    "s4": "#c28400",
    "s5": "#3f97cc",
    "s6": "#6a51a3",
    "s7": "#4d4f52",
}
DARK = {
    "page": "#14171a",
    "panel": "#1c2025",
    "ink": "#e8eaed",
    "muted": "#9aa3ad",
    "line": "#343a41",
    "bar": "#5a636d",
    "heat": "#3ba8f6",
    "s0": "#4aa8e0",
    "s1": "#ff8a3d",
    "s2": "#2fc497",
    "s3": "#e08fbb",
    "s4": "#efb53a",
    "s5": "#8fd0f5",
    "s6": "#b4a0e5",
    "s7": "#c3c7cc",
}
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
"""CSS variable by the hex colour that a figure is drawn in."""

SERIES = 8
"""Runs with a colour of their own; later ones repeat the colours with another dash."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
DASHES = ("-", "--", ":", "-.")

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "federa",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["muted"],
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "text.color": LIGHT["muted"],
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
"""Settings for `matplotlib.rc_context`, both to draw and to save: text stays text, ids do not vary."""


def series_colour(slot: int) -> str:
    """Return the hex colour of the run at a place in the list."""
    return LIGHT[f"s{slot % SERIES}"]


def css_variables(colours: dict[str, str]) -> str:
    """Return a palette as CSS declarations."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
