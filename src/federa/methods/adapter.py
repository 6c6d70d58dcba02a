"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021): h + up(act(down(h))), the rest frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from federa.cpu.frozen import linear
from federa.methods.base import METHODS, Method, Setup
from federa.methods.targets import find_targets
from federa.seeds import torch_seeded

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


class AdapterLinear(nn.Linear):  # type: ignore[misc, unused-ignore]
    """The last linear map of a sub-layer, followed by a bottleneck with a skip connection.

    Attributes:
        down: to the bottleneck, `(width, out_features)`.
        up: back, `(out_features, width)`; zero at the start, so that the adapter is the identity.
        activation: a key of `gelu | relu | tanh`.
    """

    down: nn.Linear
    up: nn.Linear
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., out_features)` of `(..., in_features)`."""
        hidden = linear(self, x)
        return hidden + self.up(_ACTIVATIONS[self.activation](self.down(hidden)))


@METHODS.register
class Adapter(Method):
    """Bottleneck adapters, after each sub-layer's last projection and before its skip connection.

    Attributes:
        placement: after attention and feed-forward (`houlsby`), or after feed-forward only (`pfeiffer`).
        width: of the bottleneck.
        activation: between the two projections.
    """

    default_lr: ClassVar[float] = 3e-3
    name: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    width: int = Field(default=64, ge=1)
    activation: Literal["gelu", "relu", "tanh"] = "gelu"

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        places = ("ffn_output",) if self.placement == "pfeiffer" else ("attention_output", "ffn_output")
        found = find_targets(model, places)
        with torch_seeded(setup.seed):
            for layer in found.values():
                layer.__class__ = AdapterLinear
                assert isinstance(layer, AdapterLinear)
                layer.activation = self.activation
                layer.down = nn.Linear(layer.out_features, self.width)
                layer.up = nn.Linear(self.width, layer.out_features)
                # Houlsby et al., section 3.6: a small start keeps the network near its own function.
                nn.init.normal_(layer.down.weight, std=1e-2)
                for tensor in (layer.down.bias, layer.up.weight, layer.up.bias):
                    nn.init.zeros_(tensor)
        own = tuple(f"{name}.{part}." for name in found for part in ("down", "up"))
        return lambda name: name.startswith(own)
