"""Which matrices of an encoder a method works on: names that hold for every family."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from federa.types import FederaError

# One word for the same matrix in BERT/RoBERTa/ELECTRA, DeBERTa, DistilBERT and ModernBERT. ModernBERT keeps
# query, key and value in one matrix, Wqkv, which then stands for each of them.
ALIASES: dict[str, tuple[str, ...]] = {
    "query": ("query", "query_proj", "q_lin", "q_proj", "Wqkv"),
    "key": ("key", "key_proj", "k_lin", "k_proj", "Wqkv"),
    "value": ("value", "value_proj", "v_lin", "v_proj", "Wqkv"),
    "attention_output": ("attention.output.dense", "attention.out_lin", "attn.Wo"),
    "ffn_input": ("intermediate.dense", "ffn.lin1", "mlp.Wi"),
    "ffn_output": (r"\d+.output.dense", "ffn.lin2", "mlp.Wo"),
}


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear maps inside the encoder's numbered layers, by name; poolers and heads are outside."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }


def _matches(name: str, target: str) -> bool:
    patterns = ALIASES.get(target, (re.escape(target),))
    return any(re.search(rf"(^|\.){pattern}$", name) for pattern in patterns)


def find_targets(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Linear]:
    """Return the linear maps that `targets` names, by name.

    Args:
        model: a transformers encoder with a head.
        targets: `all-linear`, or names: the common ones (`ALIASES`) or any ends of module names.

    Raises:
        FederaError: a name that fits no linear map; the message lists those that there are.
    """
    linears = encoder_linears(model)
    if targets == "all-linear":
        return linears
    names = [targets] if isinstance(targets, str) else list(targets)
    for target in names:
        if not any(_matches(name, target) for name in linears):
            ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in linears})
            known = ", ".join([*ALIASES, "all-linear", *ends])
            raise FederaError(f"method.targets: {target!r} fits no linear map of this model; known: {known}")
    return {name: m for name, m in linears.items() if any(_matches(name, target) for target in names)}
