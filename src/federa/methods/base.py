"""The interface of methods, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from federa.registry import Component, Registry
from federa.state import snapshot, trained_parameters
from federa.types import FederaError, State

HeadMode = Literal["train", "freeze", "local"]
ExportFormat = Literal["peft", "merged", "federa"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a method may know when it prepares a model.

    Attributes:
        head: names of the task head's parameters.
        seed: of the run's start; a method's random parts must come from it, or server and clients differ.
        init: the round-0 state, when it exists already (a client, a resume, an export); None at the start.
        base: fingerprint of the pretrained encoder, a key for caches.
        cache: a folder that outlives the run; None to keep nothing.
    """

    head: frozenset[str]
    seed: int
    init: State | None = None
    base: str = ""
    cache: Path | None = None


class Method(Component, ABC):
    """Decides what trains, and from where.

    Attributes:
        head: the new task head is trained and averaged (`train`), kept as drawn (`freeze`), or trained by
            each client for itself and never sent (`local`).
        default_lr: the client's learning rate where the recipe gives none.
        moves_base: the frozen weights depend on the round-0 state, as FeDeRA's residual does: a client must
            be sent that state too, and an export must undo it.
        export_formats: what `federa export` can make of a run, the first being the default.
    """

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("federa",)
    default_lr: ClassVar[float] = 1e-3
    moves_base: ClassVar[bool] = False
    head: HeadMode = "train"

    @abstractmethod
    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:
        """Add the method's own modules to a pretrained model, in place.

        Returns:
            Which parameters of the encoder train, by name; the head is seen to by `prepare`.
        """

    def start(self, model: nn.Module, setup: Setup) -> None:
        """Move the trained parameters to their start (and the frozen ones along); by default leave them.

        With `setup.init` the start must be taken from it, to the bit, not computed again.
        """

    def merge(self, model: nn.Module) -> None:
        """Fold the method's own modules into plain layers, in place, for an export as `merged`.

        Raises:
            FederaError: the method has no merged form.
        """
        raise FederaError(f"method {self.name!r} cannot be merged into a plain checkpoint")

    def prepare(self, model: nn.Module, setup: Setup) -> dict[str, torch.Tensor]:
        """Edit a pretrained model in place; afterwards `requires_grad` says exactly what trains.

        Returns:
            The round-0 state: a float32 copy of all that trains, a local head included.

        Raises:
            FederaError: nothing to train, or `setup.init` does not fit.
        """
        trains = self.edit(model, setup)
        train_head = self.head != "freeze"
        for name, parameter in model.named_parameters():
            parameter.requires_grad = train_head if name in setup.head else trains(name)
        trained = trained_parameters(model)
        if not trained:
            raise FederaError(f"method {self.name!r} finds nothing to train in this model")
        if setup.init is not None:
            _copy_init_(trained, setup.init, optional=setup.head if self.head == "local" else frozenset())
        self.start(model, setup)
        return snapshot(trained)


def _copy_init_(trained: dict[str, nn.Parameter], init: State, optional: frozenset[str]) -> None:
    """Copy a round-0 state into the model; only what is optional (a local head) may be absent from it."""
    unknown = sorted(set(init) - set(trained))
    if unknown:
        raise FederaError(f"the initial state has {unknown[0]!r}, which this method does not train")
    absent = sorted(set(trained) - set(init) - optional)
    if absent:
        raise FederaError(f"the initial state lacks {absent[0]!r}, which this method trains")
    with torch.no_grad():
        for name, tensor in init.items():
            if tensor.shape != trained[name].shape:
                raise FederaError(
                    f"the initial state's {name!r} has shape {tuple(tensor.shape)}, "
                    f"expected {tuple(trained[name].shape)}"
                )
            trained[name].copy_(tensor)


METHODS: Registry[Method] = Registry("method")
