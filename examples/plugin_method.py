"""A method in one file: FFA-LoRA (Sun et al. 2024, arXiv 2403.12313).

LoRA whose A is random and frozen: only B trains and travels, half of the bytes, and the mean of the clients'
products B A is the product of their mean B, which does not hold for LoRA. Use it from a recipe:

    plugins: [plugin_method.py]
    method: {name: ffa_lora, rank: 16}
"""

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from federa.methods import METHODS, Method, Setup
from federa.methods.lora import inject_lora, merge_lora


@METHODS.register
class FFALoRA(Method):
    """Every field is a key of the recipe, `head` (from Method) as well; pydantic checks the values."""

    export_formats: ClassVar = ("peft", "merged")  # an adapter folder for peft, or a plain checkpoint
    default_lr: ClassVar[float] = 3e-3
    name: Literal["ffa_lora"] = "ffa_lora"
    rank: int = Field(default=32, ge=1)
    targets: tuple[str, ...] = ("query", "value")

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:
        """Change the model in place, and return which of the encoder's parameters train."""
        # A stays where it starts, so it must come from the run's seed: it is never sent.
        inject_lora(model, self.targets, self.rank, scale=1.0, seed=setup.seed)
        return lambda name: name.endswith(".lora_B")

    def merge(self, model: nn.Module) -> None:
        """Fold the factors into the weights, for `federa export --format merged`."""
        merge_lora(model)
