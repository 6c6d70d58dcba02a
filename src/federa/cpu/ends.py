"""The ends of a transformer's sub-layers, in one pass each: what follows a product of matrices."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from federa.cpu import frozen, fused, native


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a linear map's output and the bias that is still to be added to it, if it is a plain one.

    Adding a bias in the pass that reads the output anyway saves a pass over it.
    """
    if type(layer) in {nn.Linear, frozen.FrozenLinear}:
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


def packed_of(layer: nn.Module, *inputs: Tensor | None) -> frozen.Packed | None:
    """Return the packed matrix of a layer that is a plain linear map, where all inputs are there and fit."""
    if type(layer) is not frozen.FrozenLinear or any(t is None for t in inputs):
        return None
    return frozen.packed(layer, *cast("tuple[Tensor, ...]", inputs))


class FusedOutput(nn.Module):  # type: ignore[misc, unused-ignore]
    """The end of a sub-layer: LayerNorm(dropout(dense(x)) + residual), in one pass after the product."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return the sub-layer's output, `(..., width)` like the residual `input_tensor`."""
        norm, library = self.LayerNorm, native.load()
        rate = self.dropout.p if self.training else 0.0
        matrix = packed_of(self.dense, hidden_states, input_tensor, norm.weight, norm.bias)
        if matrix is not None and input_tensor.shape == (*hidden_states.shape[:-1], len(matrix.weight)):
            ends = (input_tensor, norm.weight, norm.bias, norm.eps, rate)
            return cast("Tensor", frozen.LinearNorm.apply(matrix, hidden_states, self.dense.bias, *ends))
        h, bias = without_bias(self.dense, hidden_states)
        known = [t for t in (h, bias, input_tensor, norm.weight, norm.bias) if t is not None]
        scaled = norm.weight is not None and norm.bias is not None
        if library is None or not scaled or h.shape != input_tensor.shape or not fused.takes(*known):
            h = h if bias is None else h + bias
            return cast("Tensor", norm(self.dropout(h) + input_tensor))
        out = fused.Norm.apply(library, h, bias, input_tensor, norm.weight, norm.bias, norm.eps, rate)
        return cast("Tensor", out)


class FusedIntermediate(nn.Module):  # type: ignore[misc, unused-ignore]
    """The widening half of a feed-forward layer: GELU(dense(x)), in one pass after the product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return `(..., intermediate width)` of `(..., width)`."""
        matrix = packed_of(self.dense, hidden_states)
        if matrix is not None:
            return cast("Tensor", frozen.LinearGelu.apply(matrix, hidden_states, self.dense.bias))
        h, bias = without_bias(self.dense, hidden_states)
        library = native.load()
        if library is None or not fused.takes(*[t for t in (h, bias) if t is not None]):
            return cast("Tensor", self.intermediate_act_fn(h if bias is None else h + bias))
        return cast("Tensor", fused.Gelu.apply(library, h, bias))
