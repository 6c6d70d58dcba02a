"""What FeDeRA's start costs: the SVDs of all target matrices of a model, exact and randomised.

    python benchmarks/svd_start.py [--shape large] [--targets query,value] [--repeats 5]
    python benchmarks/svd_start.py --run [--repeats 5]     # its share of the default run (`make demo`)

The matrices are random, with a spectrum that falls as those of trained ones do (column i times i^-1/2): a
flat one would be the worst case of the randomised way. No cache is used. With `--run` every run has a process
of its own, and start and run are timed in that one: a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import federa
from federa.config import parse_config
from federa.cpu import native
from federa.machine import cache_folder
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


DEMO = {"engine.name": "processes", "task.max_length": 64}  # what the Makefile's demo changes


def timed_run() -> None:
    """Print the seconds of one default run, and of the start inside it."""
    starts = []
    inner = FeDeRA.start

    def timed(method: FeDeRA, model: torch.nn.Module, setup: Setup) -> None:
        began = time.perf_counter()
        inner(method, model, setup)
        starts.append(time.perf_counter() - began)

    FeDeRA.start = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        federa.run(parse_config({}).replace(**DEMO), out=Path(folder) / "run")
        # The first start is the server's; workers take what they are sent.
        print(time.perf_counter() - began, starts[0])


def shares(repeats: int) -> None:
    """Print what the start takes of default runs."""
    found = []
    native.build(cache_folder() / "kernels")  # compiling them is not part of the question
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as empty:
            (Path(empty) / "kernels").symlink_to(cache_folder() / "kernels")
            done = subprocess.run(
                [sys.executable, __file__, "--timed-run"],
                env={**os.environ, "FEDERA_CACHE": empty},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
        whole, start = map(float, done.stdout.split()[-2:])
        found.append(start / whole)
        print(f"start {start:.2f} s of {whole:.1f} s: {found[-1]:.2%}", flush=True)
    print(f"median {statistics.median(found):.2%} ({min(found):.2%} to {max(found):.2%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="large")
    parser.add_argument("--targets", default="query,value", help="with commas, or all-linear")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", action="store_true", help="the share of the default run")
    parser.add_argument("--timed-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed_run:
        return timed_run()
    if options.run:
        return shares(options.repeats)
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
    print(f"bound of the randomised error in expectation, {width} x {width}: {bound:.3f} times the best")


if __name__ == "__main__":
    main()
