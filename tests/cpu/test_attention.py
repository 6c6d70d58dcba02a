"""Sub-layers as one function each against float64 and against their parts: values, gradients, dropout, threads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from federa.cpu import attention, feed_forward, frozen, native
from federa.cpu.ends import FusedIntermediate, FusedOutput
from federa.methods.lora import LoRALinear
from federa.seeds import torch_seeded
from running import build

TOLERANCE = 1.2e-2  # relative to the norm: bf16 keeps 8 bits
SCALE = 0.7


@pytest.fixture(autouse=True)
def tiles() -> None:
    library = native.load()
    if library is None or not library.has_tiles():
        pytest.skip(f"no matrix tiles: {native.status()}")
    torch.manual_seed(0)


def layer(depth: int, width: int, *, rank: int = 0, bias: str = "frozen") -> nn.Linear:
    made = (
        frozen.FrozenLinear(depth, width, bias=bias != "none").bfloat16().requires_grad_(requires_grad=False)
    )
    if bias != "none":
        nn.init.normal_(made.bias)
        made.bias.requires_grad_(bias == "trains")
    if rank:
        made.__class__ = LoRALinear
        made.scale, made.magnitude = SCALE, None
        made.lora_A = nn.Parameter((torch.randn(rank, depth) * depth**-0.5).bfloat16())
        made.lora_B = nn.Parameter((torch.randn(width, rank) * 0.5).bfloat16())
    return made


def trained(made: nn.Linear) -> list[Tensor]:
    return [p for p in made.parameters() if p.requires_grad]


def check(ours: list[Tensor | None], truth: list[Tensor | None]) -> None:
    for i, (one, other) in enumerate(zip(ours, truth, strict=True)):
        assert one is not None
        assert other is not None
        assert (one.double() - other.double()).norm() < TOLERANCE * other.double().norm(), i


def truth_of(made: nn.Linear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what a layer makes of x in float64, by heads of 16, and what trains of it."""
    own = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in made.named_parameters()}
    y = F.linear(x, own["weight"], own.get("bias"))
    if "lora_A" in own:
        y = y + SCALE * (x @ own["lora_A"].T) @ own["lora_B"].T
    return y.unflatten(-1, (-1, 16)).transpose(1, 2), [p for p in own.values() if p.requires_grad]


@pytest.mark.parametrize(
    ("batch", "length"), [(2, 16), (3, 37), (1, 1)]
)  # whole blocks, a rest, less than one
@pytest.mark.parametrize("ranks", [(0, 0, 0), (8, 0, 40), (0, 16, 0), (8, 8)])
@pytest.mark.parametrize("bias", ["none", "frozen", "trains"])
@pytest.mark.parametrize("below", [True, False], ids=["trains below", "lowest"])
def test_maps_of_one_input(batch: int, length: int, ranks: tuple[int, ...], bias: str, below: bool) -> None:
    layers = [layer(64, 96, rank=rank, bias=bias) for rank in ranks]
    x = torch.randn(batch, length, 64).bfloat16().requires_grad_(below)
    made, same = attention.read(layers, x, 16)
    x2 = x.detach().double().requires_grad_(below)
    truths, others = zip(*(truth_of(one, x2) for one in layers), strict=True)
    check(made, list(truths))
    for one, y in zip(layers, made, strict=True):  # what nothing trains for gets no gradient
        assert y.requires_grad == (below or bool(trained(one)))
    assert same.requires_grad == below
    outputs = [(y, t) for y, t in zip([*made, same], [*truths, x2], strict=True) if y.requires_grad]
    ours, theirs = [p for one in layers for p in trained(one)], [p for own in others for p in own]
    if below:
        ours, theirs = [x, *ours], [x2, *theirs]
    if not ours:
        return
    grads = [torch.randn(y.shape).bfloat16() for y, _ in outputs]
    found = torch.autograd.grad([y for y, _ in outputs], ours, grads)
    check(
        list(found), list(torch.autograd.grad([t for _, t in outputs], theirs, [g.double() for g in grads]))
    )


