"""One run of federa in a process of its own, and what it cost: used by the other benchmarks.

    python benchmarks/measured_run.py FOLDER [KEY=VALUE ...]

Texts are made up, of exactly `task.max_length` tokens; the keys change `BASE`. Prints one JSON object.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import federa
from federa.config import RunConfig, parse_config
from federa.experiment import Experiment
from federa.models import resolve_model
from federa.run import Observer
from federa.types import Record

LABELS = 5
BASE: dict[str, Any] = {
    "rounds": 6,
    "cohort": 10,
    "evaluate_every": 0,
    "device": "cpu",
    "task": {"name": "classification", "max_length": 64},
    "method": {"name": "lora", "rank": 16},
    "partition": {"name": "iid", "clients": 100},
    "client": {"batch_size": 16, "lr": 1e-3, "schedule": "constant", "precision": "bf16"},
    "engine": {"name": "serial", "threads": 1},
}


def write_texts(path: Path, rows: int, tokens: int, seed: int) -> None:
    """Write texts of whole vocabulary words, `tokens` tokens each with CLS and SEP; labels take turns."""
    vocabulary = transformers.AutoTokenizer.from_pretrained(resolve_model("minilm")).get_vocab()
    words = np.array(sorted(w for w in vocabulary if w.isascii() and w.isalpha() and w.islower()))
    rng = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(rows):
            writer.writerow([" ".join(rng.choice(words, tokens - 2)), row % LABELS])


def write_model(folder: Path, layers: int, width: int) -> Path:
    """Write a BERT of random weights, with MiniLM's tokenizer; heads are 64 wide, MiniLM's are 32."""
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(resolve_model("minilm")).save_pretrained(folder)
    return folder


def recipe(folder: Path, changes: dict[str, Any], examples: int) -> RunConfig:
    """Return the base recipe with keys changed, its texts written: `examples` for every client."""
    config = parse_config({**BASE, "data": {"train": "-", "test": "-"}}).replace(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    rows = examples * config.partition.clients
    files = {}
    for name, count, seed in (("train", rows, 0), ("test", 2 * LABELS, 1)):
        path = folder / f"{name}-{count}x{config.task.max_length}.csv"
        if not path.exists():
            write_texts(path, count, config.task.max_length, seed)
        files[f"data.{name}"] = str(path)
    return config.replace(**files)


def memory() -> float:
    """Return the MB that this process and its children hold now; pages that they share count once."""
    pids, total = [os.getpid()], 0.0
    while pids:
        pid = pids.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


class Watch(Observer):
    """Notes when each round was over, and what was held in memory then."""

    def __init__(self) -> None:
        self.start_seconds: dict[str, float] = {}
        self.started_at = 0.0
        self.marks: list[float] = []
        self.held: list[float] = []

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:
        self.start_seconds = dict(experiment.seconds)
        self.started_at = time.perf_counter()
        self.marks = [self.started_at]

    def finished_round(self, record: Record) -> None:
        now = time.perf_counter()
        self.held.append(memory())
        # Looking takes its time, which is nobody's: all later marks are as if it had taken none.
        self.marks = [mark + time.perf_counter() - now for mark in [*self.marks, now]]


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Run a recipe, and return what it cost.

    Returns:
        `setup`: seconds from the start of the run to its first round, without reading, tokenising and loading
        the model; `rounds`, `train`: seconds of each round but the first, and of the clients' training in it;
        `finish`: from the last round to the end of the run, the report among it; `memory`: MB after each
        round, the most; `peak`: MB of this process alone, at any time.
    """
    watch = Watch()
    began = time.perf_counter()
    result = federa.run(config, folder, observer=watch)
    ended = time.perf_counter()
    rounds = np.diff(watch.marks).tolist()
    apart = sum(watch.start_seconds[name] for name in ("read", "load", "tokenise"))
    return {
        "setup": watch.started_at - began - apart,
        "start": watch.start_seconds,
        "rounds": rounds[1:],
        "train": [record["seconds_train"] for record in result.records][1:],
        "finish": ended - watch.marks[-1],
        "memory": max(watch.held),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    folder, options = Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
    changes = {key: json.loads(value) for key, value in options.items()}
    examples = changes.pop("examples", 32)
    shape = changes.pop("shape", None)
    if shape:
        path = folder / f"model-{shape[0]}x{shape[1]}"
        changes["model.name"] = str(path if path.exists() else write_model(path, *shape))
    config = recipe(folder, changes, examples)
    run_folder = Path(tempfile.mkdtemp(prefix="run-", dir=folder))  # numbers of processes come again
    torch.set_num_threads(1)
    print(json.dumps(measure(config, run_folder)))


if __name__ == "__main__":
    main()
