"""Clients side by side against one after the other, on one model of random weights.

    python benchmarks/stacked.py --family roberta --width 768 --layers 12 --clients 100 --examples 32 \\
        --batch 8 --precision bf16 --alone 20 --plain bf16 --plain fp32

All ways train the same jobs of the same clients, in turns, so that whatever else the machine does meets all
of them. `--alone` lets the ways that train one client after the other take some of the clients only: a client
costs them the same, however many there are. `--plain` adds what a Flower client does, without Flower: a peft
model on the device, a `DataLoader`, torch's AdamW, autocast if asked for, weights in and out as NumPy arrays,
and their mean.

The plain ways' batches are of other make-up (shuffled, not of like length), and their bf16 is autocast over
float32 weights where ours are bf16 (float32 masters beside). Before a time counts, a few clients are trained
in float32 without dropout or graphs on the same batches, and what they end with is compared: the norm of
the difference over that of the way from the start.

Reported are clients a second, medians over the turns and their range, and the ratios of the turns. The share
of the peak is that of the frozen layers' products, over what a large product of `--precision` reaches: each
layer's 12 width^2 weights and its attention, for tokens without padding, forward and for the gradient of the
input; of the last layer of BERT and its kin keys and values alone: the rest is done for the first token.
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

from federa import gpu
from federa.client import ClientConfig, Trainer
from federa.cpu import speed_up
from federa.data.batches import Encoded, Ragged
from federa.engines.stacking import Lanes, train_together
from federa.methods import METHODS, Setup
from federa.seeds import seed_for, torch_seeded
from federa.tasks import Classification
from federa.types import Job, State, Update

LABELS = 20
VOCABULARY = {"bert": 30_522, "roberta": 50_265, "deberta": 128_100}
PEAK_SIDE = 8192
LR = 1e-3
WARM_UP = 3  # rounds: until the third the steps are recorded
COMPARED = 3  # clients whose final states are
APART = 0.02  # at most: AdamW makes whole steps of rounding where a gradient is next to nothing


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
    if options.device == "cpu":
        speed_up(model)
    else:
        gpu.speed_up(model)
    model.to(options.device)
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
    jobs = [Job(1, client, seed_for(0, "client", client), LR) for client in range(options.clients)]
    size = options.at_once or options.clients
    some = jobs[: options.alone or None]
    alone, together = (functools.partial(way, data=data, parts=parts) for way in (one_by_one, side_by_side))
    compare(options, jobs[:COMPARED], data, parts)
    cuda = options.device == "cuda"
    ours = f"{size} side by side"
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    for graphs in (True, False) if cuda else (False,):
        trainer, start = build(options, graphs=graphs)
        kind = "" if graphs or not cuda else ", without graphs"
        ways[ours + kind] = functools.partial(together, Lanes(trainer, size), start, jobs), len(jobs)
        ways["one at a time" + kind] = functools.partial(alone, trainer, start, some), len(some)
    for precision in options.plain:
        plain = Plain(options, precision, data)
        ways[f"plain peft, {precision}"] = functools.partial(plain.round, some, parts), len(some)
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


def one_by_one(
    trainer: Trainer, start: State, jobs: Sequence[Job], *, data: Encoded, parts: Sequence[np.ndarray]
) -> list[Update]:
    """Train clients one after the other."""
    return [trainer.train(start, data, parts[job.client_id], job)[0] for job in jobs]


def side_by_side(
    lanes: Lanes, start: State, jobs: Sequence[Job], *, data: Encoded, parts: Sequence[np.ndarray]
) -> list[Update]:
    """Train clients as many at a time as there are lanes."""
    groups = [jobs[i : i + lanes.clients] for i in range(0, len(jobs), lanes.clients)]
    return [
        update
        for group in groups
        for update, _ in train_together(
            lanes, start, data, [parts[job.client_id] for job in group], group, [{}] * len(group)
        )
    ]


class Plain:
    """A Flower client without Flower: peft and torch alone, and the mean of what clients send."""

    def __init__(self, options: argparse.Namespace, precision: str, data: Encoded) -> None:
        from peft import LoraConfig, TaskType, get_peft_model
        from peft import get_peft_model_state_dict as get_state

        names = ["query_proj", "value_proj"] if options.family == "deberta" else ["query", "value"]
        rank = METHODS.parse("lora").rank
        ranks = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=rank,
            target_modules=names,
            modules_to_save=["classifier", "pooler"] if options.family != "roberta" else ["classifier"],
        )
        self.model = get_peft_model(random_model(options), ranks).to(options.device)
        self.state = functools.partial(get_state, self.model)
        self.start = {name: t.cpu().numpy() for name, t in self.state().items()}
        self.options, self.precision, self.data = options, precision, data

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return examples padded to the longest."""
        ids, labels = self.data.features["input_ids"], self.data.targets["labels"]
        texts = [torch.from_numpy(ids.row(row).astype(np.int64)) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        kept = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        return {"input_ids": padded, "attention_mask": kept, "labels": torch.from_numpy(labels[rows])}

    def client(self, batches: DataLoader[int]) -> dict[str, np.ndarray]:
        """Return what a client makes of the start."""
        from peft import set_peft_model_state_dict

        options = self.options
        set_peft_model_state_dict(
            self.model, {name: torch.from_numpy(array) for name, array in self.start.items()}
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        self.model.train()
        for batch in batches:
            inputs = {name: t.to(options.device, non_blocking=True) for name, t in batch.items()}
            with torch.autocast(options.device, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return {name: t.cpu().numpy() for name, t in self.state().items()}

    def round(self, jobs: Sequence[Job], parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the mean of the clients' weights."""
        options, sums = self.options, []
        pinned = options.device == "cuda"
        for job in jobs:
            rows = parts[job.client_id].tolist()
            loader = DataLoader(rows, options.batch, shuffle=True, collate_fn=self.collate, pin_memory=pinned)
            arrays = list(self.client(loader).values())
            sums = [a + b for a, b in zip(sums, arrays, strict=True)] if sums else arrays
        return [array / len(jobs) for array in sums]


def compare(
    options: argparse.Namespace, jobs: Sequence[Job], data: Encoded, parts: Sequence[np.ndarray]
) -> None:
    """Say how far apart clients end that were trained side by side, one by one, and by peft and torch.

    Raises:
        SystemExit: further than rounding explains.
    """
    exact = argparse.Namespace(**{**vars(options), "precision": "fp32", "dropout": 0.0})
    trainer, start = build(exact, graphs=False)
    ends = {
        "side by side": side_by_side(Lanes(trainer, len(jobs)), start, jobs, data=data, parts=parts),
        "one at a time": one_by_one(trainer, start, jobs, data=data, parts=parts),
    }
    found = {way: [_flat(update.delta) for update in updates] for way, updates in ends.items()}
    if options.plain:
        plain = Plain(exact, "fp32", data)
        names = {_of_peft(name): name for name in start}
        if names.keys() != plain.start.keys():
            raise SystemExit(f"peft trains other tensors: {sorted(names.keys() ^ plain.start.keys())}")
        plain.start = {name: start[names[name]].numpy() for name in plain.start}
        found["plain peft"] = []
        for job in jobs:
            batches = [rows.tolist() for rows in trainer.batches(data, parts[job.client_id], job)]
            rows = list(range(options.clients * options.examples))
            end = plain.client(DataLoader(rows, batch_sampler=batches, collate_fn=plain.collate))
            delta = {names[name]: torch.from_numpy(array) - start[names[name]] for name, array in end.items()}
            found["plain peft"].append(_flat({name: delta[name] for name in ends["one at a time"][0].delta}))
    for way in found.keys() - {"one at a time"}:
        pairs = zip(found[way], found["one at a time"], strict=True)
        apart = float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())  # NaN is the largest
        print(f"float32 without dropout: {way} ends {apart:.1e} of the way from one at a time")
        if not apart < APART:
            raise SystemExit("that is more than rounding")


def _flat(delta: State) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in delta.values()])


def _of_peft(name: str) -> str:
    return f"base_model.model.{name}" + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def operations(options: argparse.Namespace, data: Encoded) -> float:
    """Return the floating-point operations that an epoch of all examples needs (see above)."""
    lengths = data.lengths().astype(float)
    spared = options.family != "deberta"  # of the last layer, see above
    matrices = 2 * 2 * options.width**2 * lengths.sum() * (12 * options.layers - 10 * spared)
    attention = 3 * 4 * options.width * (lengths**2).sum() * (options.layers - spared)
    return float(matrices + attention)


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