@pytest.mark.parametrize("read", [[0], [1], [2], [3], [1, 3]])
def test_an_output_that_nobody_reads_adds_nothing(read: list[int]) -> None:
    layers = [layer(64, 64, rank=rank) for rank in (8, 0, 8)]
    x = torch.randn(2, 20, 64).bfloat16().requires_grad_()
    x2 = x.detach().double().requires_grad_()
    made, same = attention.read(layers, x, 16)
    truths = [*(truth_of(one, x2)[0] for one in layers), x2]
    grads = [torch.randn(truths[i].shape).bfloat16() for i in read]
    found = torch.autograd.grad([[*made, same][i] for i in read], x, grads)
    check(list(found), list(torch.autograd.grad([truths[i] for i in read], x2, [g.double() for g in grads])))


def test_what_does_not_fit_goes_one_by_one() -> None:
    x = torch.randn(2, 20, 64).bfloat16()
    dora, trains = layer(64, 64, rank=8), layer(64, 64).requires_grad_()
    dora.magnitude = nn.Parameter(torch.ones(64).bfloat16())
    for other in (dora, trains, layer(64, 32)):
        made, same = attention.read([layer(64, 64), other], x, 16)
        assert same is x
        assert made[1].grad_fn is None or "Maps" not in made[1].grad_fn.name()


def half(bias: str) -> Any:
    """Return the feed-forward half of a layer, 64 wide."""
    wide, out = FusedIntermediate(), FusedOutput()
    wide.dense, wide.intermediate_act_fn = layer(64, 224, bias=bias), nn.GELU()
    out.dense, out.dropout, out.LayerNorm = (
        layer(224, 64, bias=bias),
        nn.Dropout(0.3),
        nn.LayerNorm(64).bfloat16(),
    )
    nn.init.normal_(out.LayerNorm.weight)
    out.LayerNorm.requires_grad_(bias == "trains")
    return SimpleNamespace(intermediate=wide, output=out)


@pytest.mark.parametrize("rows", [32, 37, 1])
@pytest.mark.parametrize("bias", ["none", "frozen", "trains"])
@pytest.mark.parametrize("drops", [True, False])
def test_a_feed_forward_half(rows: int, bias: str, drops: bool) -> None:
    """Of its parts, with the same masks; these are tested against float64."""
    made, x = half(bias), torch.randn(2, rows, 64).bfloat16().requires_grad_()
    made.output.train(drops)
    own = [x, *(p for part in (made.intermediate, made.output) for p in part.parameters() if p.requires_grad)]
    grad, results = torch.randn(2, rows, 64).bfloat16(), []
    for function in (feed_forward.feed_forward_chunk, lambda m, x: m.output(m.intermediate(x), x)):
        with torch_seeded(4):
            y = function(made, x)
        results.append([y, *torch.autograd.grad(y, own, grad)])
    assert y.grad_fn.name() == "LinearNormBackward"
    assert torch.equal(results[0][0], results[1][0])
    check(*results)


def test_threads_change_no_bit() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        layers, made = [layer(64, 64, rank=rank) for rank in (8, 0, 8)], half("frozen")
        x = torch.randn(3, 45, 64).bfloat16().requires_grad_()
        heads, same = attention.read(layers, feed_forward.feed_forward_chunk(made, x), 16)
        out = torch.cat([*(y.transpose(1, 2).flatten(2) for y in heads), same], -1)
        results.append(
            [out, *torch.autograd.grad(out, [x, layers[0].lora_A, layers[2].lora_B], out.detach())]
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 4, "targets": ("query", "value")},
        {"name": "lora", "rank": 4, "targets": ("key",)},
        {"name": "lora", "rank": 4, "targets": "all-linear"},
        {"name": "lora", "rank": 4, "dora": True},
        {"name": "bitfit"},
        {"name": "adapter"},
        {"name": "adapter", "placement": "houlsby"},
        {"name": "probe"},
    ],
    ids=str,
)
def test_a_step_is_that_of_the_parts(
    recipe: dict[str, Any], method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever trains, with texts of different lengths: all gradients."""
    trainer, found = None, []
    for apart in (False, True):
        if apart:
            for module in (attention, feed_forward):
                monkeypatch.setattr(module, "is_transforming", lambda: True)
        experiment = build(recipe | {"method": method}, client__precision="bf16", client__dropout=0.0)
        trainer = experiment.trainer
        with torch_seeded(2):
            state = {name: t + 0.05 * torch.randn(t.shape) for name, t in experiment.params.items()}
        trainer.flat.load_(state)
        trainer.model.train()
        trainer.gradient_(experiment.train, np.arange(8))
        found.append(trainer.flat.gradient.clone())
    assert found[1].norm() > 0
    assert (found[0] - found[1]).norm() < 2 * TOLERANCE * found[1].norm()
