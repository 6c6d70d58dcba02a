"""BitFit (Ben Zaken et al. 2022): only the bias vectors train."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import nn

from federa.errors import DoesNotFitError
from federa.methods.base import METHODS, ExportFormat, Method, Setup


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


@METHODS.register
class BitFit(Method):
    """Every bias of the encoder, those of the layer norms included, and the head."""

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("merged",)
    default_lr: ClassVar[float] = 3e-3
    name: Literal["bitfit"] = "bitfit"

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        names = (name for name, _ in model.named_parameters() if name not in setup.head)
        if not any(_is_bias(name) for name in names):
            raise DoesNotFitError("method 'bitfit': this encoder has no biases to train; take another method")
        return _is_bias

    def merge(self, model: nn.Module) -> None:
        """Do nothing: the model is plain already."""
