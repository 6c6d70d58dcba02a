"""Clients side by side against one after the other, on one model of random weights.

    python benchmarks/stacked.py --family roberta --width 768 --layers 12 --clients 100 --examples 32 \\
        --batch 8 --precision bf16 --alone 20 --plain bf16 --plain fp32

All ways train the same jobs of the same clients, in turns, so that whatever else the machine does meets all
of them. `--alone` lets the ways that train one client after the other take some of the clients only: a client
costs them the same, however many there are. `--plain` adds what a Flower client does, without Flower: a peft
model on the device, a `DataLoader`, torch's AdamW, autocast if asked for, weights in and out as NumPy arrays,
and their mean.

The plain ways' batches are of other make-up (shuffled, not of like length), and their bf16 is autocast over
float32 weights where ours are bf16 (float32 masters beside).

Reported are clients a second, medians over the turns and their range, and the ratios of the turns. The share
of the peak is that of the frozen layers' products, over what a large product of `--precision` reaches: each
layer's 12 width^2 weights and its attention, for tokens without padding, forward and for the gradient of the
input.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from pretrain import DEBERTA_V3
from torch.utils.data import DataLoader

from federa.client import ClientConfig, Trainer
from federa.cpu import speed_up
from federa.data.batches import Encoded, Ragged
from federa.engines.stacking import Lanes, train_together
from federa.masks import use_ready_masks
from federa.methods import METHODS, Setup
from federa.seeds import seed_for, torch_seeded
from federa.tasks import Classification
from federa.types import Job, State, Update

LABELS = 20
VOCABULARY = {"bert": 30_522, "roberta": 50_265, "deberta": 128_100}
PEAK_SIDE = 8192
WARM_UP = 2  # rounds: in the second the steps are recorded


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
        ("alone", 0, "clients that are trained one after the other; 0 for all"),
        ("threads", 0, "on a CPU; 0 for torch's own number"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--family", choices=sorted(VOCABULARY), default="bert")
    parser.add_argument("--plain", choices=("bf16", "fp32"), action="append", default=[])
    parser.add_argument("--method", default="lora", help="of federa, its defaults (default lora)")
    parser.add_argument("--dropout", type=float, default=0.1, help="every rate of the model (default 0.1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.plain and options.method != "lora":
        parser.error("--plain is of --method lora")
    return options


def random_model(options: argparse.Namespace) -> transformers.PreTrainedModel:
    """Return a classifier of the family, of random weights."""
    usual = {
        "vocab_size": VOCABULARY[options.family],
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.width // 64),
        "intermediate_size": 4 * options.width,
        "num_labels": LABELS,
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": options.dropout,
    }
    positions = max(512, options.length)
    if options.family == "deberta":
        config = transformers.DebertaV2Config(**usual, **DEBERTA_V3, max_position_embeddings=positions)
    elif options.family == "roberta":
        config = transformers.RobertaConfig(**usual, max_position_embeddings=positions + 2, type_vocab_size=1)
    else:
        config = transformers.BertConfig(**usual, max_position_embeddings=positions)
    if options.family != "deberta":
        config._attn_implementation = "eager" if options.device == "cpu" else "sdpa"
    with torch_seeded(0):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def build(options: argparse.Namespace, *, graphs: bool = True) -> tuple[Trainer, State]:
    """Return a trainer of a random model, with CUDA graphs or without, and its start."""
    model = random_model(options)
    base = f"{model.base_model_prefix}."
    head = frozenset(name for name, _ in model.named_parameters() if not name.startswith(base))
    method = METHODS.parse(options.method)
    start = method.prepare(model, Setup(head, seed=0))
    model.to(options.device)
    if options.device == "cpu":
        speed_up(model)
    else:
        use_ready_masks(model)
    client = ClientConfig(
        lr=method.default_lr, batch_size=options.batch, precision=options.precision, cuda_graphs=graphs
    )
    return Trainer(model, head, frozenset(), Classification(), client), start


def draw(options: argparse.Namespace) -> tuple[Encoded, list[np.ndarray]]:
    """Return random examples, and each client's rows of them."""
    rng = np.random.default_rng(0)
    count = options.clients * options.examples
    lengths = rng.integers(options.length // 2, options.length + 1, count)
    rows = Ragged.from_rows([rng.integers(5, VOCABULARY[options.family], n).tolist() for n in lengths])
    data = Encoded(
        {"input_ids": rows}, {"labels": rng.integers(0, LABELS, count)}, {"input_ids": 0, "labels": -100}
    )
    return data, np.split(np.arange(count), options.clients)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    data, parts = draw(options)
    jobs = [Job(1, client, seed_for(0, "client", client), 1e-3) for client in range(options.clients)]
    size = options.at_once or options.clients
    some = jobs[: options.alone or None]

    def alone(trainer: Trainer, start: State) -> list[Update]:
        return [trainer.train(start, data, parts[job.client_id], job)[0] for job in some]

    def together(lanes: Lanes, start: State) -> list[Update]:
        groups = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        return [
            update
            for group in groups
            for update, _ in train_together(
                lanes, start, data, [parts[job.client_id] for job in group], group, [{}] * len(group)
            )
        ]

    cuda = options.device == "cuda"
    ours = f"{size} side by side"
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    for graphs in (True, False) if cuda else (False,):
        trainer, start = build(options, graphs=graphs)
        kind = "" if graphs or not cuda else ", without graphs"
        ways[ours + kind] = functools.partial(together, Lanes(trainer, size), start), len(jobs)
        ways["one at a time" + kind] = functools.partial(alone, trainer, start), len(some)
    for precision in options.plain:
        round_of = plain_round(options, precision, data, [parts[job.client_id] for job in some])
        ways[f"plain peft, {precision}"] = (round_of, len(some))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-WARM_UP, options.rounds):
        for name, (way, count) in ways.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()  # what it returns is on the CPU
            if number >= 0:
                rates[name].append(count / (time.perf_counter() - began))
    show(options, ours, rates, operations(options, data) / len(jobs))


