"""What makes a step on a GPU fast before it is recorded: no waits, no passes that a product could make."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from federa.cpu.first_token import read_first_token_only
from federa.cpu.frozen import is_frozen
from federa.cpu.plain import is_transforming
from federa.masks import use_ready_masks
from federa.models import family


def recordable(model: Any) -> bool:
    """Return whether a model's steps may be recorded: those of families that take our masks, DeBERTa's."""
    return bool(getattr(model, "_supports_attention_backend", False)) or family(model) == "deberta-v2"


def speed_up(model: Any) -> None:
    """Change a transformers model in place, for a GPU: what it computes stays the same, to rounding.

    It is still on the CPU, where made-up texts tell whether that is so.
    """
    if family(model) == "deberta-v2":
        from federa.cpu.disentangled import attend_along_diagonals  # loads that family's model

        attend_along_diagonals(model)
    read_first_token_only(model, _is_end, _of_first_token)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SharedLinear
    use_ready_masks(model)


class SharedLinear(nn.Linear):  # type: ignore[misc, unused-ignore]
    """A drop-in for `nn.Linear`: while it is frozen, clients side by side meet it in one product."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., out_features)` of `(..., in_features)`."""
        if is_transforming() and is_frozen(self.weight) and (self.bias is None or is_frozen(self.bias)):
            return cast("Tensor", _Shared.apply(x, self.weight, self.bias))
        return F.linear(x, self.weight, self.bias)


class _Shared(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """x W' + b, frozen: torch's own rule for clients takes a pass more to add the bias."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), grad = ctx.saved_tensors, grads[0]
        return (grad.reshape(-1, len(weight)) @ weight).view(*grad.shape[:-1], -1), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        assert in_dims[0] is not None, "the rest is frozen"
        return _Shared.apply(x.movedim(in_dims[0], 0), weight, bias), 0


def _is_end(module: Any) -> bool:
    """Return whether a module is the end of a sub-layer of BERT's kind; on a CPU those are fused."""
    parts = module.named_children() if isinstance(module, nn.Module) else ()
    return {name for name, _ in parts} == {"dense", "LayerNorm", "dropout"}


def _of_first_token(end: type[nn.Module]) -> type[nn.Module]:
    """Return the end of a sub-layer whose residual is the first token's."""

    def forward(self: nn.Module, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return cast("Tensor", end.forward(self, hidden_states, input_tensor[:, :1]))

    return type(f"FirstToken{end.__name__}", (end,), {"forward": forward})
