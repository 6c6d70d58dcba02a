"""Products with frozen matrices, which are packed once for the processor's matrix tiles.

A library of matrix products packs a matrix anew at every call, and writes a result out before the next pass
reads it. A frozen matrix can stay packed for the whole run, and what follows a product (a bias, GELU, the end
of a sub-layer) can take each block of rows from the nearest cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from federa.cpu import native
from federa.cpu.fused import at, norm_backward, seed_of
from federa.cpu.plain import Stackable

TILE = 32  # sides of a matrix are multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A frozen matrix in the order in which matrix tiles read it.

    Attributes:
        library: the compiled kernels.
        weight: the matrix, `(out, in)` bfloat16: held, so that nothing else comes to lie at its address.
        version: of `weight` when it was packed.
        forward: for x W', packed.
        backward: for g W, packed.
    """

    library: CDLL
    weight: Tensor
    version: int
    forward: Tensor
    backward: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Be nothing in a copy of the model, which packs its own."""
        return type(None), ()

    def is_of(self, weight: Tensor) -> bool:
        """Return whether this still is what a matrix holds."""
        kept = self.weight
        same = kept.data_ptr() == weight.data_ptr() and self.version == weight._version
        return bool(same and kept.dtype is weight.dtype and kept.stride() == weight.stride())


def is_frozen(tensor: Tensor) -> bool:
    """Return whether a tensor is the model's own and does not train.

    `functional_call` puts tensors that train in the place of parameters, and they need not say so.
    """
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def packed(layer: nn.Linear, *inputs: Tensor) -> Packed | None:
    """Return a layer's packed matrix if it is frozen and the tiles take it and the inputs, else None.

    Args:
        layer: whose matrix.
        inputs: what goes in, `(..., in)`, first, and whatever else meets the product.
    """
    own, library = layer._parameters, native.load()  # a module's own search for them is slow
    weight, bias = own.get("weight"), own.get("bias")  # a parametrised one is elsewhere
    if library is None or weight is None or not is_frozen(weight):
        return None
    if any(t.dtype is not torch.bfloat16 for t in (inputs if bias is None else (bias, *inputs))):
        return None
    if inputs and inputs[0].shape[-1] != weight.shape[1]:
        return None
    kept: Packed | None = layer.__dict__.get("packed")
    if kept is None or not kept.is_of(weight):
        if not _takes(library, weight):
            return None
        kept = layer.__dict__["packed"] = _pack(library, weight.detach())
    return kept


def _takes(library: CDLL, weight: Tensor) -> bool:
    """Return whether the tiles take a frozen matrix."""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and not weight.is_inference()  # which does not say when it changes
        and all(side % TILE == 0 for side in weight.shape)
        and bool(library.has_tiles())
    )


def _pack(library: CDLL, weight: Tensor) -> Packed:
    source = weight.contiguous()
    forward, backward = torch.empty_like(source), torch.empty_like(source)
    library.pack(at(source), at(forward), *source.shape, 1)
    library.pack(at(source), at(backward), *source.shape, 0)
    return Packed(library, weight, weight._version, forward, backward)


def pack_all(model: nn.Module) -> None:
    """Pack what is frozen before it is asked for, so that processes that are forked later share it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and getattr(module, "magnitude", None) is None:  # DoRA takes no part
            packed(module)


