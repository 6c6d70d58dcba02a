"""What a client's memory holds, by what its recipe does to save some.

    python benchmarks/client_memory.py [--device cpu] [--kernels off] [--layers 12] [--width 768] [--batch 16]

A RoBERTa of random weights under FeDeRA, and examples of exactly so many tokens. Every arrangement is a
process of its own that does what a node of `federa join` does: it is sent the round-0 factors, prepares the
model, and trains. Figures are MB: `loading` is the most until the model is ready, `ready` what is held then,
`training` the most in a few steps; on a CPU beyond what the libraries take alone, and without the pages of
their files (how many of those a fault brings along is the kernel's choice: 80 MB from one run to another), on
a GPU what torch has taken, for recorded steps too. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from federa.config import parse_config
from federa.data.batches import IGNORED_LABEL, Encoded, Ragged
from federa.engines.base import keep_freed_memory
from federa.experiment import Prepared, prepare
from federa.models import Pretrained
from federa.state import load_state, save_state
from federa.types import Job, State

LABELS, PADDING = 5, 1
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, checkpointing": {"precision": "bf16", "checkpointing": True},
    "bf16, micro_batch 1": {"precision": "bf16", "micro_batch": 1},
    "bf16, checkpointing, micro_batch 1": {"precision": "bf16", "checkpointing": True, "micro_batch": 1},
}


def in_a_fork(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what a function says, run in a fork: the libraries are read once, and each has its own peak."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("an arrangement failed; its mistake is above")
    found: dict[str, float] = json.loads(said)
    return found


def resident(what: str) -> float:
    """Return the MB of this process that are no file's: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        name: int(line.split()[1]) for line in lines if (name := line.split(":")[0]) in (what, "RssFile")
    }
    # At the peak there were as many: a file's pages stay. Those that came after it make it look lower.
    return (kilobytes[what] - kilobytes["RssFile"]) / 1024


def forget_peak() -> None:
    """Let `VmHWM` begin anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """The memory of a device since the meter was made."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if not self._cuda:
            forget_peak()
        self._libraries = 0.0 if self._cuda else resident("VmRSS")

    def now(self) -> float:
        """Return what is held."""
        return torch.cuda.memory_reserved() / 2**20 if self._cuda else resident("VmRSS") - self._libraries

    def peak(self) -> float:
        """Return the most since the last call, and begin anew."""
        if self._cuda:
            most = torch.cuda.max_memory_reserved() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return most
        most = resident("VmHWM") - self._libraries
        forget_peak()
        return most


def node(options: argparse.Namespace, client: dict[str, Any], init: State | None) -> Prepared:
    """Return a model of random weights, ready to train."""
    config = parse_config(
        {
            "device": options.device,
            "method": {"name": "federa", "rank": options.rank, "svd": "randomized"},
            "client": {"batch_size": options.batch, "lr": 1e-3, **client},
        }
    )
    shape = transformers.RobertaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=LABELS,
        attn_implementation="eager" if options.device == "cpu" else "sdpa",
    )
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(shape)
    head = frozenset(n for n, _ in model.named_parameters() if n.startswith("classifier"))
    return prepare(config, Pretrained(model, None, head, ""), init)


def measure(options: argparse.Namespace, client: dict[str, Any], factors: Path) -> dict[str, float]:
    """Return the figures of one arrangement; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `federa join` does
    meter = Meter(options.device)
    init = load_state(factors)[0]
    ready = node(options, client, init)
    loading, held = meter.peak(), meter.now()
    rng, count = np.random.default_rng(0), options.batch * options.steps
    tokens = rng.integers(5, options.vocabulary, (count, options.tokens)).tolist()
    data = Encoded(
        {"input_ids": Ragged.from_rows(tokens)},
        {"labels": np.arange(count) % LABELS},
        {"input_ids": PADDING, "labels": IGNORED_LABEL},
    )
    began = time.perf_counter()
    ready.trainer.train(init, data, np.arange(count), Job(1, 0, 0, 1e-3))
    seconds = (time.perf_counter() - began) / options.steps
    return {"loading": loading, "ready": held, "training": meter.peak(), "seconds": seconds}


def write_factors(options: argparse.Namespace, to: Path) -> dict[str, float]:
    """Write the round-0 state that every node is sent."""
    torch.set_num_threads(1)
    save_state(to, node(argparse.Namespace(**{**vars(options), "device": "cpu"}), {}, None).params, {})
    return {}


def table(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of all arrangements."""
    with tempfile.TemporaryDirectory() as folder:
        factors = Path(folder) / "init.safetensors"
        in_a_fork(lambda: write_factors(options, factors))
        return {
            name: in_a_fork(lambda client=client: measure(options, client, factors))  # type: ignore[misc]
            for name, client in ARRANGEMENTS.items()
        }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kernels", choices=["on", "off"], default="on", help="the compiled ones, on a CPU")
    sizes = {"layers": 12, "width": 768, "vocabulary": 50265, "rank": 32, "batch": 16, "tokens": 128}
    for name, default in {**sizes, "steps": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if options.kernels == "off":
        os.environ["FEDERA_KERNELS"] = "off"
    print(f"{'':36}{'loading':>9}{'ready':>9}{'training':>9}{'s/step':>9}")
    for name, found in table(options).items():
        print(
            f"{name:36}" + "".join(f"{found[key]:9.0f}" for key in ("loading", "ready", "training")), end=""
        )
        print(f"{found['seconds']:9.2f}")


if __name__ == "__main__":
    main()
