"""LoRA (Hu et al. 2022): W + s*B*A with W frozen; also rsLoRA's scale and DoRA's magnitudes.

The low-rank factors sit inside the very layer that they change, so every other name in the model stays what
the checkpoint calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from federa.cpu.frozen import LinearLowRank, is_frozen, packed
from federa.methods.base import METHODS, ExportFormat, Method, Setup
from federa.methods.targets import find_targets
from federa.seeds import torch_seeded
from federa.types import FederaError

DEFAULT_TARGETS = ("query", "value")
DEFAULT_RANK = 32  # on query and value: 0.95 % of roberta-base


class _LowRankLinear(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """x W' + b + scale * (x A') B', with every sum and scaling inside a matrix product; and x A'.

    Composed of torch's operations it makes three passes more over tensors as large as the output. x, A and B
    may have a leading dimension of clients, whose rows then meet the one W in one product.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        low = x @ A.mT
        return _add_product_(F.linear(x, weight, bias), low, B.mT, scale), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], weight, A, B)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, needs = grads[0], ctx.needs_input_grad
        x, low, weight, A, B = ctx.saved_tensors
        d_low = (grad @ B).mul_(ctx.scale)
        d_x = _add_product_(grad @ weight, d_low, A) if needs[0] else None
        d_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if needs[1] else None
        d_bias = grad.flatten(0, -2).sum(0) if needs[2] else None
        d_A = d_low.mT @ x if needs[3] else None
        d_B = (grad.mT @ low).mul_(ctx.scale) if needs[4] else None
        return d_x, d_weight, d_bias, d_A, d_B, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Give every client its factors, and all of them the one matrix unless that trains as well."""

        def lanes(i: int) -> Tensor:
            tensor, dim = args[i], in_dims[i]
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        x, A, B, (weight, bias), scale = lanes(0), lanes(3), lanes(4), args[1:3], args[5]
        if in_dims[1] is None and in_dims[2] is None:
            return _LowRankLinear.apply(x, weight, bias, A, B, scale), (0, 0)
        low = x @ A.mT
        y = torch.baddbmm(x @ lanes(1).mT, low, B.mT, alpha=scale)
        return (y if bias is None else y + lanes(2)[:, None], low), (0, 0)


def _add_product_(to: Tensor, one: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
    """Add a scaled matrix product in place, or one a client."""
    return to.addmm_(one, other, alpha=scale) if to.ndim == 2 else to.baddbmm_(one, other, alpha=scale)


class LoRALinear(nn.Linear):  # type: ignore[misc, unused-ignore]
    """A linear map with low-rank factors: `x W' + b` with `W' = W + scale * B A`.

    Attributes:
        lora_A: `(rank, in_features)`.
        lora_B: `(out_features, rank)`.
        scale: a number.
        magnitude: `(out_features,)` with DoRA (Liu et al. 2024, equation 5), else None.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., out_features)` of `(..., in_features)`."""
        if self.magnitude is None:
            flat = x.reshape(-1, x.shape[-1])
            matrix = packed(self, x, self.lora_A, self.lora_B)
            if matrix is not None and (self.bias is None or is_frozen(self.bias)):
                y = LinearLowRank.apply(matrix, flat, self.bias, self.lora_A, self.lora_B, self.scale)
                return cast("Tensor", y.view(*x.shape[:-1], self.out_features))
            y, _ = _LowRankLinear.apply(flat, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
            return y.view(*x.shape[:-1], self.out_features)
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        # The norm is a constant to the gradient: DoRA, section 4.3.
        length = self.row_norms().detach()
        y = F.linear(x, self.weight).add(low_rank, alpha=self.scale) * (self.magnitude / length)
        return y if self.bias is None else y + self.bias

    @property
    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scale, for whoever computes several maps at once; None where that is not all."""
        return (self.lora_A, self.lora_B, self.scale) if self.magnitude is None else None

    def product(self) -> Tensor:
        """Return `scale * B A`, `(out_features, in_features)`."""
        return self.scale * (self.lora_B @ self.lora_A)

    def row_norms(self) -> Tensor:
        """Return the L2 norms of the rows of `W + scale * B A`, `(out_features,)`."""
        return torch.linalg.vector_norm(self.weight + self.product(), dim=1)

    def merged_weight(self) -> Tensor:
        """Return the one matrix that does the same, `(out_features, in_features)`."""
        merged = self.weight + self.product()
        if self.magnitude is not None:
            merged = merged * (self.magnitude / self.row_norms())[:, None]
        return merged


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the layers with factors, by name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def scale_of(alpha: float | None, rank: int, *, rslora: bool = False) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023); alpha defaults to the rank."""
    alpha = rank if alpha is None else alpha
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def inject_lora(
    model: nn.Module,
    targets: tuple[str, ...] | str,
    rank: int,
    scale: float,
    seed: int,
    *,
    dora: bool = False,
) -> list[str]:
    """Give the target matrices factors in place: A uniform as in Hu et al.'s code, B zero.

    Returns:
        The names of the layers.

    Raises:
        FederaError: a rank larger than a target matrix.
    """
    found = find_targets(model, targets)
    with torch_seeded(seed), torch.no_grad():
        for name, layer in found.items():
            if rank > min(layer.weight.shape):
                shape = tuple(layer.weight.shape)
                raise FederaError(f"method.rank: {rank} is larger than the smaller side of {name} {shape}")
            layer.__class__ = LoRALinear
            assert isinstance(layer, LoRALinear)
            layer.scale = scale
            layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.magnitude = None
            if dora:
                layer.magnitude = nn.Parameter(torch.linalg.vector_norm(layer.weight, dim=1))
    return list(found)


def is_factor(name: str) -> bool:
    """Return whether a parameter is one of a LoRA layer's own."""
    return name.endswith((".lora_A", ".lora_B", ".magnitude"))


def merge_lora(model: nn.Module) -> None:
    """Turn every LoRA layer back into a plain linear map with the same output, in place."""
    for _, layer in list(lora_layers(model)):
        with torch.no_grad():
            layer.weight.copy_(layer.merged_weight())
        del layer.lora_A, layer.lora_B, layer.magnitude, layer.scale
        layer.__class__ = nn.Linear


@METHODS.register
class LoRA(Method):
    """Low-rank factors from a random A and a zero B.

    Attributes:
        rank: of the factors.
        alpha: the scale is alpha / rank; None means alpha = rank.
        targets: the matrices, see `targets.ALIASES`; `all-linear` for every one.
        rslora: scale by alpha / sqrt(rank) instead.
        dora: train the length of each row apart from its direction.
    """

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("peft", "merged")
    default_lr: ClassVar[float] = 3e-3
    name: Literal["lora"] = "lora"
    rank: int = Field(default=DEFAULT_RANK, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | Literal["all-linear"] = DEFAULT_TARGETS
    rslora: bool = False
    dora: bool = False

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        scale = scale_of(self.alpha, self.rank, rslora=self.rslora)
        inject_lora(model, self.targets, self.rank, scale, setup.seed, dora=self.dora)
        return is_factor

    def merge(self, model: nn.Module) -> None:  # noqa: D102
        merge_lora(model)