def plain_round(
    options: argparse.Namespace, precision: str, data: Encoded, parts: Sequence[np.ndarray]
) -> Callable[[], list[np.ndarray]]:
    """Return what trains these clients with peft and torch alone, and returns the mean of their weights."""
    from peft import LoraConfig, TaskType, get_peft_model
    from peft import get_peft_model_state_dict as get_state
    from peft import set_peft_model_state_dict as set_state

    names = ["query_proj", "value_proj"] if options.family == "deberta" else ["query", "value"]
    rank = METHODS.parse("lora").rank
    ranks = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,
        target_modules=names,
        modules_to_save=["classifier", "pooler"] if options.family != "roberta" else ["classifier"],
    )
    model = get_peft_model(random_model(options), ranks).to(options.device)
    start, cuda = {name: t.cpu().numpy() for name, t in get_state(model).items()}, options.device == "cuda"
    ids, labels = data.features["input_ids"], data.targets["labels"]

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        texts = [torch.from_numpy(ids.row(row).astype(np.int64)) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        kept = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        return {"input_ids": padded, "attention_mask": kept, "labels": torch.from_numpy(labels[rows])}

    def client(rows: np.ndarray) -> list[np.ndarray]:
        set_state(model, {name: torch.from_numpy(array) for name, array in start.items()})
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        loader = DataLoader(rows.tolist(), options.batch, shuffle=True, collate_fn=collate, pin_memory=cuda)
        model.train()
        for batch in loader:
            inputs = {name: t.to(options.device, non_blocking=True) for name, t in batch.items()}
            with torch.autocast(options.device, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return [t.cpu().numpy() for t in get_state(model).values()]

    def round_of() -> list[np.ndarray]:
        sums: list[np.ndarray] = []
        for rows in parts:
            arrays = client(rows)
            sums = [a + b for a, b in zip(sums, arrays, strict=True)] if sums else arrays
        return [array / len(parts) for array in sums]

    return round_of


def operations(options: argparse.Namespace, data: Encoded) -> float:
    """Return the floating-point operations that an epoch of all examples needs (see above)."""
    lengths = data.lengths().astype(float)
    matrices = 2 * 2 * 12 * options.width**2 * lengths.sum()
    attention = 3 * 4 * options.width * (lengths**2).sum()
    return options.layers * float(matrices + attention)


def peak(options: argparse.Namespace) -> float:
    """Return the operations a second of a large product, the best of ten."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    side = PEAK_SIDE if options.device == "cuda" else PEAK_SIDE // 4
    a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if options.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if options.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def show(
    options: argparse.Namespace,
    ours: str,
    rates: dict[str, list[float]],
    of_client: float,
) -> None:
    """Print a table of all ways; ratios are of `ours`, `of_client` are the operations of a client."""
    words = [f"{k} {v}" for k, v in vars(options).items() if k not in ("device", "plain", "threads")]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    top = peak(options)
    print(", ".join(words), f"| {name}, torch {torch.__version__}, peak {top / 1e12:.0f} TFLOP/s")
    print("| | clients/s | range | of the peak | side by side is faster by | range |")
    print("|---|---|---|---|---|---|")
    for way, found in rates.items():
        ratios = sorted(a / b for a, b in zip(rates[ours], found, strict=True))
        middle = statistics.median(found)
        print(
            f"| {way} | {middle:.1f} | {min(found):.1f} to {max(found):.1f} | {middle * of_client / top:.1%} "
            f"| {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
        )


if __name__ == "__main__":
    main()
