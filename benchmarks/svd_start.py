"""What FeDeRA's start costs: the SVDs of all target matrices of a model, exact and randomised.

    python benchmarks/svd_start.py [--shape large] [--targets query,value] [--repeats 5]

The matrices are random, with a spectrum that falls as those of trained ones do (column i times i^-1/2): a
flat one would be the worst case of the randomised way. No cache is used.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

from federa.methods import FeDeRA, Setup
from federa.methods.federa import randomized_error

SHAPES = {"mini": (6, 384), "base": (12, 768), "large": (24, 1024)}


def build(layers: int, width: int) -> torch.nn.Module:
    """Return a RoBERTa of this shape; one spectrum serves all matrices of a shape."""
    config = transformers.RobertaConfig(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    model = transformers.RobertaForSequenceClassification(config)
    falling = torch.arange(1, 4 * width + 1) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layer." in name:
                parameter.mul_(falling[: parameter.shape[1]] * width**0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="large")
    parser.add_argument("--targets", default="query,value", help="with commas, or all-linear")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    targets = "all-linear" if options.targets == "all-linear" else tuple(options.targets.split(","))
    seconds: dict[str, list[float]] = {"exact": [], "randomized": []}
    for _ in range(options.repeats):
        for way, times in seconds.items():  # in turns
            model = build(*SHAPES[options.shape])
            head = frozenset(n for n, _ in model.named_parameters() if n.startswith("classifier"))
            method = FeDeRA(rank=options.rank, targets=targets, svd=way)
            began = time.perf_counter()
            start = method.prepare(model, Setup(head, seed=0))
            times.append(time.perf_counter() - began)
    matrices = sum(name.endswith("lora_A") for name in start)
    width = SHAPES[options.shape][1]
    print(f"{options.shape}: {matrices} matrices, rank {options.rank}, {torch.get_num_threads()} threads")
    for way, times in seconds.items():
        print(f"{way:12}{statistics.median(times):8.2f} s ({min(times):.2f} to {max(times):.2f})")
    bound = randomized_error((width, width), options.rank)
    print(f"bound of the randomised error, {width} x {width}: {bound:.3f} times the best possible")


if __name__ == "__main__":
    main()
