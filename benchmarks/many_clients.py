"""What ten thousand clients in a recipe cost beside a hundred, the same texts shared out among them.

    python benchmarks/many_clients.py [--clients 100,10000] [--repeats 5]

A hundred clients a round take one step of two examples each, so that what is not training shows. Every run
has a process of its own (`measured_run.py`); the recipes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import run_point

TEXTS, ROUNDS = 20_000, 4


def run(folder: Path, clients: int) -> dict[str, Any]:
    """Return what `measured_run.py` prints about one run."""
    changes = {
        "cohort": 100,
        "partition.clients": clients,
        "examples": TEXTS // clients,
        "client.max_steps": 1,
        "client.batch_size": 2,
        "task.max_length": 32,
    }
    return run_point(folder, changes, ROUNDS)


def spread(values: Sequence[float], unit: str, digits: int) -> str:
    """Return median, least and most."""
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", default="100,10000", help="how many, with commas")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    counts = [int(word) for word in options.clients.split(",")]
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for count in counts:
                runs[count].append(run(Path(folder), count))
                print(
                    f"repeat {repeat}, {count} clients: {runs[count][-1]['memory']:.0f} MB", file=sys.stderr
                )
    print("| clients | set-up after tokenisation | a round | of it not training | memory | process's peak |")
    print("|---|---|---|---|---|---|")
    for count, found in runs.items():
        # The last round is followed by the run's own evaluation.
        rounds = [seconds for one in found for seconds in one["rounds"][:-1]]
        rest = [
            seconds - training
            for one in found
            for seconds, training in zip(one["rounds"][:-1], one["train"][:-1], strict=True)
        ]
        cells = [
            spread([one["setup"] for one in found], "s", 2),
            spread(rounds, "s", 2),
            spread([1000 * value for value in rest], "ms", 0),
            spread([one["memory"] for one in found], "MB", 0),
            spread([one["peak"] for one in found], "MB", 0),
        ]
        print(f"| {count:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
