"""Linear probing: the encoder stays as it is, only the head trains. The floor of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import nn

from federa.methods.base import METHODS, ExportFormat, Method, Setup


@METHODS.register
class Probe(Method):
    """Only the task head trains; with `head=freeze` nothing would."""

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("merged",)
    default_lr: ClassVar[float] = 3e-3
    name: Literal["probe"] = "probe"

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        return lambda name: False

    def merge(self, model: nn.Module) -> None:
        """Do nothing: the model is plain already."""
