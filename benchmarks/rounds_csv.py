"""Every round of every run of a comparison as one CSV file, as in docs/results/.

python benchmarks/rounds_csv.py runs/wnut docs/results/wnut.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import yaml

KEPT = ("loss", "accuracy", "macro_f1", "semeval_f1", "f1", "exact_match", "clients", "examples")
SENT = ("bytes_up", "bytes_down")


def rows(folder: Path) -> list[dict[str, object]]:
    """Return one row a round of every run that is finished."""
    found = []
    for run in sorted(folder.glob("cells/*/*/")):
        if not (run / "result.json").is_file():
            continue
        method, _, seed = run.name.rpartition("-seed")
        recipe = yaml.safe_load((run / "config.yaml").read_text())
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            row = {"setting": run.parent.name, "method": method, "seed": int(seed)}
            row |= {
                "lr": recipe["client"]["lr"],
                "head_lr": recipe["client"]["head_lr"],
                "mean_of": recipe["final_mean_of"],
                "round": record["round"],
            }
            for name in (*KEPT, *SENT):
                if name in record:
                    value = record[name]
                    row[name] = float(f"{value:.6g}") if isinstance(value, float) else value
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("to", type=Path)
    asked = parser.parse_args()
    found = rows(asked.comparison)
    if not found:
        parser.error(f"{asked.comparison} has no finished run")
    columns = ("setting", "method", "seed", "lr", "head_lr", "mean_of", "round", *KEPT, *SENT)
    columns = [name for name in columns if any(row.get(name) is not None for row in found)]
    with asked.to.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} rounds: {asked.to}")


if __name__ == "__main__":
    main()
