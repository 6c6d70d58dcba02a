"""Full fine-tuning: every parameter trains and travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import nn

from federa.methods.base import METHODS, ExportFormat, Method, Setup


@METHODS.register
class FullFineTuning(Method):
    """All parameters, the yardstick of the parameter-efficient methods."""

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("merged",)
    default_lr: ClassVar[float] = 1e-4
    name: Literal["ft"] = "ft"

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        return lambda name: True

    def merge(self, model: nn.Module) -> None:
        """Do nothing: the model is plain already."""
