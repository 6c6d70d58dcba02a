"""Clients side by side against one after the other, on one model of random weights.

    python benchmarks/stacked.py --width 768 --layers 12 --clients 10 --device cuda --precision bf16

Both train the same jobs of the same clients; the rounds of both are interleaved, so that whatever else the
machine does meets both. Reported are the medians over the rounds, their range, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from federa.client import ClientConfig, Trainer
from federa.cpu import speed_up
from federa.data.batches import Encoded, Ragged
from federa.engines.stacking import train_together
from federa.methods import METHODS, Setup
from federa.seeds import seed_for, torch_seeded
from federa.tasks import Classification
from federa.types import Job, State, Update

LABELS, VOCABULARY = 20, 30_522


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("width", 384, "of the encoder; heads are 64 wide"),
        ("layers", 6, "of the encoder"),
        ("clients", 8, "of a round"),
        ("at-once", 0, "clients in one pass; 0 for all"),
        ("examples", 64, "of each client"),
        ("batch", 16, "examples a step"),
        ("length", 128, "tokens of the longest example; the shortest has half of them"),
        ("rounds", 5, "timed, of each way"),
        ("threads", 0, "on a CPU; 0 for torch's own number"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--method", default="lora", help="of federa, its defaults (default lora)")
    parser.add_argument("--dropout", type=float, default=0.1, help="every rate of the model (default 0.1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Trainer, State]:
    """Return a trainer of a BERT with random weights, and its start."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
        max_position_embeddings=max(512, options.length),
        num_labels=LABELS,
        problem_type="single_label_classification",
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
    )
    config._attn_implementation = "eager" if options.device == "cpu" else "sdpa"
    with torch_seeded(0):
        model = transformers.BertForSequenceClassification(config)
    head = frozenset(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    method = METHODS.parse(options.method)
    start = method.prepare(model, Setup(head, seed=0))
    model.to(options.device)
    if options.device == "cpu":
        speed_up(model)
    client = ClientConfig(lr=method.default_lr, batch_size=options.batch, precision=options.precision)
    return Trainer(model, head, frozenset(), Classification(), client), start


def draw(options: argparse.Namespace) -> tuple[Encoded, list[np.ndarray]]:
    """Return random examples, and each client's rows of them."""
    rng = np.random.default_rng(0)
    count = options.clients * options.examples
    lengths = rng.integers(options.length // 2, options.length + 1, count)
    rows = Ragged.from_rows([rng.integers(1, VOCABULARY, n).tolist() for n in lengths])
    data = Encoded(
        {"input_ids": rows}, {"labels": rng.integers(0, LABELS, count)}, {"input_ids": 0, "labels": -100}
    )
    return data, np.split(np.arange(count), options.clients)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    trainer, start = build(options)
    data, parts = draw(options)
    jobs = [Job(1, client, seed_for(0, "client", client), 1e-3) for client in range(options.clients)]
    size = options.at_once or options.clients

    def alone() -> list[Update]:
        return [trainer.train(start, data, parts[job.client_id], job)[0] for job in jobs]

    def together() -> list[Update]:
        groups = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        return [
            update
            for group in groups
            for update, _ in train_together(
                trainer, start, data, [parts[job.client_id] for job in group], group, [{}] * len(group)
            )
        ]

    seconds: dict[str, list[float]] = {"one at a time": [], f"{size} at a time": []}
    memory: dict[str, int] = {}
    ways: dict[str, Callable[[], list[Update]]] = dict(zip(seconds, (alone, together), strict=True))
    for number in range(options.rounds + 1):  # the first warms up
        for name, way in ways.items():
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()  # the updates are on the CPU when it returns
            if number:
                seconds[name].append(time.perf_counter() - began)
            if options.device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated()
    show(options, seconds, memory)


def show(options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print a table of both ways."""
    shown = (
        "method",
        "width",
        "layers",
        "clients",
        "examples",
        "batch",
        "length",
        "dropout",
        "precision",
        "device",
    )
    print(", ".join(f"{name} {getattr(options, name)}" for name in shown), f"| torch {torch.__version__}")
    print(f"{'':16}{'s a round':>10}{'lowest':>10}{'highest':>10}{'clients/s':>11}{'GiB':>8}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        peak = f"{memory[name] / 2**30:.2f}" if name in memory else "-"
        rate = options.clients / middle
        print(f"{name:16}{middle:10.3f}{min(times):10.3f}{max(times):10.3f}{rate:11.2f}{peak:>8}")
    ratios = sorted(one / other for one, other in zip(*seconds.values(), strict=True))
    print(
        f"side by side is {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
