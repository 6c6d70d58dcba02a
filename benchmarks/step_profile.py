"""Where the time of a local step goes, and what its products with frozen matrices take by themselves.

    python benchmarks/step_profile.py [--shapes 16x64 32x128] [KEY=VALUE ...]     # keys of measured_run.py

One thread. Each call of a kernel is timed while a client takes its steps; what is left is Python, autograd
and torch's own operations. The products, of the very shapes that the model has, are timed by that thread's
own clock, in turns: the tiles alone with the packed matrix (rows are put in order and multiplied, and what
comes out is left), with each end that the model gives a product of that shape, and by oneDNN, which packs
the matrix at every call. Prints Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measured_run import recipe
from torch import nn
from torch.nn import functional as F
from turns import Way, head, in_turns, row, shown

from federa.cpu import frozen, native
from federa.cpu.ends import FusedIntermediate, FusedOutput
from federa.engines.base import keep_freed_memory
from federa.experiment import Experiment, build_experiment, resolve
from federa.methods.lora import LoRALinear
from federa.server import make_jobs

KINDS = {  # of the kernels' functions
    "products, and the factors beside them": ("linear", "linear_each", "linear_sum"),
    "products with GELU and its slope": ("linear_gelu",),
    "products with dropout, residual and norm": ("linear_norm",),
    "attention, there": ("attention", "attention_one_bf16", "attention_one_f32"),
    "attention, back": ("attention_backward", "attention_one_backward_bf16", "attention_one_backward_f32"),
    "the norms' gradients": ("norm_backward_bf16", "norm_backward_f32"),
    "the factors' gradients": ("sum_of_products",),
    "norm, GELU and dropout by themselves": tuple(
        f"{name}_{numbers}" for name in ("norm", "gelu", "dropout") for numbers in ("bf16", "f32")
    ),
}
REST = "Python, autograd, torch's operations"
# The product without its end; the kernels themselves have no use for it.
ALONE = """
#include "{source}"
extern "C" void alone(const bf16 *x, const bf16 *W, int64_t rows, int64_t k, int64_t n) {{
    product({{x, rows, k}}, W, n, {{}}, 1, [](int64_t, const float *, float *) {{}});
}}
"""
PEAK_SIDE = 2048


def build(folder: Path, batch: int, tokens: int, steps: int, changes: dict[str, Any]) -> Experiment:
    """Return an experiment whose clients take some steps of a shape."""
    shape = {"task.max_length": tokens, "client.batch_size": batch, "client.max_steps": steps}
    few = {"partition.clients": 2, "cohort": 2}
    return build_experiment(resolve(recipe(folder, {**few, **shape, **changes}, examples=steps * batch)))


def milliseconds(experiment: Experiment, repeats: int) -> list[dict[str, float]]:
    """Return the milliseconds of each kind in a step, for each of some jobs of the same client."""
    job = make_jobs(experiment.config, 1, [len(part) for part in experiment.parts])[0]
    experiment.train_client(experiment.params, job)  # warms up
    found = []
    for _ in range(repeats):
        with timed_kernels() as spent:
            began = time.perf_counter()
            update = experiment.train_client(experiment.params, job)
            whole = time.perf_counter() - began
        steps = update.metrics["steps"]
        of = {kind: sum(spent[name] for name in names) for kind, names in KINDS.items()}
        of[REST] = whole - sum(of.values())
        found.append({kind: 1e3 * seconds / steps for kind, seconds in of.items()})
    return found


@contextmanager
def timed_kernels() -> Iterator[dict[str, float]]:
    """Add up the seconds that are spent in each function of the kernels."""
    library, spent = native.load(), defaultdict(float)
    names = [name for kind in KINDS.values() for name in kind] if library is not None else []
    plain = {name: getattr(library, name) for name in names if hasattr(library, name)}

    def timed(name: str) -> Callable[..., None]:
        def call(*args: object) -> None:
            began = time.perf_counter()
            plain[name](*args)
            spent[name] += time.perf_counter() - began

        return call

    for name in plain:
        setattr(library, name, timed(name))
    try:
        yield spent
    finally:
        for name, function in plain.items():
            setattr(library, name, function)


def ends_of(model: nn.Module) -> dict[tuple[int, int], set[str]]:
    """Return what follows the products with packed matrices, by their shape `(in, out)`."""
    found: dict[tuple[int, int], set[str]] = defaultdict(set)
    after = {
        id(module.dense): "GELU and its slope" if isinstance(module, FusedIntermediate) else "dropout, norm"
        for module in model.modules()
        if isinstance(module, FusedIntermediate | FusedOutput)
    }
    for module in model.modules():
        if module.__dict__.get("packed") is not None:
            end = "factors" if isinstance(module, LoRALinear) else after.get(id(module), "bias")
            found[module.in_features, module.out_features].add(end)
    return found


def compile_alone(folder: Path) -> ctypes.CDLL:
    """Return a library with `alone`."""
    source, to = folder / "alone.cpp", folder / "alone.so"
    source.write_text(ALONE.format(source=native.SOURCE))
    done = native._run([*native._compiler(), *native.FLAGS, str(source), "-o", str(to)])
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(to))
    library.alone.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
    return library


def products(
    library: ctypes.CDLL, rows: int, shape: tuple[int, int], ends: set[str], rank: int
) -> dict[str, Way]:
    """Return the ways to multiply random rows with a random matrix of a shape, by what follows."""
    depth, width = shape
    draw = lambda *sides: torch.randn(*sides).bfloat16()  # noqa: E731
    x, weight, bias = draw(rows, depth), draw(width, depth), draw(width)
    residual, scale, beta, A, B = (
        draw(rows, width),
        draw(width),
        draw(width),
        draw(rank, depth),
        draw(width, rank),
    )
    kernels = native.load()
    assert kernels is not None
    matrix, trained = frozen._pack(kernels, weight), x.clone().requires_grad_()
    low = (matrix.forward, bias, A, B, 1.0)
    norm = (residual, scale, beta, 1e-12, 0.1)
    ways: dict[str, Way] = {
        "tiles alone": lambda: library.alone(x.data_ptr(), matrix.forward.data_ptr(), rows, depth, width),
        "bias": lambda: frozen.multiply(kernels, x, matrix.forward, width, bias=bias),
        "factors": lambda: frozen._multiply_low_rank(kernels, x, *low, transposed=True),
        "GELU and its slope": lambda: frozen.LinearGelu.apply(matrix, trained, bias),
        "dropout, norm": lambda: frozen.LinearNorm.apply(matrix, trained, bias, *norm),
        "oneDNN": lambda: F.linear(x, weight, bias),
    }
    return {name: way for name, way in ways.items() if name in {"tiles alone", "bias", "oneDNN", *ends}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--shapes", nargs="+", default=["16x64", "32x128"], help="batch x tokens")
    parser.add_argument("--steps", type=int, default=5, help="of a client")
    parser.add_argument("--repeats", type=int, default=7, help="of a client, and of 20 calls of each product")
    asked = parser.parse_args()
    changes = {key: json.loads(value) for key, value in (word.split("=", 1) for word in asked.changes)}
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        for shape in asked.shapes:
            batch, tokens = map(int, shape.split("x"))
            experiment = build(Path(scratch), batch, tokens, asked.steps, changes)
            show_kinds(f"{batch} x {tokens} tokens", milliseconds(experiment, asked.repeats))
            show_products(Path(scratch), experiment, batch * tokens, asked.repeats)


def show_kinds(shape: str, found: Sequence[dict[str, float]]) -> None:
    """Print where the time of a step goes."""
    whole = [sum(of.values()) for of in found]
    print(f"\n{shape}, a step: {shown(whole, 1)} ms\n\n{head('kind', 'ms', 'share')}")
    for kind in found[0]:
        own = [of[kind] for of in found]
        share = statistics.median(part / of for part, of in zip(own, whole, strict=True))
        print(row(kind, shown(own, 1), f"{share:.1%}"))


def show_products(scratch: Path, experiment: Experiment, rows: int, repeats: int) -> None:
    """Print what the products of a step take by themselves."""
    found = ends_of(experiment.trainer.model)
    if not found:
        print(f"\nno packed matrices here: {native.status()}")
        return
    rank = getattr(experiment.config.method, "rank", 0)
    square = torch.randn(PEAK_SIDE, PEAK_SIDE).bfloat16()
    ends = ("bias", "factors", "GELU and its slope", "dropout, norm")
    floor = f"at the pace of {PEAK_SIDE} x {PEAK_SIDE}"
    print(f"\n{head(f'ms, {rows} rows by', floor, 'tiles alone', *(f'with {e}' for e in ends), 'oneDNN')}")
    library = compile_alone(scratch)
    for (depth, width), after in sorted(found.items()):
        ways = {floor: lambda: square @ square, **products(library, rows, (depth, width), after, rank)}
        seconds = in_turns(ways, repeats, times=20, clock=time.thread_time)
        share = rows * depth * width / PEAK_SIDE**3
        seconds[floor] = [s * share for s in seconds[floor]]
        names = (floor, "tiles alone", *ends, "oneDNN")
        cells = [shown(seconds[name], 1e-3) if name in seconds else "" for name in names]
        print(row(f"{depth} x {width}", *cells), flush=True)


if __name__ == "__main__":
    main()
