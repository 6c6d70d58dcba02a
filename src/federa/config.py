"""The recipe: one YAML file, `key=value` overrides, and one-line errors for what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from federa.aggregators import AGGREGATORS, Aggregator, Mean
from federa.client import ClientConfig
from federa.data.datasets import EMBEDDED as EMBEDDED_DATA
from federa.data.datasets import DataConfig
from federa.data.partition import PARTITIONERS, Partitioner
from federa.engines import ENGINES, Engine
from federa.methods import METHODS, Method
from federa.models import EMBEDDED as EMBEDDED_MODEL
from federa.models import ModelConfig
from federa.privacy import Privacy, require_accounting
from federa.registry import Registry, explain, load_plugins, nearest
from federa.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from federa.tasks import TASKS, Task
from federa.trackers import TRACKERS
from federa.types import FederaError
from federa.wires import WIRES, Wire

# The keys of a section that are paths, where a path of that name exists; the first is what a bare word means.
PATHS = {"data": ("train", "validation", "test"), "model": ("name",)}
REGISTRIES: dict[str, Registry[Any]] = {
    "task": TASKS,
    "method": METHODS,
    "partition": PARTITIONERS,
    "aggregator": AGGREGATORS,
    "server_optimizer": SERVER_OPTIMIZERS,
    "wire": WIRES,
    "engine": ENGINES,
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RunConfig(BaseModel):
    """All that a run depends on.

    Attributes:
        plugins: Python files (relative to the recipe) or installed modules that register components.
        seed: of everything random: partition, cohorts, batches, dropout, new head.
        rounds: of federated training.
        cohort: clients a round.
        evaluate_every: evaluate after every so many rounds, and after the last; 0: after the last only.
        final_mean_of: a run's final score is the mean of so many last evaluations. With skewed clients a
            single round's score says as much of the last cohort as of the method.
        min_success: the share of a cohort whose updates must count, else the round fails.
        max_update_norm: a longer update (L2 norm over all tensors) is rejected.
        target: stop when the task's primary metric reaches this.
        diagnostics: write `diagnostics.jsonl`: how the updates of each round lie to each other
            (`diagnose`). The cohort's updates are kept for it, which is little for PEFT and much for `ft`.
        track: trackers that get every round's metrics, `tensorboard` for example.
        device: `auto | cpu | cuda | mps`.
        evaluate_batch_size: examples a batch in evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    plugins: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=15, ge=1)
    cohort: int = Field(default=5, ge=1)
    evaluate_every: int = Field(default=1, ge=0)
    final_mean_of: int = Field(default=1, ge=1)
    min_success: float = Field(default=0.5, ge=0, le=1)
    max_update_norm: float = Field(default=1e4, gt=0)
    target: float | None = Field(default=None, allow_inf_nan=False)
    diagnostics: bool = False
    track: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    evaluate_batch_size: int = Field(default=64, ge=1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    task: Annotated[SerializeAsAny[Task], BeforeValidator(TASKS.parse)] = Field(
        default="classification", validate_default=True
    )
    method: Annotated[SerializeAsAny[Method], BeforeValidator(METHODS.parse)] = Field(
        default="federa", validate_default=True
    )
    partition: Annotated[SerializeAsAny[Partitioner], BeforeValidator(PARTITIONERS.parse)] = Field(
        default="dirichlet", validate_default=True
    )
    client: ClientConfig = ClientConfig()
    aggregator: Annotated[SerializeAsAny[Aggregator], BeforeValidator(AGGREGATORS.parse)] = Field(
        default="mean", validate_default=True
    )
    server_optimizer: Annotated[SerializeAsAny[ServerOptimizer], BeforeValidator(SERVER_OPTIMIZERS.parse)] = (
        Field(default="sgd", validate_default=True)
    )
    privacy: Privacy | None = None
    wire: Annotated[SerializeAsAny[Wire], BeforeValidator(WIRES.parse)] = Field(
        default="fp32", validate_default=True
    )
    engine: Annotated[SerializeAsAny[Engine], BeforeValidator(ENGINES.parse)] = Field(
        default="serial", validate_default=True
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        clients = self.partition.clients
        if clients is not None and self.cohort > clients:
            raise FederaError(f"cohort: {self.cohort} clients a round, but partition.clients is {clients}")
        if self.final_mean_of > (most := evaluations(self.rounds, self.evaluate_every)):
            raise FederaError(
                f"final_mean_of: expected at most {most}, the evaluations that rounds={self.rounds} and "
                f"evaluate_every={self.evaluate_every} make, got {self.final_mean_of}"
            )
        if self.privacy is not None:
            require_accounting()
            if self.aggregator != Mean(weighted=False):
                raise FederaError(
                    "privacy: the accounting holds for plain means only; set aggregator.name=mean "
                    "aggregator.weighted=false"
                )
        for name in self.track:
            if name not in TRACKERS:
                raise FederaError(
                    f"track: unknown tracker {name!r}{nearest(name, TRACKERS)}; known: {', '.join(TRACKERS)}"
                )
        self._make_paths_absolute()
        if self.client.lr is None:
            resolved = self.client.model_copy(update={"lr": self.method.default_lr})
            object.__setattr__(self, "client", resolved)
        return self

    def _make_paths_absolute(self) -> None:
        """Write paths that exist as absolute ones, so that a stored recipe means the same from anywhere."""
        data = {key: absolute(getattr(self.data, key)) for key in ("train", "validation", "test")}
        object.__setattr__(self, "data", self.data.model_copy(update=data))
        object.__setattr__(self, "model", self.model.model_copy(update={"name": absolute(self.model.name)}))

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def replace(self, **changes: Any) -> RunConfig:
        """Return a validated copy with dotted keys changed, for example `**{"method.name": "lora"}`."""
        raw = self.model_dump(mode="json")
        if "method.name" in changes and self.client.lr == self.method.default_lr:
            raw["client"]["lr"] = None  # it was the old method's default: the new one has its own
        for key, value in changes.items():
            set_key(raw, key, value)
        return parse_config(raw)


def evaluations(rounds: int, every: int) -> int:
    """Return how often a run evaluates: after `every` so many rounds (0 for never) and after the last."""
    return math.ceil(rounds / every) if every else 1


def absolute(path: str | None, folder: Path | None = None) -> str | None:
    """Return the path of what exists in a folder (the current one by default) as absolute, else as it is.

    What is embedded, or a hub's, stays a name.
    """
    if path is None or path in (EMBEDDED_MODEL, EMBEDDED_DATA):
        return path
    found = (folder or Path.cwd()) / Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


def parse_config(raw: dict[str, Any], folder: Path | None = None) -> RunConfig:
    """Return the recipe that a mapping describes, its plugins loaded.

    Args:
        raw: nested mappings, as YAML gives them.
        folder: what plugin files are relative to; made absolute in the result.

    Raises:
        FederaError: anything wrong, in one line.
    """
    if not isinstance(raw, dict):
        raise FederaError(f"a recipe is a mapping of keys to values, not {type(raw).__name__}")
    plugins = load_listed(raw.get("plugins"), folder or Path.cwd())
    raw = {key: _with_name(key, value) for key, value in raw.items()} | {"plugins": plugins}
    if folder is not None:
        raw = beside(raw, folder)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise FederaError(explain(error, RunConfig)) from error


def beside(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's mapping, its paths made absolute: beside the recipe, where they are there."""
    raw = dict(raw)
    for section, paths in PATHS.items():
        held = raw.get(section)
        if isinstance(held, str):
            held = {paths[0]: held}
        if isinstance(held, dict):
            near = {p: absolute(v, folder) for p, v in held.items() if p in paths and isinstance(v, str)}
            raw[section] = {**held, **near}
    return raw


def load_listed(plugins: Any, folder: Path) -> list[str]:
    """Import the plugins that a recipe lists, and return the list with the paths of files made absolute."""
    plugins = plugins or []
    if not isinstance(plugins, (list, tuple)) or not all(isinstance(p, str) for p in plugins):
        raise FederaError("plugins: expected a list of file or module names")
    absolute = [str((folder / p).resolve()) if p.endswith(".py") else p for p in plugins]
    load_plugins(absolute, folder)
    return absolute


def _with_name(key: str, value: Any) -> Any:
    """Return a component's section with the default component's name, where it gives none."""
    if value is None and (key in REGISTRIES or key in ("model", "data", "client")):
        value = {}  # a section whose keys are all commented out
    if isinstance(value, str) and key in PATHS:
        return {PATHS[key][0]: value}
    if key in REGISTRIES and isinstance(value, dict) and "name" not in value:
        return {"name": RunConfig.model_fields[key].default, **value}
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a recipe file's mapping.

    Raises:
        FederaError: no such file, or not YAML.
    """
    if not path.is_file():
        raise FederaError(f"recipe: {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FederaError(f"recipe: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise FederaError(f"recipe: {path} holds no mapping of keys to values")
    return raw


def load_config(
    recipe: Path | None = None, overrides: Iterable[str] = (), raw: dict[str, Any] | None = None
) -> RunConfig:
    """Return a recipe file (or the embedded default) with `key=value` overrides.

    Args:
        recipe: the file, which relative paths in it are beside.
        overrides: `key=value`.
        raw: what the file holds, where it is read already.

    Raises:
        FederaError: anything wrong, in one line.
    """
    raw = raw if raw is not None else read_yaml(recipe) if recipe is not None else {}
    if "grid" in raw:
        raise FederaError(f"recipe: {recipe} has a grid of runs; run it with: federa compare {recipe}")
    folder = recipe.parent if recipe is not None else Path.cwd()
    pairs = [parse_override(text) for text in overrides]
    raw |= {key: value for key, value in pairs if key == "plugins"}
    load_listed(raw.get("plugins"), folder)  # before any name that a plugin may bring
    # A component's name first, so that its other keys meet the component that they belong to.
    for key, value in sorted(pairs, key=lambda pair: not pair[0].endswith(".name")):
        set_key(raw, key, value)
    return parse_config(raw, folder)


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key and the YAML value of `key=value`.

    Raises:
        FederaError: no equals sign, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FederaError(f"override {text!r}: expected key=value, for example rounds=30 or method.rank=8")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise FederaError(f"override {text!r}: the value is not YAML") from error
    section, _, name = key.strip().partition(".")
    is_path = name in PATHS.get(section, ())
    return key.strip(), absolute(parsed) if is_path and isinstance(parsed, str) else parsed


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings.

    A new `method.name` (or any component's) keeps the keys that the new component knows as well, and drops
    the others: `method.name=bitfit` on a LoRA recipe leaves `head`, not `rank`.
    """
    *path, last = key.split(".")
    node = raw
    for part in path:
        child = node.get(part)
        if isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise FederaError(f"override {key}: {part!r} is a value, not a section")
        node[part] = child
        node = child
    registry = REGISTRIES.get(key) or (REGISTRIES.get(path[0]) if len(path) == 1 and last == "name" else None)
    if registry is not None and isinstance(value, str):
        section = raw.get(key, {}) if key in REGISTRIES else node
        old = {"name": section} if isinstance(section, str) else dict(section or {})
        fields = registry.get(value).model_fields
        kept = {k: v for k, v in old.items() if k in fields and v is not None}
        raw[key if key in REGISTRIES else path[0]] = {**kept, "name": value}
        return
    node[last] = value
