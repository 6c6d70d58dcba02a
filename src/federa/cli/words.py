"""What commands have in common."""

from __future__ import annotations

from pathlib import Path

from federa.errors import FederaError


def split_words(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe (an argument without an equals sign) and the overrides."""
    recipes = [a for a in arguments if "=" not in a]
    if len(recipes) > 1:
        raise FederaError(f"one recipe at a time, got {', '.join(recipes)}; overrides are key=value")
    return (Path(recipes[0]) if recipes else None), [a for a in arguments if "=" in a]
