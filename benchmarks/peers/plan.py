"""Write the plan of a workload, with federa: run by the driver in federa's environment.

usage: python plan.py WORKLOAD_JSON FOLDER
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import yaml
from transformers import AutoTokenizer
from workload import Workload

from federa.config import RunConfig, load_config
from federa.experiment import Experiment, build_experiment
from federa.models import resolve_model
from federa.server import make_jobs
from federa.state import save_state


def write_texts(workload: Workload, folder: Path, tokenizer: object) -> None:
    """Write texts of exactly `tokens` tokens, CLS and SEP among them, so that federa reads data as ever.

    Words are whole entries of the vocabulary. Half of a text's words come from its label's share of them:
    gradients are then those of a task that can be learned, not of noise.
    """
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    words = np.array(sorted(w for w in vocabulary if w.isascii() and w.isalpha() and w.islower()))
    shares = np.array_split(words, workload.labels)
    rng = np.random.default_rng(workload.seed)
    length = workload.tokens - 2
    for name, rows in (("train", workload.clients * workload.examples), ("test", 2 * workload.labels)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                label = row % workload.labels
                drawn = np.concatenate(
                    [rng.choice(shares[label], length // 2), rng.choice(words, length - length // 2)]
                )
                writer.writerow([" ".join(rng.permutation(drawn)), label])


def recipe(workload: Workload) -> dict[str, object]:
    """Return federa's recipe for the workload; the run adds engine, precision, dropout and rounds."""
    return {
        "seed": workload.seed,
        "rounds": workload.rounds,
        "cohort": workload.cohort,
        "evaluate_every": 0,  # the last round's evaluation stays: ten examples
        "device": "cpu",
        "model": {"name": workload.model, "train_pooler": False},  # the peers train a classifier
        "data": {"train": "train.csv", "test": "test.csv"},
        "task": {"name": "classification", "max_length": workload.tokens},
        "method": {"name": "lora", "rank": workload.rank},
        "partition": {"name": "iid", "clients": workload.clients},
        "client": {
            "epochs": 1,
            "batch_size": workload.batch,
            "lr": workload.lr,
            "schedule": "constant",
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        },
    }


def schedule(experiment: Experiment, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return who trains in which round, and the rows of each in the order of its batches.

    The batches come from the very method that the training loop calls.
    """
    sizes = [len(part) for part in experiment.parts]
    cohorts, orders = [], []
    for round_number in range(1, rounds + 1):
        jobs = make_jobs(experiment.config, round_number, sizes)
        cohorts.append([job.client_id for job in jobs])
        orders.append(
            [
                np.concatenate(
                    list(experiment.trainer.batches(experiment.train, experiment.parts[job.client_id], job))
                )
                for job in jobs
            ]
        )
    return np.array(cohorts), np.array(orders)


def write_plan(workload: Workload, folder: Path) -> None:
    """Write all files of a plan; `plan.json` last, as the sign that it is whole."""
    workload.check()
    folder.mkdir(parents=True, exist_ok=True)
    model = resolve_model(workload.model)
    write_texts(workload, folder, AutoTokenizer.from_pretrained(model))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(workload), sort_keys=False))
    config: RunConfig = load_config(folder / "recipe.yaml", ["client.precision=fp32"])
    experiment = build_experiment(config)
    data = experiment.train
    lengths = set(data.lengths().tolist())
    if lengths != {workload.tokens} or {len(part) for part in experiment.parts} != {workload.examples}:
        raise SystemExit(f"plan: expected rows of {workload.tokens} tokens and equal clients, got {lengths}")
    cohorts, orders = schedule(experiment, workload.rounds)
    inputs = data.features["input_ids"].values.reshape(-1, workload.tokens)
    np.savez(
        folder / "plan.npz", inputs=inputs, labels=data.targets["labels"], cohorts=cohorts, orders=orders
    )
    save_state(folder / "init.safetensors", experiment.params, {})
    settings = {"workload": vars(workload), "model_folder": model}
    (folder / "plan.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    write_plan(Workload(**json.loads(sys.argv[1])), Path(sys.argv[2]))
