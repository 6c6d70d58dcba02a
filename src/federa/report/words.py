"""Numbers and lists in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from federa.report.load import is_number, number

NONE = "–"
NEGLIGIBLE_REPEATS = 0.01  # a share of the evaluation examples


def score(value: Any) -> str:
    """Return a metric or loss with four decimals; a number that is not finite by its name."""
    if not is_number(value):
        return NONE
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def count(value: Any) -> str:
    """Return a whole number with thin spaces between thousands."""
    exact = number(value)
    return NONE if exact is None else f"{exact:,.0f}".replace(",", "\u2009")


def rough(value: Any) -> str:
    """Return a count with three digits and k, M or B, as in a tile."""
    exact = number(value)
    if exact is None:
        return NONE
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if exact >= size:
            return f"{exact / size:.3g}{unit}"
    return f"{exact:.0f}"


def byte_unit(most: float) -> tuple[float, str]:
    """Return the decimal unit in which a number of bytes reads well: its size and name."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= size:
            return size, unit
    return 1.0, "B"


def size_words(value: Any) -> str:
    """Return a number of bytes in decimal units."""
    exact = number(value)
    if exact is None:
        return NONE
    size, unit = byte_unit(exact)
    return f"{exact / size:.0f} {unit}" if size == 1 or exact / size >= 100 else f"{exact / size:.3g} {unit}"


def time_unit(most: float) -> tuple[float, str]:
    """Return the unit in which a time reads well: its seconds and name."""
    return (3600.0, "h") if most >= 7200 else (60.0, "min") if most >= 600 else (1.0, "s")


def time_words(value: Any) -> str:
    """Return seconds as seconds, minutes or hours."""
    seconds = number(value)
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:#.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:#.3g} min" if seconds < 6000 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(amount: int, word: str) -> str:
    """Return `1 round`, `2 rounds`."""
    return f"{count(amount)} {word}" + ("" if amount == 1 else "s")


def listing(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def clip(text: Any, width: int = 24) -> str:
    """Return text on one line, printable, and shortened in its middle to a width: a label of a figure."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    half = width // 2
    return line if len(line) <= width else f"{line[: width - half - 1]}…{line[-half:]}"


def metric_words(name: str) -> str:
    """Return the name of a metric as it stands in a sentence."""
    return "F1" if name == "f1" else name.replace("_", " ")


def capital(sentence: str) -> str:
    """Return a sentence that begins with a capital."""
    return sentence[:1].upper() + sentence[1:]


def points(value: Any) -> str:
    """Return a score in points with one decimal."""
    exact = number(value)
    return NONE if exact is None else f"{exact:.1f}"


def signed(value: Any) -> str:
    """Return a difference in points with its sign."""
    exact = number(value)
    return NONE if exact is None else f"{round(exact, 1) + 0.0:+.1f}".replace("-", "−")


def trained_on(repeats: Any, of: Any) -> str | None:
    """Return what to say of evaluation examples that read like training examples; None if they are few."""
    some, all_ = number(repeats) or 0, number(of) or 0
    if some <= NEGLIGIBLE_REPEATS * all_:
        return None
    return f"{count(some)} of {count(all_)} evaluation examples read to the model like training examples"
