"""FeDeRA (Yan, Tang, Shi, Yang, arXiv 2404.18848): LoRA that starts from the principal singular components.

For each target matrix W (out x in) and scale s = alpha / rank: W = U S V^T; the factors start as
B0 = U_r (S_r/s)^(1/2) and A0 = (S_r/s)^(1/2) V_r^T, so s*B0*A0 is the top-r part of W, and the frozen base is
the residual W - s*B0*A0: the model's output is what it was. The even split of the singular values, divided by
the scale first, is that of PiSSA (Meng et al. 2024); the paper's abstract leaves it open.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from federa.machine import available_cores
from federa.methods.base import METHODS, ExportFormat, Method, Setup
from federa.methods.lora import (
    DEFAULT_RANK,
    DEFAULT_TARGETS,
    LoRALinear,
    inject_lora,
    is_factor,
    lora_layers,
    merge_lora,
    scale_of,
)
from federa.seeds import generator, seed_for, torch_seeded
from federa.state import load_state, save_state
from federa.types import FederaError

Components = Literal["principal", "minor", "random"]
OVERSAMPLING = 16  # columns of the randomised SVD beyond the rank
POWER_ITERATIONS = 8


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: an SVD's last bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def singular_factors(
    weight: Tensor, chosen: Tensor, scale: float, randomized_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return factors A `(r, in)` and B `(out, r)` with `scale * B A` the chosen part of a matrix's SVD.

    Args:
        weight: `(out, in)`.
        chosen: `(r,)` indices of singular values, the largest being 0.
        scale: of the product.
        randomized_seed: of the randomised SVD, see `randomized_error`; None for the exact one.
    """
    weight = weight.float()
    if randomized_seed is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        columns = min(len(chosen) + OVERSAMPLING, *weight.shape)
        with torch_seeded(randomized_seed):
            u, s, v = torch.svd_lowrank(weight, q=columns, niter=POWER_ITERATIONS)
        vh = v.T
    root = (s[chosen] / scale).sqrt()
    return root[:, None] * vh[chosen], u[:, chosen] * root


def randomized_error(shape: tuple[int, int], rank: int) -> float:
    """Return how far the range that the randomised SVD finds may be from the best, in expectation.

    The expected spectral norm of what the range misses is at most this times the first singular value beyond
    the rank: Halko, Martinsson and Tropp 2011, corollary 10.10. FeDeRA's output at the start does not depend
    on it: the residual is taken against the factors as they are.

    Args:
        shape: of the matrix.
        rank: of the factors.
    """
    k, p, smallest = rank, OVERSAMPLING, min(shape)
    if rank + p >= smallest:
        return 1.0
    gap = 1 + math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * math.sqrt(smallest - k)
    return float(gap ** (1 / (2 * POWER_ITERATIONS + 1)))


@METHODS.register
class FeDeRA(Method):
    """LoRA whose factors start as singular components of each pretrained matrix, the residual frozen.

    Attributes:
        rank: of the factors.
        alpha: the scale is alpha / rank; None means alpha = rank.
        targets: the matrices, see `targets.ALIASES`; `all-linear` for every one.
        components: the largest singular components (the paper), the smallest, or r drawn at random.
        svd: `exact`, or `randomized` for large matrices (principal components only, see `randomized_error`);
            the server alone computes it, and clients take what they are sent.
    """

    export_formats: ClassVar[tuple[ExportFormat, ...]] = ("peft", "merged")
    default_lr: ClassVar[float] = 3e-3
    moves_base: ClassVar[bool] = True
    name: Literal["federa"] = "federa"
    rank: int = Field(default=DEFAULT_RANK, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | Literal["all-linear"] = DEFAULT_TARGETS
    components: Components = "principal"
    svd: Literal["exact", "randomized"] = "exact"

    @model_validator(mode="after")
    def _randomized_finds_the_largest(self) -> Self:
        if self.svd == "randomized" and self.components != "principal":
            raise ValueError("svd: randomized finds the principal components only; use svd: exact")
        return self

    def edit(self, model: nn.Module, setup: Setup) -> Callable[[str], bool]:  # noqa: D102
        inject_lora(model, self.targets, self.rank, scale_of(self.alpha, self.rank), setup.seed)
        return is_factor

    def start(self, model: nn.Module, setup: Setup) -> None:
        """Set the factors by SVD (or take the sent ones), and the frozen weights to the residual.

        A client never runs an SVD: it subtracts the product of the factors that it was sent.
        """
        with torch.no_grad(), _one_thread():
            if setup.init is None:
                factors = self._factors(model, setup)
                for name, layer in lora_layers(model):
                    layer.lora_A.copy_(factors[f"{name}.lora_A"])
                    layer.lora_B.copy_(factors[f"{name}.lora_B"])
            for _, layer in lora_layers(model):
                layer.weight.sub_(layer.product())

    def merge(self, model: nn.Module) -> None:  # noqa: D102
        merge_lora(model)

    def _factors(self, model: nn.Module, setup: Setup) -> dict[str, Tensor]:
        """Return the factors of all layers, from the cache if a run like this one left them there."""
        key = f"{setup.base} {self.rank} {scale_of(self.alpha, self.rank)} {self.targets} {self.components}"
        if self.svd == "randomized":
            key += " randomized"
        if self.components == "random" or self.svd == "randomized":
            key += f" {setup.seed}"
        name = f"svd-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        file = setup.cache / name if setup.cache is not None and setup.base else None
        layers = dict(lora_layers(model))
        if file is not None and file.is_file():
            try:
                cached, _ = load_state(file)
            except FederaError:
                cached = {}  # a damaged file is written anew
            wanted = {f"{n}.lora_A": layer.lora_A.shape for n, layer in layers.items()}
            wanted |= {f"{n}.lora_B": layer.lora_B.shape for n, layer in layers.items()}
            if {n: t.shape for n, t in cached.items()} == wanted:
                return cached

        def decompose(index: int, layer: LoRALinear) -> tuple[Tensor, Tensor]:
            with torch.no_grad():  # which is a setting of the thread
                chosen = self._choose(layer, setup.seed, index)
                draw = None if self.svd == "exact" else seed_for(setup.seed, "svd", index)
                return singular_factors(layer.weight, chosen, layer.scale, draw)

        # One matrix a core, each on one thread: the same bits as one after the other. The randomised one
        # draws from torch's only generator, so it takes no turns with others.
        cores = available_cores() if self.svd == "exact" else 1
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pairs = list(pool.map(decompose, range(len(layers)), layers.values()))
        factors = {}
        for layer_name, (a, b) in zip(layers, pairs, strict=True):
            factors[f"{layer_name}.lora_A"], factors[f"{layer_name}.lora_B"] = a, b
        if file is not None:
            with suppress(OSError):  # without a cache the next run pays again, nothing else
                own = file.with_stem(f"{file.stem}-{os.getpid()}")  # another run may write the same start
                save_state(own, factors, {"base": setup.base})
                own.replace(file)
        return factors

    def _choose(self, layer: LoRALinear, seed: int, index: int) -> Tensor:
        """Return which singular values a layer's factors take, `(rank,)`."""
        total = min(layer.weight.shape)
        if self.components == "principal":
            return torch.arange(self.rank)
        if self.components == "minor":
            return torch.arange(total - self.rank, total)
        drawn = generator(seed, "components", index).choice(total, self.rank, replace=False)
        return torch.from_numpy(drawn).sort().values
