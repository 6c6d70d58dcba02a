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
from federa.data.batches import Encoded, moved
from federa.masks import ready_mask
from federa.seeds import seed_for, torch_seeded
from federa.types import IntArray, Job, State, Update

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, torch's defaults
ALIGNMENT = 64  # elements: every client's row starts where wide loads and matrix kernels like it
ATTENTION = "federa_stacked"  # before the name of the attention that it runs


class Lanes:
    """The trained parameters, gradients and optimizer state of several clients: `(clients, parameters)` each.

    Clients that have finished are the last ones, so that those still training are the first `count` rows:
    what has finished costs nothing and does not move.

    Args:
        trainer: its model, its layout of parameters and its recipe.
        params: the global parameters.
        own: what each client keeps for itself.
        lrs: each client's learning rate.

    Attributes:
        master: float32, what the optimizer changes.
        start: what it was before the first step.
    """

    def __init__(self, trainer: Trainer, params: State, own: Sequence[State], lrs: Sequence[float]) -> None:
        self._model, self._flat, self._config = trainer.model, trainer.flat, trainer.config
        self._task = trainer.task
        width = -(-self._flat.master.numel() // ALIGNMENT) * ALIGNMENT
        row = torch.zeros(width, device=trainer.device)
        for name, tensor in params.items():
            row[self._flat.slices[name]].view(self._flat.shapes[name]).copy_(tensor)
        self.master = row.repeat(len(own), 1)
        for lane, state in zip(self.master, own, strict=True):
            for name, tensor in state.items():
                lane[self._flat.slices[name]].view(self._flat.shapes[name]).copy_(tensor)
        self.start = self.master.clone()
        bf16 = self._config.precision == "bf16"
        self._gradient = torch.zeros_like(self.master)
        self._work = self.master.bfloat16() if bf16 else self.master
        adam = self._config.optimizer == "adamw"
        self._moments = [torch.zeros_like(self.master) for _ in range(2 if adam else 1)]
        self._rates = {
            is_head: torch.tensor(rates, dtype=torch.float64)[:, None]
            for is_head, rates in ((False, lrs), (True, [trainer.head_lr(lr) for lr in lrs]))
        }
        decay = self._config.weight_decay
        self._shrink = {k: (1 - r * decay).float().to(trainer.device) for k, r in self._rates.items()}
        self._rates = {k: r.float().to(trainer.device) for k, r in self._rates.items()}
        self._steps = 0
        self._leaves: dict[str, Tensor] = {}
        self._count = 0

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
        self._steps += 1
        update = self._sgd_ if config.optimizer == "sgd" else self._adamw_
        for span, is_head, decays in self._flat.segments:
            update(count, span, is_head, decays and config.weight_decay > 0)
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
        length = square.sqrt().div_(math.sqrt(1 - second**self._steps)).add_(EPS)
        rate = self._rates[is_head][:count] / (1 - first**self._steps)
        w.sub_(mean.div(length).mul_(rate))


def train_together(  # noqa: PLR0917
    trainer: Trainer,
    params: State,
    data: Encoded,
    parts: Sequence[IntArray],
    jobs: Sequence[Job],
    own: Sequence[State],
) -> list[tuple[Update, State]]:
    """Train several clients from the global parameters, each as `Trainer.train` would alone.

    Args:
        trainer: whose model it is.
        params: the global parameters.
        data: the training set.
        parts: each client's rows of it.
        jobs: each client's job; its seed settles its batches, and all seeds together settle dropout.
        own: what each client keeps for itself.

    Returns:
        Each client's update, of fresh tensors, and what it keeps, in the order of the jobs.
    """
    began = time.perf_counter()
    steps = [num_steps(trainer.config, len(rows)) for rows in parts]
    lanes_of = sorted(range(len(jobs)), key=lambda i: -steps[i])
    lanes = Lanes(trainer, params, [own[i] for i in lanes_of], [jobs[i].lr for i in lanes_of])
    batches = [trainer.batches(data, parts[i], jobs[i]) for i in lanes_of]
    history, seen = [], [0] * len(jobs)
    trainer.model.train()
    with attention_of_all(trainer.model), torch_seeded(seed_for(jobs[0].seed, *(job.seed for job in jobs))):
        for number in range(max(steps)):
            rows = [next(batches[lane]) for lane in range(sum(s > number for s in steps))]
            losses = lanes.losses(stacked_batch(data, rows, trainer.device), len(rows))
            lanes.step_(losses)
            history.append(losses.detach())
            for lane, part in enumerate(rows):
                seen[lane] += len(part)
    sums = pad_sequence(history, batch_first=True).cpu().double().sum(0).tolist()
    deltas = (lanes.master - lanes.start).cpu()
    seconds = (time.perf_counter() - began) / sum(steps)
    results = {}
    for lane, i in enumerate(lanes_of):
        metrics = {
            "loss": sums[lane] / steps[i],
            "steps": float(steps[i]),
            "examples": float(seen[lane]),
            "seconds_train": seconds * steps[i],
        }
        kept = trainer.flat.read(lanes.master[lane], trainer.local) if trainer.local else {}
        delta = trainer.flat.read(deltas[lane], trainer.shared)
        update = Update(jobs[i], delta, float(len(parts[i])), metrics)
        results[i] = update, {name: t.clone() for name, t in kept.items()}
    return [results[i] for i in range(len(jobs))]


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
    inputs = data.batch(rows, torch.device("cpu"))
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
