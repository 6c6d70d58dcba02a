"""Clients side by side: one buffer with a row for each, one batched pass, one elementwise optimizer step.

The trained parameters get a leading client dimension, the frozen ones are shared. `torch.func.vmap` maps the
model over that dimension; the gradient of the sum of all clients' losses is each client's own gradient,
because no client's parameters or examples touch another's.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from federa.client import ClientConfig, Trainer
from federa.cuda_graphs import CudaGraphs
from federa.data.batches import Encoded, moved, padding_multiple
from federa.machine import free_main_memory
from federa.masks import ready_mask
from federa.seeds import seed_for, torch_seeded
from federa.types import IntArray, Job, State, Update

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, torch's defaults
ALIGNMENT = 64  # elements: every client's row starts where wide loads and matrix kernels like it
PINNED = 0.1  # of the free main memory, at most, for the updates of a group of clients
ATTENTION = "federa_stacked"  # before the name of the attention that it runs


class Lanes:
    """The trained parameters, gradients and optimizer state of several clients: `(clients, parameters)` each.

    They stay where they are from round to round; `load_` puts clients into them. Clients that have finished
    are the last ones, so that those still training are the first `count` rows: what has finished costs
    nothing and does not move.

    Args:
        trainer: its model, its layout of parameters and its recipe.
        clients: at most so many at a time.

    Attributes:
        trainer: as given.
        clients: as given.
        master: float32, what the optimizer changes.
        start: what it was before the first step.
    """

    def __init__(self, trainer: Trainer, clients: int) -> None:
        self.trainer, self.clients = trainer, clients
        self._model, self._flat, self._config = trainer.model, trainer.flat, trainer.config
        self._task = trainer.task
        width = -(-self._flat.master.numel() // ALIGNMENT) * ALIGNMENT
        self.master = torch.empty(clients, width, device=trainer.device)  # `load_` fills what is used
        self.start = torch.empty_like(self.master)
        bf16 = self._config.precision == "bf16"
        self._gradient = torch.empty_like(self.master)
        self._work = torch.empty_like(self.master, dtype=torch.bfloat16) if bf16 else self.master
        adam = self._config.optimizer == "adamw"
        self._moments = [torch.empty_like(self.master) for _ in range(2 if adam else 1)]
        self._rates = {is_head: torch.zeros(clients, 1, device=trainer.device) for is_head in (False, True)}
        self._shrink = {is_head: torch.ones_like(rates) for is_head, rates in self._rates.items()}
        self._spans = _spans(self._flat.segments, self._config, width)
        self._steps = torch.zeros(1, device=trainer.device)
        self._leaves: dict[str, Tensor] = {}
        self._count = 0
        self._graphs = CudaGraphs(self._train_, trainer.device) if trainer.records else None

    def load_(self, params: State, own: Sequence[State], lrs: Sequence[float]) -> None:
        """Put clients into the first rows, with an optimizer that has seen nothing.

        Args:
            params: the global parameters.
            own: what each client keeps for itself.
            lrs: each client's learning rate.
        """
        count = len(own)
        row = torch.zeros_like(self.master[0])
        for name, tensor in params.items():
            self._flat.view(row, name).copy_(tensor)
        self.master[:count] = row
        for lane, state in zip(self.master, own, strict=False):
            for name, tensor in state.items():
                self._flat.view(lane, name).copy_(tensor)
        self.start[:count].copy_(self.master[:count])
        if self._work is not self.master:
            self._work[:count].copy_(self.master[:count])
        for left in (self._gradient, *self._moments):  # a client that diverged leaves NaN, between rows too
            left[:count].zero_()
        self._steps.zero_()
        decay = self._config.weight_decay
        for is_head, own_rates in ((False, lrs), (True, [self.trainer.head_lr(lr) for lr in lrs])):
            rates = torch.tensor(own_rates, dtype=torch.float64)[:, None]
            self._rates[is_head][:count].copy_(rates)
            self._shrink[is_head][:count].copy_(1 - rates * decay)

    def train_(self, batch: dict[str, Tensor]) -> Tensor:
        """Take a step of the first clients, as many as the batch has; return their losses, `(count,)`."""
        return self._train_(batch) if self._graphs is None else self._graphs(batch)

    def _train_(self, batch: dict[str, Tensor]) -> Tensor:
        losses = self.losses(batch, len(batch["input_ids"]))
        self.step_(losses)
        return losses.detach()

    def losses(self, batch: dict[str, Tensor], count: int) -> Tensor:
        """Return the first clients' losses, `(count,)`, each of its own parameters and its own examples."""
        if count != self._count:
            self._leaves, self._count = self._views(count), count

        def one(leaves: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
            return self._task.loss(functional_call(self._model, leaves, (), inputs), inputs)

        return cast("Tensor", vmap(one, randomness="different")(self._leaves, batch))

    def _views(self, count: int) -> dict[str, Tensor]:
        """Return the first clients' parameters by name."""
        return {
            name: self._work[:count, span].view(count, *self._flat.shapes[name]).requires_grad_()
            for name, span in self._flat.slices.items()
        }

    def step_(self, losses: Tensor) -> None:
        """Change the clients that these losses belong to, as `Trainer.train` changes one."""
        config, count = self._config, len(losses)
        gradients = torch.autograd.grad(losses.sum(), list(self._leaves.values()), materialize_grads=True)
        for span, gradient in zip(self._flat.slices.values(), gradients, strict=True):
            self._gradient[:count, span].copy_(gradient.flatten(1))
        master, gradient = self.master[:count], self._gradient[:count]
        if config.proximal:
            gradient.add_(master - self.start[:count], alpha=config.proximal)
        if config.clip_norm:
            length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((config.clip_norm / (length + 1e-6)).clamp(max=1.0))
        self._steps.add_(1)
        update = self._sgd_ if config.optimizer == "sgd" else self._adamw_
        for span, is_head, decays in self._spans:
            update(count, span, is_head, decays)
        if self._work is not self.master:
            self._work[:count].copy_(master)

    def _sgd_(self, count: int, span: slice, is_head: bool, decays: bool) -> None:
        w, g, momentum = (t[:count, span] for t in (self.master, self._gradient, *self._moments))
        if decays:
            g.add_(w, alpha=self._config.weight_decay)
        momentum.mul_(self._config.momentum).add_(g)
        w.sub_(momentum * self._rates[is_head][:count])

    def _adamw_(self, count: int, span: slice, is_head: bool, decays: bool) -> None:
        w, g, mean, square = (t[:count, span] for t in (self.master, self._gradient, *self._moments))
        first, second = BETAS
        if decays:
            w.mul_(self._shrink[is_head][:count])
        mean.lerp_(g, 1 - first)
        square.mul_(second).addcmul_(g, g, value=1 - second)
        # 1 - beta^steps, without the digits that a float32 would lose
        of_mean, of_square = (-torch.expm1(self._steps * math.log(beta)) for beta in BETAS)
        length = square.sqrt().div_(of_square.sqrt()).add_(EPS)
        rate = self._rates[is_head][:count] / of_mean
        w.sub_(mean.div(length).mul_(rate))


def train_together(  # noqa: PLR0917
    lanes: Lanes,
    params: State,
    data: Encoded,
    parts: Sequence[IntArray],
    jobs: Sequence[Job],
    own: Sequence[State],
) -> list[tuple[Update, State]]:
    """Train several clients from the global parameters, each as `Trainer.train` would alone.

    Args:
        lanes: of the trainer whose model it is, as many as there are jobs or more.
        params: the global parameters.
        data: the training set.
        parts: each client's rows of it.
        jobs: each client's job; its seed settles its batches, and all seeds together settle dropout.
        own: what each client keeps for itself.

    Returns:
        Each client's update, of fresh tensors, and what it keeps, in the order of the jobs.
    """
    began = time.perf_counter()
    trainer = lanes.trainer
    steps = [num_steps(trainer.config, len(rows)) for rows in parts]
    lanes_of = sorted(range(len(jobs)), key=lambda i: -steps[i])
    lanes.load_(params, [own[i] for i in lanes_of], [jobs[i].lr for i in lanes_of])
    batches = [trainer.batches(data, parts[i], jobs[i]) for i in lanes_of]
    history, seen = [], [0] * len(jobs)
    trainer.model.train()
    with attention_of_all(trainer.model), torch_seeded(seed_for(jobs[0].seed, *(job.seed for job in jobs))):
        for number in range(max(steps)):
            rows = [next(batches[lane]) for lane in range(sum(s > number for s in steps))]
            history.append(lanes.train_(stacked_batch(data, rows, trainer.device)))
            for lane, part in enumerate(rows):
                seen[lane] += len(part)
    sums = pad_sequence(history, batch_first=True).cpu().double().sum(0).tolist()
    deltas = _fetched(lanes.master[: len(jobs)] - lanes.start[: len(jobs)])
    seconds = (time.perf_counter() - began) / sum(steps)
    results = {}
    for lane, i in enumerate(lanes_of):
        metrics = {
            "loss": sums[lane] / steps[i],
            "steps": float(steps[i]),
            "examples": float(seen[lane]),
            "seconds_train": seconds * steps[i],
        }
        kept = trainer.flat.read(lanes.master[lane], trainer.local)
        delta = trainer.flat.read(deltas[lane], trainer.shared)
        update = Update(jobs[i], delta, float(len(parts[i])), metrics)
        results[i] = update, {name: t.clone() for name, t in kept.items()}
    return [results[i] for i in range(len(jobs))]


def _spans(
    segments: Sequence[tuple[slice, bool, bool]], config: ClientConfig, width: int
) -> list[tuple[slice, bool, bool]]:
    """Return segments of the flat parameters with those joined that an optimizer treats alike, often all.

    Where all are, whole rows are one piece of memory, which is gone through faster than a part of every row.
    """
    joined: list[tuple[slice, bool, bool]] = []
    for span, is_head, decays in segments:
        kind = is_head and config.head_lr is not None, decays and config.weight_decay > 0
        if joined and joined[-1][1:] == kind:
            joined[-1] = slice(joined[-1][0].start, span.stop), *kind
        else:
            joined.append((span, *kind))
    return [(slice(0, width), *joined[0][1:])] if len(joined) == 1 else joined


def _fetched(deltas: Tensor) -> Tensor:
    """Return a tensor on the CPU.

    From a GPU it goes several times as fast into pinned memory, of which torch takes up to twice as much.
    """
    if deltas.device.type != "cuda" or deltas.nbytes > PINNED * free_main_memory():
        return deltas.cpu()
    out = torch.empty(deltas.shape, pin_memory=True)
    out.copy_(deltas, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return out


def num_steps(config: ClientConfig, rows: int) -> int:
    """Return how many batches `Trainer.batches` yields for a client of so many rows."""
    steps = config.epochs * -(-rows // config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def stacked_batch(data: Encoded, parts: Sequence[IntArray], device: torch.device) -> dict[str, Tensor]:
    """Return one batch of each of several clients, `(clients, most rows, longest of all)`.

    A client with fewer rows repeats its last one, with a target that the loss skips: its mean is over its
    own.
    """
    most = max(len(part) for part in parts)
    rows = np.concatenate([np.pad(part, (0, most - len(part)), mode="edge") for part in parts])
    inputs = data.batch(rows, torch.device("cpu"), multiple=padding_multiple(device))
    own = torch.arange(most)[None, :] < torch.tensor([len(part) for part in parts])[:, None]
    for name in data.targets:
        inputs[name] = inputs[name].clone()  # it may be a view of the data set
        inputs[name][~own.flatten()] = data.pad[name]
    return moved({name: t.view(len(parts), most, *t.shape[1:]) for name, t in inputs.items()}, device)


class _Folded(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """Attention whose clients become rows of one larger batch: (attend, query, key, value, mask or None)."""

    @staticmethod
    def forward(attend: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        raise NotImplementedError("attention to what no client has a part in")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # torch asks for it before it looks for `vmap`

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], attend: Callable[..., Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            lanes = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return lanes.flatten(0, 1)

        folded = [fold(tensor, dim) for tensor, dim in zip(tensors, in_dims[1:], strict=True)]
        return attend(*folded).unflatten(0, (info.batch_size, -1)), 0


def _attend_folded(  # noqa: PLR0917
    base: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend, in the form that transformers' `AttentionInterface` calls, with another attention function."""

    def attend(*tensors: Tensor | None) -> Tensor:
        return base(module, *tensors, **options)[0]

    return cast("Tensor", _Folded.apply(attend, query, key, value, attention_mask)), None


@contextmanager
def attention_of_all(model: Any) -> Iterator[None]:
    """Let a transformers model attend for all clients at once while the block runs.

    The model's own attention function runs, on a batch that all clients share. A family that does not go
    through transformers' registry of them (DeBERTa) is left as it is: `vmap` finds a rule for its attention
    where that is ours, or goes through it step by step.
    """
    if not getattr(model, "_supports_attention_backend", False):
        yield
        return
    name = model.config._attn_implementation
    base = ALL_ATTENTION_FUNCTIONS.get_interface(name if name != "eager" else "sdpa", None)
    AttentionInterface.register(f"{ATTENTION}_{name}", functools.partial(_attend_folded, base))
    AttentionMaskInterface.register(f"{ATTENTION}_{name}", ready_mask)
    model.set_attn_implementation(f"{ATTENTION}_{name}")
    try:
        yield
    finally:
        model.set_attn_implementation(name)
