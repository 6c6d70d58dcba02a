"""THE local loop: from the global state and a client's rows to an update.

The model is a resident tool: its trained tensors are views into one flat buffer, loaded before a job and left
in any state after it. From outside an update is pure: any order of clients gives the same bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from federa import gpu
from federa.cuda_graphs import CudaGraphs
from federa.data.batches import Encoded, training_batches
from federa.flat_parameters import FlatParameters
from federa.local_optimizer import LocalOptimizer
from federa.models import checkpoint_layers
from federa.prefix import frozen_prefix
from federa.seeds import generator, torch_seeded
from federa.tasks.base import Task
from federa.types import FloatArray, IntArray, Job, State, Update
from federa.vocabulary import Vocabulary, first_tokens, table_that_shrinks


class ClientConfig(BaseModel):
    """What every client does with a job.

    Attributes:
        epochs: passes over the client's rows.
        max_steps: at most so many steps; None for all of the epochs'. With `epochs` large this is "steps".
        batch_size: examples a step.
        micro_batch: at most so many examples in memory at once; None for the whole batch. A step's gradient
            is then a sum over parts of its batch, each weighted by its share of what the loss is a mean of:
            the step is the whole batch's to rounding, but dropout draws other masks.
        checkpointing: keep each layer's input alone for the backward pass, which computes the rest again
            (Chen et al. 2016, arXiv 1604.06174): less memory, about a third more work, the same result.
        reuse_frozen: compute what the layers below the lowest trained one make of a text once, and keep it
            (a worker's take a quarter of the free memory at most). Needs `dropout` 0. Off by default: a text
            that was computed in another batch, padded in another way, may differ in its last bits.
        cuda_graphs: on a GPU, record the steps of a shape that is met again, and issue each as one operation:
            the same results with less of the host's time, for up to twice the memory where there is so much.
            Not with the three fields above.
        lr: learning rate at the first round; None means the method's own default.
        head_lr: of the task head; None means `lr`. The schedule scales both.
        schedule: of the learning rate over rounds; `linear` and `cosine` end near zero.
        warmup_rounds: rounds over which the learning rate rises to `lr`.
        optimizer: AdamW (Loshchilov and Hutter 2019) or SGD; its state starts afresh with every job.
        momentum: of SGD.
        weight_decay: on matrices only (no bias, no layer norm); decoupled with AdamW.
        clip_norm: the largest gradient norm, over all trained tensors; 0 for none.
        proximal: FedProx's mu (Li et al. 2020): adds mu/2 * |w - w_start|^2 to the
            loss; w_start is the global state, and for a local head what the client kept.
        dropout: replaces every dropout rate of the model; None keeps the model's own.
        precision: `bf16` keeps float32 masters of what trains, and computes in bfloat16; `auto` measures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    checkpointing: bool = False
    reuse_frozen: bool = False
    cuda_graphs: bool = True
    lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_rounds: int = Field(default=0, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, ge=0)
    proximal: float = Field(default=0.0, ge=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Trainer:
    """One resident model that trains any client of a run, and predicts with any state.

    Args:
        model: prepared by a method.
        head: names of the head's parameters.
        local: names of the parameters that clients keep for themselves (a local head), often none.
        task: gives the outputs that scoring needs.
        config: the client's part of the recipe, `precision` resolved.

    Attributes:
        device: of the model.
        records: whether steps are recorded (`cuda_graphs.py`).
    """

    def __init__(
        self, model: nn.Module, head: frozenset[str], local: frozenset[str], task: Task, config: ClientConfig
    ) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.head = head
        if config.checkpointing:
            checkpoint_layers(model)
        self.prefix = frozen_prefix(model, head) if config.reuse_frozen else None
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        # Decay changes every row; on a GPU all rows cost little, and parameters must stay in their places.
        table = None if config.weight_decay or on_gpu else table_that_shrinks(model)
        self.flat = FlatParameters(model, head, bf16=config.precision == "bf16", table=table)
        self._places: Tensor | None = None
        plain = self.prefix is None and config.micro_batch is None and not config.checkpointing
        self.records = on_gpu and config.cuda_graphs and plain and gpu.recordable(model)
        self._resident: LocalOptimizer | None = None  # where steps are recorded, what they touch stays
        self._graphs = CudaGraphs(self._recorded_step, self.device) if self.records else None
        self.shared = [name for name in self.flat.names if name not in local]
        self.local = [name for name in self.flat.names if name in local]

    def train(
        self, params: State, data: Encoded, rows: IntArray, job: Job, local: State | None = None
    ) -> tuple[Update, State]:
        """Train on a client's rows, from the global parameters.

        Args:
            params: the global parameters.
            data: the training set that `rows` belong to.
            rows: the client's, `(num_examples,)`.
            job: the client's job; its seed settles batches and dropout.
            local: what the client kept from its last job.

        Returns:
            The update, of fresh tensors, and what the client keeps.
        """
        with self._own_tokens(data, rows):
            return self._train(params, data, rows, job, local or {})

    def _train(
        self, params: State, data: Encoded, rows: IntArray, job: Job, local: State
    ) -> tuple[Update, State]:
        began = time.perf_counter()
        flat = self.flat
        flat.load_(params, local)
        optimizer = self._resident or LocalOptimizer(flat, self.config)
        if self.records:
            self._resident = optimizer
        optimizer.restart(job.lr, self.head_lr(job.lr))
        losses, seen = [], 0
        self.model.train()
        with torch_seeded(job.seed):
            for batch_rows in self.batches(data, rows, job):
                losses.append(self._step(data, batch_rows, optimizer))
                seen += len(batch_rows)
        kept = {name: t.clone() for name, t in flat.read(flat.master, self.local).items()}
        metrics = {
            "loss": float(torch.stack(losses).double().mean()),
            "steps": float(len(losses)),
            "examples": float(seen),
            "seconds_train": time.perf_counter() - began,
        }
        return Update(job, flat.changes(optimizer.start, self.shared), float(len(rows)), metrics), kept

    def _step(self, data: Encoded, rows: IntArray, optimizer: LocalOptimizer) -> Tensor:
        """Take a step on one batch; return its loss, a float32 number."""
        if self._graphs is not None:
            return self._graphs(data.batch(rows, self.device))
        loss = self.gradient_(data, rows)
        optimizer.step()
        return loss

    def _recorded_step(self, inputs: dict[str, Tensor]) -> Tensor:
        """Do what `_step` does to a whole batch that is on the device already; return its loss."""
        loss = self.task.loss(self.model(**inputs), inputs).float()
        self.flat.backward_(loss)
        assert self._resident is not None
        self._resident.step()
        return loss.detach()

    @contextmanager
    def _own_tokens(self, data: Encoded, rows: IntArray) -> Iterator[None]:
        """Leave out of the model's token embeddings, if they train, what these rows do not have."""
        whole = self.flat
        if whole.table is None:
            yield
            return
        table = self.model.get_input_embeddings()
        own = Vocabulary(data, rows, table.num_embeddings, first_tokens(table), self.device)
        with whole.with_tokens(own.tokens) as part:
            self.flat, self._places = part, own.places
            try:
                yield
            finally:
                self.flat, self._places = whole, None

    def loss(self, data: Encoded, rows: IntArray) -> Tensor:
        """Return the task's loss of one batch, a number."""
        inputs = data.batch(rows, self.device)
        if self._places is not None:
            inputs["input_ids"] = self._places[inputs["input_ids"]]
        return self.task.loss(self._said(data, rows, inputs), inputs)

    def _said(self, data: Encoded, rows: IntArray, inputs: dict[str, Tensor]) -> Any:
        """Return what the model makes of a batch."""
        with self.prefix.reused(data, rows) if self.prefix is not None else nullcontext():
            return self.model(**inputs)

    def gradient_(self, data: Encoded, rows: IntArray) -> Tensor:
        """Make the gradient that of one batch's loss, and return the loss, a float32 number."""
        size = self.config.micro_batch or len(rows)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        terms = [self.task.terms(data, part) for part in parts] if len(parts) > 1 else [1]
        if not any(terms):
            parts, terms = [rows], [1]  # what a mean of nothing is, does not depend on the parts
        losses: list[Tensor] = []
        for part, count in zip(parts, terms, strict=True):
            if count == 0:
                continue
            loss = self.loss(data, part).float() * (count / sum(terms))
            self.flat.backward_(loss, add=bool(losses))
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def batches(self, data: Encoded, rows: IntArray, job: Job) -> Iterator[IntArray]:
        """Yield the batches of a job, as row numbers."""
        config, lengths = self.config, data.lengths()
        epochs = (
            training_batches(rows, lengths, config.batch_size, generator(job.seed, "batches", epoch))
            for epoch in range(config.epochs)
        )
        return itertools.islice(itertools.chain.from_iterable(epochs), config.max_steps)

    def head_lr(self, lr: float) -> float:
        """Return the head's learning rate beside a job's: it follows the same schedule."""
        config = self.config
        if config.head_lr is None or config.lr is None:
            return lr
        return config.head_lr * lr / config.lr

    def predict(
        self, params: State, data: Encoded, batches: Sequence[IntArray], local: State | None = None
    ) -> Iterator[list[FloatArray]]:
        """Yield the outputs of each batch, one float32 array an example."""
        self.flat.load_(params, local or {})
        self.model.eval()
        for rows in batches:
            with torch.inference_mode():
                inputs = data.batch(rows, self.device, labels=False)
                out = self.task.outputs(self._said(data, rows, inputs))
            yield list(out.float().cpu().numpy())


def measured_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the faster precision, by timing a matrix product of a small encoder's shape in both.

    bfloat16 must win by half: with a narrow lead its rounding buys nothing. The choice is written into the
    resolved recipe, so a resumed run keeps it.
    """
    rows = 2048 if device.type == "cpu" else 65536  # on an accelerator the product, and not its launch

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, 768), (768, 768)))
        times = []
        for _ in range(7):
            began = time.perf_counter()
            (a @ b).sum().item()
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    return "bf16" if seconds(torch.bfloat16) * 1.5 < seconds(torch.float32) else "fp32"


def scheduled_lr(config: ClientConfig, round_number: int, rounds: int) -> float:
    """Return the learning rate of a round, counted from 1."""
    assert config.lr is not None, "a resolved recipe has a learning rate"
    if round_number <= config.warmup_rounds:
        return config.lr * round_number / (config.warmup_rounds + 1)
    if config.schedule == "constant":
        return config.lr
    done = (round_number - 1 - config.warmup_rounds) / max(1, rounds - config.warmup_rounds)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + float(np.cos(np.pi * done))))
