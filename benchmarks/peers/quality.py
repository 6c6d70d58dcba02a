"""How well final tensors do on texts that nobody has trained on: run by the driver in federa's environment.

usage: python quality.py PLAN FINAL
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from learner import build_model
from plan import write_texts
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer
from workload import Plan

ROWS = 500


def held_out(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return token ids `(ROWS, tokens)` and labels of texts drawn like the plan's, with another seed."""
    workload = replace(plan.workload, clients=1, examples=ROWS, seed=plan.workload.seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    with tempfile.TemporaryDirectory() as folder:
        write_texts(workload, Path(folder), tokenizer)
        with (Path(folder) / "train.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    ids = tokenizer([row["text"] for row in rows], return_tensors="pt")["input_ids"]
    return ids, torch.tensor([int(row["label"]) for row in rows])


@torch.no_grad()
def scores(plan: Plan, final: Path) -> dict[str, float]:
    """Return loss and accuracy of a state on such texts, by the peers' model in float32."""
    model, trained = build_model(plan, 0.0)
    state = load_file(final)
    if set(state) != set(trained) or not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise SystemExit(f"{final}: other tensors than what trains, or NaN or infinity among them")
    for name, parameter in trained.items():
        parameter.copy_(state[name])
    texts, labels = held_out(plan)
    logits = torch.cat([model.eval()(input_ids=part).logits for part in texts.split(50)])
    right = (logits.argmax(-1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


if __name__ == "__main__":
    print(json.dumps(scores(Plan(Path(sys.argv[1])), Path(sys.argv[2]))))