class FrozenLinear(nn.Linear):  # type: ignore[misc, unused-ignore]
    """A drop-in for `nn.Linear` that is faster while its matrix is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., out_features)` of `(..., in_features)`."""
        return linear(self, x)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return what an `nn.Linear` computes of `(..., in_features)`, by the fastest way there is."""
    matrix = packed(layer, x)
    if matrix is None:
        return F.linear(x, layer.weight, layer.bias)
    if layer.bias is None or is_frozen(layer.bias):
        return cast("Tensor", Linear.apply(matrix, x, layer.bias))
    return cast("Tensor", Linear.apply(matrix, x, None) + layer.bias)


def multiply(
    library: CDLL,
    x: Tensor,
    matrix: Tensor,
    cols: int,
    *,
    bias: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Return (x matrix + bias) * after, `(..., cols)`; the matrix is one of a `Packed`."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], cols)
    shape = (x.numel() // x.shape[-1], x.shape[-1], cols)
    factors = (None, None, 0, 0, 0.0, None)
    library.linear(*map(at, (x, matrix, bias, after, y)), *shape, *factors, torch.get_num_threads())
    return y


def entry(
    matrix: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    scale: float = 0.0,
    *,
    transposed: bool = False,
) -> native.Map:
    """Return one of several products for the kernels.

    Args:
        matrix: one of a `Packed`.
        rows: what comes out, or goes in.
        bias: is added.
        factors: first and second, and what comes between them, see `_multiply_low_rank`.
        scale: of the factors.
        transposed: see `_multiply_low_rank`.
    """
    first, second, low = factors
    rank = 0 if low is None else low.shape[-1]
    return native.Map(*map(at, (matrix, bias, rows, first, second)), transposed, rank, scale, at(low))


def sum_of_maps(
    library: CDLL, entries: list[native.Map], sides: Sequence[int], start: Tensor | None, y: Tensor
) -> Tensor:
    """Return start + the sum of products in y, which may be start; sides are those of a matrix."""
    table, (depth, cols) = (native.Map * len(entries))(*entries), sides
    shape = (y.numel() // cols, depth, cols)
    library.linear_sum(table, len(entries), at(start), at(y), *shape, torch.get_num_threads())
    return y


class Linear(Stackable):
    """x W' + bias: (packed W, x, frozen bias or None)."""

    @staticmethod
    def forward(ctx: Any, matrix: Packed, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        ctx.matrix = matrix
        return multiply(matrix.library, x, matrix.forward, len(matrix.weight), bias=bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        matrix = ctx.matrix
        d_x = multiply(matrix.library, grads[0], matrix.backward, matrix.weight.shape[1])
        return None, d_x, None

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], matrix: Packed, x: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        assert in_dims[1] is not None
        return Linear.apply(matrix, x.movedim(in_dims[1], 0), bias), 0


class LinearGelu(Stackable):
    """GELU(x W' + bias): (packed W, x, bias or None)."""

    @staticmethod
    def forward(ctx: Any, matrix: Packed, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        y, slope = gelu(matrix, x, bias, wanted=any(ctx.needs_input_grad))
        ctx.matrix = matrix
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (slope,), matrix, needs = ctx.saved_tensors, ctx.matrix, ctx.needs_input_grad
        grad = slope * grads[0]
        d_x = multiply(matrix.library, grad, matrix.backward, matrix.weight.shape[1]) if needs[1] else None
        d_bias = grad.flatten(0, -2).sum(0) if needs[2] else None
        return None, d_x, d_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        matrix, x, bias = args
        if in_dims[2] is not None or in_dims[1] is None:
            return LinearGelu.one_by_one(info.batch_size, in_dims, args)
        return LinearGelu.apply(matrix, x.movedim(in_dims[1], 0), bias), 0


def gelu(matrix: Packed, x: Tensor, bias: Tensor | None, *, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return GELU(x W' + bias) and, where it is wanted, the slope there."""
    cols, depth = matrix.weight.shape
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], cols)
    slope = torch.empty_like(y) if wanted else None
    tensors = map(at, (x, matrix.forward, bias, y, slope))
    matrix.library.linear_gelu(*tensors, x.numel() // depth, depth, cols, torch.get_num_threads())
    return y, slope


class LinearNorm(Stackable):
    """LN(dropout(x W' + bias) + residual): (packed W, x, bias or None, residual, weight, beta, eps, rate)."""

    @staticmethod
    def forward(ctx: Any, matrix: Packed, *others: Any) -> Tensor:  # noqa: D102
        y, *saved = norm(ctx, matrix, *others)
        ctx.matrix = matrix
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        matrix, needs = ctx.matrix, ctx.needs_input_grad
        d_h, *others = norm_backward(ctx, grads[0], needs[1:])
        assert d_h is not None
        depth = matrix.weight.shape[1]
        d_x = multiply(matrix.library, d_h, matrix.backward, depth) if needs[1] else None
        return None, d_x, *others, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        matrix, x, bias, residual, *rest = args
        if [i for i, dim in enumerate(in_dims) if dim is not None] != [1, 3]:  # scales of each client's own
            return LinearNorm.one_by_one(info.batch_size, in_dims, args)
        x, residual = x.movedim(in_dims[1], 0), residual.movedim(in_dims[3], 0)
        return LinearNorm.apply(matrix, x, bias, residual, *rest), 0


def norm(  # noqa: PLR0917
    ctx: Any,
    matrix: Packed,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    beta: Tensor,
    eps: float,
    rate: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return LN(dropout(x W' + bias) + residual), and what `norm_backward` finds saved."""
    library, (cols, depth) = matrix.library, matrix.weight.shape
    x, residual, weight, beta = (t.contiguous() for t in (x, residual, weight, beta))
    bias = None if bias is None else bias.contiguous()
    rows = x.numel() // depth
    y = torch.empty_like(residual)
    wanted = any(ctx.needs_input_grad)
    normed = torch.empty_like(residual) if wanted else None
    rstd = torch.empty(rows) if wanted else None
    ctx.library, ctx.rate, ctx.seed = library, rate, seed_of(rate)
    tensors = map(at, (x, matrix.forward, bias, residual, weight, beta, y, normed, rstd))
    library.linear_norm(*tensors, rows, depth, cols, eps, rate, ctx.seed, torch.get_num_threads())
    return y, normed, rstd, weight


class LinearLowRank(Stackable):
    """x W' + bias + scale * (x A') B': (packed W, x, frozen bias or None, A, B, scale).

    x is `(rows, in)`, or `(clients, rows, in)` with A `(clients, rank, in)` and B `(clients, out, rank)`.
    """

    @staticmethod
    def forward(  # noqa: D102, PLR0917
        ctx: Any, matrix: Packed, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
        y, low = _multiply_low_rank(matrix.library, x, matrix.forward, bias, A, B, scale, transposed=True)
        ctx.matrix, ctx.scale = matrix, scale
        ctx.save_for_backward(x, low, A, B)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        matrix, grad, needs = ctx.matrix, grads[0].contiguous(), ctx.needs_input_grad
        x, low, A, B = ctx.saved_tensors
        if needs[1]:
            d_x, d_low = _multiply_low_rank(
                matrix.library, grad, matrix.backward, None, B, A, ctx.scale, transposed=False
            )
        else:  # nothing below trains
            d_x, d_low = None, (grad @ B).mul_(ctx.scale)
        d_A = sum_of_products(matrix.library, d_low, x) if needs[3] else None
        d_B = sum_of_products(matrix.library, low, grad, transposed=True) if needs[4] else None
        return None, d_x, None, d_A, d_B, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        def lanes(i: int) -> Tensor:
            tensor, dim = args[i], in_dims[i]
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        return LinearLowRank.apply(args[0], lanes(1), args[2], lanes(3), lanes(4), args[5]), 0


def _multiply_low_rank(  # noqa: PLR0917
    library: CDLL,
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Return x matrix + bias + low second, and low = scale * x first, for one client or for each.

    Factors that are `transposed` are given as `(rank, in)` and `(out, rank)`.
    """
    bias = None if bias is None else bias.contiguous()
    cols, rank = second.shape[-2:] if transposed else second.shape[:-3:-1]
    y, low = x.new_empty(*x.shape[:-1], cols), x.new_empty(*x.shape[:-1], rank)
    several = (x, first, second, y, low)
    for client in zip(*several, strict=True) if x.ndim == 3 else [several]:
        own, one, other, out, narrow = map(at, client)
        shape = (*client[0].shape, cols)
        factors = (one, other, int(transposed), rank, scale, narrow)
        library.linear(own, at(matrix), at(bias), None, out, *shape, *factors, torch.get_num_threads())
    return y, low


def sum_of_products(library: CDLL, thin: Tensor, wide: Tensor, *, transposed: bool = False) -> Tensor:
    """Return thin' wide, `(rank, width)`, or that transposed; for one client or for each."""
    thin, wide = thin.contiguous(), wide.contiguous()
    (rows, rank), width = thin.shape[-2:], wide.shape[-1]
    sides = (width, rank) if transposed else (rank, width)
    out = thin.new_empty(*thin.shape[:-2], *sides)
    several = (thin, wide, out)
    for client in zip(*several, strict=True) if thin.ndim == 3 else [several]:
        library.sum_of_products(*map(at, client), rows, rank, width, int(transposed), torch.get_num_threads())
    return out
