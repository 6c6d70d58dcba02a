"""What a comparison is made of: settings (data set x skew x model), methods, seeds, and rates to try."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from federa.config import (
    RunConfig,
    absolute,
    beside,
    evaluations,
    load_config,
    load_listed,
    parse_override,
    read_yaml,
    set_key,
)
from federa.data.datasets import HELD_OUT
from federa.data.partition import PARTITIONERS
from federa.methods import METHODS
from federa.registry import explain
from federa.report.load import flatten
from federa.types import FederaError

# The key that the value of `NAME:VALUE` of a skew is for.
SKEW_KEY = {
    "dirichlet": "alpha",
    "fednlp": "alpha",
    "quantity": "beta",
    "pathological": "classes_per_client",
    "natural": "column",
}


# What a comparison gives every run itself, and the option that says so.
NOT_FOR_ALL = {
    "seed": "--seeds",
    "method.name": "--methods",
    "method": "--methods, and method.KEY=VALUE for what a method takes",
}


def _words(value: Any) -> Any:
    """Return a list from words with commas."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return [value] if isinstance(value, (int, float)) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Grid(BaseModel):
    """The `grid:` section of a recipe for `federa compare`; the command line's options go before it.

    Attributes:
        recipes: one a data set, relative to this file; none for this file's own recipe. What else this file
            says holds for all of them.
        methods: names; differences are to the first one.
        seeds: each gives every method the same partition, cohorts and new head.
        skews: `dirichlet:0.1`, `fednlp:1`, `quantity:0.5`, `pathological:2`, `natural:author`, `iid`; none
            for the recipes' own.
        models: folders or hub names; none for the recipes' own.
        lrs: learning rates to choose from, by method, on held-out training examples; without any, the
            recipe's or the method's own.
        tune: `grid` runs every rate for `tune_rounds`; `halving` runs all for a few rounds, then the better
            half for twice as many, and so on up to `tune_rounds`.
        tune_rounds: rounds of a tuning run; None for as many as a run has.
        targets: shares of the reference's best score whose cost is told.
        reference: the method that targets are shares of; the first method if it is not among them.
        jobs: runs at a time; None for one a core where the engine is `serial` on a CPU, else one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    recipes: Words = ()
    methods: Words = ("federa", "lora", "adapter", "bitfit", "ft")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_words)] = (0, 1, 2)
    skews: Words = ()
    models: Words = ()
    lrs: dict[str, Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_words)]] = {}
    tune: Literal["grid", "halving"] = "grid"
    tune_rounds: int | None = Field(default=None, ge=1)
    targets: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_words)] = (
        0.8,
        0.9,
        0.95,
    )
    reference: str = "ft"
    jobs: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Grid:
        for name in self.methods:
            METHODS.get(name)
        for what in ("methods", "seeds", "skews", "models", "recipes", "targets"):
            values = getattr(self, what)
            if len(set(values)) < len(values):
                raise FederaError(
                    f"grid.{what}: expected different {what}, got {', '.join(map(str, values))}"
                )
            if not values and what in ("methods", "seeds"):
                raise FederaError(f"grid.{what}: expected at least one")
        METHODS.get(self.reference)
        for name, rates in self.lrs.items():
            if len({f"{rate:g}" for rate in rates}) < len(rates) or not rates:
                raise FederaError(f"grid.lrs: expected different rates for {name}, to six digits")
            if name not in self.methods:
                raise FederaError(f"grid.lrs: {name!r} is not among the methods {', '.join(self.methods)}")
        return self


@dataclass(frozen=True, slots=True)
class Setting:
    """One data set, skew and model.

    Attributes:
        name: as people read it.
        config: what all of its runs have in common.
    """

    name: str
    config: RunConfig

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a comparison.

    Attributes:
        setting: its name.
        method: its name.
        config: the recipe.
        folder: relative to that of the comparison.
    """

    setting: str
    method: str
    config: RunConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that `federa compare` runs."""

    grid: Grid
    settings: tuple[Setting, ...]

    @classmethod
    def load(
        cls, recipes: Sequence[Path], overrides: Sequence[str] = (), options: dict[str, Any] | None = None
    ) -> Comparison:
        """Return the comparison that recipes and options describe.

        Args:
            recipes: one a data set, or one with a `grid` section; none for the embedded default.
            overrides: `key=value`, for all runs.
            options: what goes before the grid section, by key of `Grid`; None values do not count.

        Raises:
            FederaError: anything wrong with it, in one line.
        """
        raws = [(file, read_yaml(file)) for file in recipes]
        for file, raw in raws:
            raw["plugins"] = load_listed(
                raw.get("plugins"), file.parent
            )  # before any name that one may bring
            if "grid" in raw and len(raws) > 1:
                raise FederaError(
                    f"grid: {file} has one of its own; a grid names its recipes under grid.recipes"
                )
        for key, instead in NOT_FOR_ALL.items():
            if any(word.partition("=")[0].strip() == key for word in overrides):
                raise FederaError(f"{key}: a comparison has several; give {instead}")
        own = raws[0][1].pop("grid", None) if len(raws) == 1 else None
        if isinstance(own, dict) and own.get("models"):
            own = {**own, "models": [absolute(name, recipes[0].parent) for name in _words(own["models"])]}
        grid = parse_grid(own, options or {})
        if grid.recipes:
            near = beside(raws[0][1], recipes[0].parent)
            common = {key: value for key, value in flatten(near) if value is not None}
            listed = [recipes[0].parent / name for name in grid.recipes]
            raws = [(file, _with(read_yaml(file), common, file)) for file in listed]
        configs = [load_config(file, overrides, raw) for file, raw in raws] or [load_config(None, overrides)]
        return cls(grid, tuple(_settings(grid, configs)))

    @property
    def reference(self) -> str:
        """The method whose best score the targets are shares of."""
        return self.grid.reference if self.grid.reference in self.grid.methods else self.grid.methods[0]

    def cell(self, setting: Setting, method: str, seed: int, lr: float | None) -> Cell:
        """Return one run.

        Without a rate of its own it has the recipe's, or its method's default if the recipe gives none.
        A recipe that gives the default of its own method is taken to give none.
        """
        folder = Path("cells") / setting.slug / f"{method}-seed{seed}"
        return Cell(setting.name, method, _config(setting.config, method, seed, lr), folder)

    def tuning(self, setting: Setting, method: str, lr: float, rounds: int) -> Cell:
        """Return one tuning run: the first seed, judged on examples that no run of a cell is judged on.

        They are the validation split, or held out of train; or where the runs are judged on the validation
        split, a tenth of what they train on.
        """
        data = setting.config.data
        apart: dict[str, Any] = {"data.evaluate_on": "held_out"}
        if data.evaluate_on == "test":
            held = 0.0 if data.validation else data.validation_fraction or HELD_OUT
            apart = {"data.evaluate_on": "validation", "data.validation_fraction": held}
        # Judged as a run is: where that takes several evaluations, so does this.
        several = setting.config.final_mean_of > 1
        every = setting.config.evaluate_every if several else 0
        config = _config(setting.config, method, self.grid.seeds[0], lr)
        config = config.replace(
            **{
                "rounds": rounds,
                "final_mean_of": min(config.final_mean_of, evaluations(rounds, every)),
                **apart,
                "diagnostics": False,
                "evaluate_every": every,
                "track": [],
            }
        )
        folder = Path("tune") / setting.slug / f"{method}-lr{lr:g}-rounds{rounds}-seed{self.grid.seeds[0]}"
        return Cell(setting.name, method, config, folder)

    def rungs(self, setting: Setting, method: str) -> list[tuple[int, int]]:
        """Return how a method's rate is tuned, as (runs, rounds of each) of every rung."""
        rates = len(self.grid.lrs.get(method, ()))
        most = self.grid.tune_rounds or setting.config.rounds
        if rates < 2:  # nothing to choose from
            return []
        if self.grid.tune == "grid":
            return [(rates, most)]
        counts = [rates]
        while counts[-1] > 2:
            counts.append(math.ceil(counts[-1] / 2))
        return [(runs, max(1, most >> (len(counts) - 1 - i))) for i, runs in enumerate(counts)]

    def describe(self) -> list[str]:
        """Return one line for every kind of run that the comparison is made of, and their number."""
        lines, count = [], 0
        for setting in self.settings:
            lines.append(setting.name)
            for method in self.grid.methods:
                rates = self.grid.lrs.get(method, ())
                for runs, rounds in self.rungs(setting, method):
                    shown = ", ".join(f"{rate:g}" for rate in rates)
                    lines.append(f"  tune {method:10} {runs} of lr {shown}; {rounds} rounds each")
                    count += runs
                given = self.cell(setting, method, 0, rates[0] if rates else None).config.client.lr
                lr = "tuned lr" if len(rates) > 1 else f"lr {given:g}"
                seeds = ", ".join(map(str, self.grid.seeds))
                lines.append(f"  run  {method:10} seeds {seeds}; {lr}, {setting.config.rounds} rounds")
                count += len(self.grid.seeds)
        return [*lines, f"{count} runs"]


