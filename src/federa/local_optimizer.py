"""From a client's gradient to its next parameters: FedProx's pull, clipping, AdamW or SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from federa.flat_parameters import FlatParameters

if TYPE_CHECKING:
    from federa.client import ClientConfig


class LocalOptimizer:
    """Changes flat parameters by their gradient, in place.

    On a GPU, where steps may be recorded (`cuda_graphs.py`), what differs from job to job is in tensors: also
    where they are not, for a rate on the host has other last bits.

    Args:
        flat: the parameters, which stay where they are.
        config: the client's part of the recipe.

    Attributes:
        start: what the parameters were when the job began.
    """

    def __init__(self, flat: FlatParameters, config: ClientConfig) -> None:
        self._flat, self._config = flat, config
        self.start = torch.empty_like(flat.master)
        device = flat.master.device
        on_gpu = device.type == "cuda"
        groups: list[dict[str, Any]] = []
        for span, is_head, decays in flat.segments:
            vector = flat.master[span]
            vector.grad = flat.gradient[span]
            decay = config.weight_decay if decays else 0.0
            rate = torch.zeros((), device=device) if on_gpu else 0.0
            groups.append({"params": [vector], "weight_decay": decay, "lr": rate, "is_head": is_head})
        self._optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(groups, momentum=config.momentum, fused=on_gpu or None)
        else:
            self._optimizer = torch.optim.AdamW(groups, fused=True, capturable=on_gpu)

    def restart(self, lr: float, head_lr: float) -> None:
        """Begin a job at these learning rates, from the parameters as they are, having seen no gradient."""
        self.start.copy_(self._flat.master)
        for group in self._optimizer.param_groups:
            rate = head_lr if group["is_head"] else lr
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        for state in self._optimizer.state.values():
            for tensor in state.values():
                if tensor is not None:
                    tensor.zero_()

    def step(self) -> None:
        """Change the parameters, and the model's views of them."""
        flat, config = self._flat, self._config
        if config.proximal:
            flat.gradient.add_(flat.master - self.start, alpha=config.proximal)
        if config.clip_norm:
            length = torch.linalg.vector_norm(flat.gradient)
            flat.gradient.mul_((config.clip_norm / (length + 1e-6)).clamp(max=1.0))
        self._optimizer.step()
        flat.push_()
