"""Components and their registries: a component is its own config, and a plugin adds one with one file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from federa.types import FederaError


class Component(BaseModel):
    """A piece of a run that a recipe chooses by name; its fields are the recipe's keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str


C = TypeVar("C", bound=Component)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word nearest to a wrong one, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def explain(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> str:
    """Return the first thing that pydantic found wrong, as one line with the recipe's dotted key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if "[" not in str(part)]  # not the branch of a union
    key = ".".join(([prefix] if prefix else []) + path)
    if first["type"] == "extra_forbidden":
        owner = cls
        for part in path[:-1]:  # down to the section that the key was given to
            annotation = owner.model_fields[part].annotation
            for kind in (annotation, *get_args(annotation)):  # the section's own, or that of `Section | None`
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    owner = kind
        fields = owner.model_fields
        return f"unknown key {key!r}{nearest(path[-1], fields)}; known: {', '.join(fields)}"
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if first["type"] == "value_error":
        return message  # ours: it names its key
    if first["type"] == "missing":
        return f"{key}: a value is needed"
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


class Registry(Generic[C]):
    """The components of one kind, by name.

    Args:
        kind: the recipe's key for this kind, for example `method`; used in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Add a class under the default of its `name` field; use as a decorator.

        Raises:
            FederaError: the name is missing, or taken by a class of another module.
        """
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            raise FederaError(f'{cls.__name__}: give it `name: Literal["..."] = "..."` to register it')
        taken = self._classes.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise FederaError(f"{self.kind} {name!r} is registered already, by {taken.__module__}")
        self._classes[name] = cls
        return cls

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._classes)

    def get(self, name: str) -> type[C]:
        """Return the class registered under a name.

        Raises:
            FederaError: no such name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in self._classes:
            hint = nearest(str(name), self._classes)
            raise FederaError(f"unknown {self.kind} {name!r}{hint}; known: {', '.join(self.names())}")
        return self._classes[name]

    def parse(self, value: Any) -> C:
        """Return a component from a name, a mapping with `name`, or a component.

        Raises:
            FederaError: not one of these, or an unknown name.
        """
        if isinstance(value, Component):
            return value  # type: ignore[return-value]
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            raise FederaError(f"{self.kind}: expected a name or a mapping with 'name', got {value!r}")
        cls = self.get(value["name"])
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise FederaError(explain(error, cls, self.kind)) from error


def load_plugins(plugins: Iterable[str], folder: Path) -> None:
    """Import the plugins that a recipe lists: Python files (relative to `folder`) or installed modules.

    Only the owner of a machine writes this list; it is never taken from the network.

    Raises:
        FederaError: a file or module that is not there.
    """
    for plugin in plugins:
        if not plugin.endswith(".py"):
            try:
                importlib.import_module(plugin)
            except ModuleNotFoundError as error:
                raise FederaError(f"plugins: no module {plugin!r} is installed ({error})") from error
            continue
        path = (folder / plugin).resolve()
        if not path.is_file():
            raise FederaError(f"plugins: {path} does not exist")
        name = f"federa_plugin_{path.stem}"
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise FederaError(f"plugins: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise FederaError(f"plugins: {path} fails: {type(error).__name__}: {error}") from error
