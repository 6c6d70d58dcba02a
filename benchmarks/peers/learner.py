"""The client of everybody but federa: transformers + peft + torch, in float32, written with care.

One model stays resident. A job copies the trained tensors in place, trains with fused AdamW, and returns
copies of what came out. Plain, Flower and FLARE run this very code; pfl brings its own loop and takes the
model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from workload import Plan

# With dropout torch's fused attention on a CPU falls back to separate operations, so `eager` costs no more:
# see README.md, "Equal care".
ATTENTION = "eager"


def plain_name(name: str) -> str:
    """Return federa's name of a parameter of a peft model: that of the checkpoint, plus lora_A or lora_B."""
    for part, by in (
        ("base_model.model.", ""),
        (".modules_to_save.default", ""),
        (".lora_A.default.weight", ".lora_A"),
        (".lora_B.default.weight", ".lora_B"),
    ):
        name = name.replace(part, by)
    return name


def build_model(plan: Plan, dropout: float | None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model with LoRA and head, and what trains in it by federa's names.

    Args:
        plan: names the pretrained model and gives the initial tensors.
        dropout: replaces every rate of the model; None keeps the model's own.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = transformers.AutoConfig.from_pretrained(plan.model)
    settings.num_labels = plan.workload.labels
    settings.problem_type = "single_label_classification"
    if dropout is not None:
        settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = dropout
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        plan.model, config=settings, dtype=torch.float32, attn_implementation=ATTENTION
    )
    rank = plan.workload.rank
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=["query", "value"],
    )
    model = get_peft_model(model, lora)
    initial = plan.initial()
    trained = {plain_name(n): p for n, p in model.named_parameters() if plain_name(n) in initial}
    if set(trained) != set(initial):
        raise SystemExit(f"the peft model lacks {sorted(set(initial) - set(trained))}")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name, parameter in trained.items():
        parameter.requires_grad = True
        parameter.data.copy_(initial[name])
    return model.train(), trained


class Learner:
    """A resident model that trains any client of the plan.

    Args:
        folder: of the plan.
        dropout: see `build_model`.
        threads: of this process.
    """

    def __init__(self, folder: Path, dropout: float | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self.plan = Plan(folder)
        self.model, self.trained = build_model(self.plan, dropout)
        self.inputs = torch.from_numpy(self.plan.inputs).long()
        self.labels = torch.from_numpy(self.plan.labels)
        self.mask = torch.ones(self.plan.workload.batch, self.plan.workload.tokens, dtype=torch.long)

    def train(
        self, params: Mapping[str, Tensor], round_number: int, client: int
    ) -> tuple[dict[str, Tensor], float]:
        """Train a client from the global parameters, and return its own (copies) and the seconds it took."""
        began = time.perf_counter()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(params[name])
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.plan.workload.lr, weight_decay=0.0, fused=True
        )
        for rows in torch.from_numpy(self.plan.batches(round_number, client)):
            optimizer.zero_grad(set_to_none=True)
            self.model(
                input_ids=self.inputs[rows], attention_mask=self.mask, labels=self.labels[rows]
            ).loss.backward()
            optimizer.step()
        after = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        return after, time.perf_counter() - began


@functools.cache
def resident(folder: Path, dropout: float | None, threads: int) -> Learner:
    """Return this process's one learner: model and data are loaded once, whatever the framework."""
    return Learner(folder, dropout, threads)
