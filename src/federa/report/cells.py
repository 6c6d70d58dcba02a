"""What a grid's page is made from: its cells with their run directories, and the statistics about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from federa.report.load import Floats, RunRecord, load_run
from federa.report.naming import METHODS
from federa.report.summary import summarize
from federa.types import FederaError

ALL_SETTINGS = "all settings"


@dataclass(frozen=True)
class GridCell:
    """One run of a grid.

    Attributes:
        setting: data set, skew and model, for example `newsgroups20, dirichlet 0.1, minilm`.
        method: as the recipe names it.
        seed: of the run.
        folder: a finished run directory; None if the run failed.
    """

    setting: str
    method: str
    seed: int
    folder: Path | None


@dataclass(frozen=True)
class Pair:
    """The first method compared with another on the same seeds; scores are 0 to 1.

    Attributes:
        setting: where, or `all settings`.
        method: the other one.
        mean: of the paired differences, first minus other.
        spread: their sample standard deviation, NaN for one pair.
        low: the lower end of the 95 % bootstrap interval of the mean, NaN where there is none.
        high: the upper end.
        wins: pairs in which the first is ahead; a tie may count half.
        pairs: how many there are.
    """

    setting: str
    method: str
    mean: float
    spread: float
    low: float
    high: float
    wins: float
    pairs: int


@dataclass(frozen=True)
class Reached:
    """What a method took to reach a target, mean over seeds; None unless all seeds reached it.

    Attributes:
        setting: where.
        method: which.
        target: in words.
        rounds: until then.
        bytes: sent up and down until then.
        seconds: in rounds until then.
        seeds: that reached it.
        of: seeds that ran.
    """

    setting: str
    method: str
    target: str
    rounds: float | None
    bytes: float | None
    seconds: float | None
    seeds: int
    of: int


@dataclass(frozen=True)
class Grid:
    """The runs of a grid, in the order that the page shows them.

    Attributes:
        settings: as the cells have them.
        methods: the one that the others are compared with first; a method's place gives its colour.
        runs: by setting and method, then by seed in order; a method that failed in a setting has none there.
        asked: by setting the seeds that any method was to run with.
        lost: settings in which no run finished; they are not among `settings`.
        names: what the page calls a setting: without the words that all settings share.
        shared: these words.
    """

    settings: tuple[str, ...]
    methods: tuple[str, ...]
    runs: Mapping[tuple[str, str], Mapping[int, RunRecord]]
    asked: Mapping[str, Sequence[int]]
    lost: tuple[str, ...]
    names: Mapping[str, str]
    shared: str

    def cell(self, setting: str, method: str) -> list[RunRecord]:
        """Return a method's runs in a setting, by seed."""
        return list(self.runs.get((setting, method), {}).values())

    def setting(self, setting: str) -> dict[str, list[RunRecord]]:
        """Return the runs of each method that has any in a setting."""
        return {method: runs for method in self.methods if (runs := self.cell(setting, method))}

    def seeds(self, setting: str) -> list[int]:
        """Return the seeds that any method was to run with in a setting."""
        return list(self.asked[setting])

    def scores(self, setting: str, method: str) -> Floats:
        """Return the final scores of a cell in points, by seed."""
        finals = [summarize(run).final for run in self.cell(setting, method)]
        return np.array([100 * final for final in finals if final is not None], dtype=np.float64)

    def mean(self, setting: str, method: str) -> float | None:
        """Return the mean over seeds in points, None where there is no score."""
        scores = self.scores(setting, method)
        return float(scores.mean()) if scores.size else None

    def whole(self, setting: str, method: str) -> float | None:
        """Return the mean if there is a score with every seed: one of fewer is no match for others'."""
        scores = self.scores(setting, method)
        return float(scores.mean()) if scores.size == len(self.seeds(setting)) else None

    def overall(self, method: str) -> float | None:
        """Return the mean over settings in points, None for a method that lacks a run of them."""
        means = [self.whole(setting, method) for setting in self.settings]
        known = [mean for mean in means if mean is not None]
        return None if self.lost or len(known) < len(means) else float(np.mean(known))

    def slot(self, method: str) -> int:
        """Return a method's place, which gives its colour on the whole page."""
        return self.methods.index(method)

    def name(self, setting: str) -> str:
        """Return what the page calls a setting."""
        return self.names.get(setting, setting)


def method_name(method: str) -> str:
    """Return a method's name as its authors write it."""
    return METHODS.get(method, method)


def read_grid(cells: Sequence[GridCell], pairs: Sequence[Pair], reached: Sequence[Reached]) -> Grid:
    """Read the run directories of a grid.

    Raises:
        FederaError: no cell, or a folder that is not a run directory.
    """
    done = [(cell, cell.folder) for cell in cells if cell.folder is not None]
    if not done:
        raise FederaError("no run to report; a grid needs at least one finished run")
    runs: dict[tuple[str, str], dict[int, RunRecord]] = {}
    for cell, folder in sorted(done, key=lambda pair: pair[0].seed):
        runs.setdefault((cell.setting, cell.method), {})[cell.seed] = load_run(folder)
    settings = tuple(dict.fromkeys(cell.setting for cell, _ in done))
    lost = tuple(dict.fromkeys(cell.setting for cell in cells if cell.setting not in settings))
    asked = {where: sorted({cell.seed for cell in cells if cell.setting == where}) for where in settings}
    lists = [[cell.method for cell in cells if cell.setting == setting] for setting in settings]
    told = merged([*lists, [pair.method for pair in pairs], [one.method for one in reached]])
    # The method that no pair names is the one they are all compared with; it may lack a cell, so it need not
    # be the first that ran.
    compared = {pair.method for pair in pairs}
    methods = sorted(told, key=lambda method: method in compared) if compared else told
    shared, names = _short(settings)
    return Grid(settings, tuple(methods), runs, asked, lost, names, shared)


def merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return the different names of several lists in one that keeps their order, as far as they agree."""
    order: list[str] = []
    for names in sorted(map(dict.fromkeys, lists), key=len, reverse=True):
        place, seen = 0, set(order)
        for name in names:
            if name in seen:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                place += 1
    return order


def _short(settings: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the phrases that all settings share, and the settings' names without them."""
    phrases = [setting.split(", ") for setting in settings]
    if len(settings) < 2 or len({len(words) for words in phrases}) > 1:
        return "", {setting: setting for setting in settings}
    same = [len(set(column)) == 1 for column in zip(*phrases, strict=True)]
    names = [", ".join(w for w, s in zip(words, same, strict=True) if not s) for words in phrases]
    shared = ", ".join(word for word, alike in zip(phrases[0], same, strict=True) if alike)
    return shared, dict(zip(settings, names, strict=True))