def _config(config: RunConfig, method: str, seed: int, lr: float | None) -> RunConfig:
    changes: dict[str, Any] = {"method.name": method, "seed": seed}
    if lr is not None:
        changes["client.lr"] = lr
    return config.replace(**changes)


def parse_grid(section: Any, options: dict[str, Any]) -> Grid:
    """Return a recipe's `grid` section with what the command line says before it.

    Raises:
        FederaError: anything wrong with it.
    """
    if section is not None and not isinstance(section, dict):
        raise FederaError(f"grid: expected keys and values, got {section!r:.60}")
    asked = {key: value for key, value in options.items() if value is not None}
    told = dict(section or {})
    if isinstance(rates := told.get("lrs"), dict):
        # Rates of methods that are not asked for this time are no mistake; those asked for go before.
        if "methods" in asked:
            kept = _words(asked["methods"])
            told["lrs"] = {name: rates[name] for name in rates if name in kept or name not in METHODS.names()}
        if isinstance(asked.get("lrs"), dict):
            asked["lrs"] = {**told["lrs"], **asked["lrs"]}
    try:
        return Grid.model_validate({**told, **asked})
    except ValidationError as error:
        raise FederaError(explain(error, Grid, "grid")) from error


def _with(raw: dict[str, Any], common: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a listed recipe with what the grid's file says for all of them."""
    if "grid" in raw:
        raise FederaError(f"grid.recipes: {file} has a grid of its own")
    plugins = [*load_listed(raw.get("plugins"), file.parent), *common.get("plugins", [])]
    # A component's name first, so that its other keys meet the component that they belong to.
    for key, value in sorted(common.items(), key=lambda pair: not pair[0].endswith(".name")):
        set_key(raw, key, value)
    return {**raw, "plugins": plugins}


def _settings(grid: Grid, configs: Sequence[RunConfig]) -> Iterator[Setting]:
    """Yield every data set x skew x model, each with a name of its own."""
    seen: dict[str, Setting] = {}  # by their folders
    for config in configs:
        for skew in grid.skews or (None,):
            for model in grid.models or (None,):
                changes = _skew_changes(skew) if skew is not None else {}
                if model is not None:
                    changes |= dict([parse_override(f"model.name={model}")])
                changed = config.replace(**changes) if changes else config
                data = " ".join(filter(None, (data_name(changed.data.train), changed.data.subset)))
                name = f"{data}, {skew_name(changed)}, {Path(changed.model.name).name}"
                if changed.data.evaluate_on == "held_out":
                    raise FederaError(
                        "data.evaluate_on=held_out: rates are tuned on it; judge runs on test or validation"
                    )
                if changed.target is not None:
                    raise FederaError(
                        "target: a run of a comparison does not stop early; leave it out (grid.targets has "
                        "the shares of the reference's best whose cost is told)"
                    )
                setting = Setting(name, changed)
                other = seen.setdefault(setting.slug, setting)
                if other is not setting:
                    both = f"{name!r}" if name == other.name else f"{other.name!r} and {name!r}"
                    raise FederaError(
                        f"grid: two settings are named {both}; give different data, skew or model"
                    )
                yield setting


def _skew_changes(skew: str) -> dict[str, Any]:
    name, _, value = skew.partition(":")
    PARTITIONERS.get(name)
    if not value:
        return {"partition.name": name}
    if name not in SKEW_KEY:
        raise FederaError(f"grid.skews: {skew!r}: {name} takes no value")
    _, parsed = parse_override(f"{name}={value}")
    return {"partition.name": name, f"partition.{SKEW_KEY[name]}": parsed}


def skew_name(config: RunConfig) -> str:
    """Return a partition in a word or two, for example `dirichlet 0.1`."""
    name = config.partition.name
    value = getattr(config.partition, SKEW_KEY.get(name, ""), None)
    return name if value is None else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def data_name(train: str) -> str:
    """Return a data set's short name: a file's or folder's own, for `train.csv` its folder's; or a hub's."""
    path = Path(train)
    if not path.exists():
        return train
    stem = path.name.split(".")[0]
    return path.parent.name if path.is_file() and stem == "train" else stem if path.is_file() else path.name
