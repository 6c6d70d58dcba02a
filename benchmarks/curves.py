"""Cost curves: time and memory of a round against clients, cohort, rank, length and model size.

    python benchmarks/curves.py --out runs/curves [--repeats 3]

Every point is a run in a process of its own (`measured_run.py`); a repeat goes through all points before the
next begins. What is done is kept, and the same command goes on. Writes `curves.json`, `curves.md`, and the
pictures `time.png` and `memory.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ENGINES = {
    "serial": {"engine.name": "serial", "engine.threads": 2},
    "processes": {"engine.name": "processes", "engine.workers": 2},
    "stacked": {"engine.name": "stacked", "engine.threads": 2},
}
SMALL = {
    "examples": 2,
    "client.batch_size": 2,
}  # with ten thousand clients the data, not the clients, would cost
CURVES: dict[str, dict[float, dict[str, Any]]] = {
    "clients": {n: {"partition.clients": n, "cohort": 100, **SMALL} for n in (100, 1000, 10_000)},
    "cohort": {n: {"cohort": n} for n in (5, 10, 20, 40)},
    "rank": {n: {"method.rank": n} for n in (4, 16, 64, 256)},
    "tokens": {n: {"task.max_length": n} for n in (16, 32, 64, 128, 256)},
    "encoder parameters (millions)": {
        round(layers * 12 * width**2 / 1e6, 1): {"shape": [layers, width], "cohort": 4}
        for layers, width in ((3, 256), (6, 384), (6, 768), (12, 768))
    },
}
SHOWN = ("serial", "processes", "stacked")


def run_point(folder: Path, changes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measure a point, and return what `measured_run.py` prints."""
    words = [f"{key}={json.dumps(value)}" for key, value in {"rounds": rounds, **changes}.items()]
    command = [sys.executable, str(HERE / "measured_run.py"), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(out: Path, repeats: int, rounds: int, only: list[str]) -> dict[str, Any]:
    """Measure all points that `curves.json` does not have yet, and return all."""
    file = out / "curves.json"
    held: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for repeat in range(repeats):
        for curve in only:
            for x, changes in CURVES[curve].items():
                for engine, keys in ENGINES.items():
                    key = f"{curve}|{x}|{engine}"
                    runs = held.setdefault(key, [])
                    if len(runs) > repeat:
                        continue
                    print(f"repeat {repeat}: {curve} {x}, {engine}", end="", flush=True)
                    runs.append(run_point(out / "runs", {**changes, **keys}, rounds))
                    print(f": {statistics.median(runs[-1]['rounds']):.2f} s, {runs[-1]['memory']:.0f} MB")
                    partial = file.with_suffix(".partial")
                    partial.write_text(json.dumps(held, indent=1) + "\n")
                    partial.replace(file)
    return held


def series(
    held: dict[str, Any], curve: str, engine: str, what: str
) -> list[tuple[float, float, float, float]]:
    """Return x, median, lowest and highest of every measured point of a curve.

    Of `rounds` the last of a run is left out: it is evaluated.
    """
    found = []
    for x in CURVES[curve]:
        values: list[float] = []
        for run in held.get(f"{curve}|{x}|{engine}", []):
            value = run[what]
            values += value[:-1] if isinstance(value, list) else [value]
        if values:
            found.append((x, statistics.median(values), min(values), max(values)))
    return found


def faster(held: dict[str, Any], curve: str, x: float, engine: str) -> str:
    """Return how much faster than `processes` an engine is, turn by turn: median, least and most."""
    one, other = (
        [statistics.median(run["rounds"][:-1]) for run in held.get(f"{curve}|{x}|{name}", [])]
        for name in (engine, "processes")
    )
    ratios = [theirs / own for own, theirs in zip(one, other, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""


def exponent(points: list[tuple[float, float, float, float]]) -> float:
    """Return p of the power law y ~ x^p through the medians (least squares of the logarithms)."""
    x, y = np.log([point[0] for point in points]), np.log([point[1] for point in points])
    return float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan


def table(held: dict[str, Any]) -> str:
    """Return all points as a Markdown table, with the law of each curve."""
    lines = []
    for curve in CURVES:
        lines += [
            f"\n### {curve}\n",
            "| | "
            + " | ".join(f"{e}, s a round | {e}, MB" for e in SHOWN)
            + " | serial over processes | stacked over processes |",
            "|---" * (3 + 2 * len(SHOWN)) + "|",
        ]
        columns = [series(held, curve, e, what) for e in SHOWN for what in ("rounds", "memory")]
        for x in CURVES[curve]:
            cells = []
            for i, column in enumerate(columns):
                point = next((p for p in column if p[0] == x), None)
                digits = 2 if i % 2 == 0 else 0
                cells.append(
                    ""
                    if point is None
                    else f"{point[1]:.{digits}f} ({point[2]:.{digits}f}-{point[3]:.{digits}f})"
                )
            cells += [faster(held, curve, x, engine) for engine in ("serial", "stacked")]
            lines.append(f"| {x:g} | " + " | ".join(cells) + " |")
        laws = [f"x^{exponent(column):.2f}" if len(column) > 1 else "" for column in columns]
        lines.append("| law | " + " | ".join(laws) + " | | |")
    return "\n".join(lines) + "\n"


def draw(held: dict[str, Any], out: Path) -> None:
    """Draw one picture of times and one of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    for what, label, name in (
        ("rounds", "seconds a round", "time"),
        ("memory", "MB, all processes", "memory"),
    ):
        figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained", sharey=True)
        *axes, legend = grid.flat
        for axis, curve in zip(axes, CURVES, strict=True):
            for engine, marker in zip(SHOWN, "os^", strict=True):
                points = series(held, curve, engine, what)
                if not points:
                    continue
                x, middle, low, high = np.array(points).T
                axis.errorbar(
                    x, middle, yerr=[middle - low, high - middle], marker=marker, capsize=3, label=engine
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xticks(list(CURVES[curve]), [f"{x:g}" for x in CURVES[curve]])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel(curve)
            axis.grid(alpha=0.3)
        for row in grid:
            row[0].set_ylabel(label)
        legend.axis("off")
        legend.legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
        figure.savefig(out / f"{name}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of a run; the first and the last do not count")
    parser.add_argument("--only", default=",".join(CURVES), help="curves, with commas")
    options = parser.parse_args()
    only = options.only.split(",")
    for curve in only:
        if curve not in CURVES:
            parser.error(f"--only: unknown {curve!r}; known: {', '.join(CURVES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    held = measure(options.out, options.repeats, options.rounds, only)
    text = table(held)
    (options.out / "curves.md").write_text(text)
    draw(held, options.out)
    print(text)


if __name__ == "__main__":
    main()
