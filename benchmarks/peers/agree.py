"""How far final tensors are from the reference's: run by the driver in federa's environment.

usage: python agree.py INIT REFERENCE OTHER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def figures(
    initial: Mapping[str, Tensor], reference: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the distances between two final states.

    Returns:
        `largest`: the largest difference of any element, over the norm of the whole reference;
        `of_movement`: the norm of the difference over that of the way from the initial state; stricter.

    Raises:
        ValueError: other names or shapes, or numbers that are none.
    """
    shapes = {name: tensor.shape for name, tensor in reference.items()}
    if {name: tensor.shape for name, tensor in other.items()} != shapes:
        raise ValueError("the states have other names or shapes")

    def flat(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[name].flatten().double() for name in sorted(reference)])

    start, wanted, got = flat(initial), flat(reference), flat(other)
    if not bool(torch.isfinite(got).all()):
        raise ValueError("the state holds NaN or infinity")
    apart = got - wanted
    return {
        "largest": float(apart.abs().max() / wanted.norm()),
        "of_movement": float(apart.norm() / (wanted - start).norm()),
    }


if __name__ == "__main__":
    print(json.dumps(figures(*(load_file(Path(name)) for name in sys.argv[1:4]))))
