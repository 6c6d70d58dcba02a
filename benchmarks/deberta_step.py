"""A step of DeBERTa with our attention, with transformers', and of a RoBERTa of the same size, in turns.

    python benchmarks/deberta_step.py benchmarks/encoders --turns 5

FeDeRA on question answering (recipes/squad.yaml), batches of 16, contexts cut to different lengths, bf16, one
thread; medians and spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from federa.config import load_config
from federa.cpu.disentangled import FastDisentangledSelfAttention
from federa.experiment import Experiment, build_experiment, resolve
from federa.server import make_jobs

RECIPE = Path(__file__).parents[1] / "recipes" / "squad.yaml"
STEPS = 2  # of each client


def build(model: Path, length: int) -> Experiment:
    """Return an experiment of ten alike clients with questions of a length."""
    words = [f"model.name={model}", f"task.max_length={length}", "task.overlap=8", "data.max_train=600"]
    words += ["data.max_test=50", "partition={name: iid, clients: 10}", f"client.max_steps={STEPS}"]
    words += ["engine.name=serial", "client.precision=bf16"]
    return build_experiment(resolve(load_config(RECIPE, words)))


def seconds(experiment: Experiment, clients: int) -> float:
    """Return what a step takes."""
    jobs = make_jobs(experiment.config, 1, [len(part) for part in experiment.parts])[:clients]
    with experiment.config.engine.open(experiment) as session:
        began = time.perf_counter()
        for _ in session.train(experiment.params, jobs):
            pass
        return (time.perf_counter() - began) / clients / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 192, 384])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for length in asked.lengths:
        deberta, roberta = (
            build(asked.encoders / f"{kind}-small", length) for kind in ("deberta", "roberta")
        )
        attentions = [m for m in deberta.trainer.model.modules() if isinstance(m, DisentangledSelfAttention)]
        times: dict[str, list[float]] = {"ours": [], "transformers": [], "roberta": []}
        for turn in range(asked.turns + 1):
            for name, spent in times.items():
                own = DisentangledSelfAttention if name == "transformers" else FastDisentangledSelfAttention
                for module in attentions:
                    module.__class__ = own
                one = seconds(roberta if name == "roberta" else deberta, clients=3)
                if turn:  # the first warms up
                    spent.append(one)
        shown = ", ".join(
            f"{name} {1e3 * statistics.median(t):.0f} ms ({1e3 * min(t):.0f}-{1e3 * max(t):.0f})"
            for name, t in times.items()
        )
        gains = [a / b for a, b in zip(times["transformers"], times["ours"], strict=True)]
        middle = statistics.median(gains)
        print(
            f"{length} tokens: {shown}; {middle:.2f} times as fast ({min(gains):.2f}-{max(gains):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
