"""Products with packed matrices against float64: values, gradients, dropout, several clients, staleness."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from federa.cpu import frozen, native
from federa.cpu.ends import FusedIntermediate, FusedOutput
from federa.seeds import torch_seeded
from running import build

TOLERANCE = 1.2e-2  # relative to the norm: bf16 keeps 8 bits
SHAPES = [
    (384, 384),
    (64, 448),
    (1536, 64),
    (32, 32),
]  # (in, out): 1536 is four times the depth taken at a time
ROWS = [32, 100, 1]  # whole blocks, a rest, less than one


@pytest.fixture(autouse=True)
def tiles() -> None:
    library = native.load()
    if library is None or not library.has_tiles():
        pytest.skip(f"no matrix tiles: {native.status()}")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch_seeded(0):
        yield
    torch.set_num_threads(before)


def layer(depth: int, width: int, *, bias: bool = True, trains: bool = False) -> nn.Linear:
    """A frozen layer; `trains`: its bias does not stay so."""
    made = frozen.FrozenLinear(depth, width, bias=bias).bfloat16().requires_grad_(requires_grad=False)
    if bias:
        nn.init.normal_(made.bias)
        made.bias.requires_grad_(trains)
    return made


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16().requires_grad_()


def doubled(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_()


def distance(ours: Tensor | None, truth: Tensor | None) -> float:
    assert ours is not None
    assert truth is not None
    truth = truth.detach().double()
    return float((ours.detach().double() - truth).norm() / truth.norm())


def check(ours: list[Tensor | None], truth: list[Tensor | None]) -> None:
    for i, (one, other) in enumerate(zip(ours, truth, strict=True)):
        assert distance(one, other) < TOLERANCE, i


@pytest.mark.parametrize(("depth", "width"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", ["none", "frozen", "trains"])
def test_linear(depth: int, width: int, rows: int, bias: str) -> None:
    made, x = layer(depth, width, bias=bias != "none", trains=bias == "trains"), leaf(rows, depth)
    assert frozen.packed(made, x) is not None
    y, grad = made(x), torch.randn(rows, width).bfloat16()
    y.backward(grad)
    x2, w2, b2 = doubled(x), doubled(made.weight), doubled(made.bias)
    truth = F.linear(x2, w2, b2)
    truth.backward(grad.double())
    check([y, x.grad], [truth, x2.grad])
    if bias == "trains":
        check([made.bias.grad], [b2.grad])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("trains", [True, False])
def test_linear_and_gelu(rows: int, trains: bool) -> None:
    made, x = layer(64, 448, trains=trains), leaf(2, rows, 64)
    y, grad = frozen.LinearGelu.apply(frozen.packed(made), x, made.bias), torch.randn(2, rows, 448).bfloat16()
    y.backward(grad)
    x2, b2 = doubled(x), doubled(made.bias)
    truth = F.gelu(F.linear(x2, made.weight.double(), b2))
    truth.backward(grad.double())
    check([y, x.grad], [truth, x2.grad])
    if trains:
        check([made.bias.grad], [b2.grad])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_linear_and_norm(rows: int, rate: float) -> None:
    """The mask is read off a pass in which everything else is known."""
    made, x, residual = layer(1536, 64, trains=True), leaf(rows, 1536), leaf(rows, 64)
    weight, beta = leaf(64), leaf(64)
    matrix = frozen.packed(made)
    with torch_seeded(5):
        y = frozen.LinearNorm.apply(matrix, x, made.bias, residual, weight, beta, 1e-5, rate)
    grad = torch.randn(rows, 64).bfloat16()
    y.backward(grad)
    still = layer(1536, 64)
    nn.init.constant_(still.bias, 100.0)
    ones, zeros = torch.ones(64).bfloat16(), torch.zeros(64).bfloat16()
    with torch_seeded(5):  # of h = 0 + 100, residual 0: what was dropped is below the mean
        marks = frozen.LinearNorm.apply(
            frozen.packed(still), torch.zeros_like(x), still.bias, torch.zeros_like(residual), ones, zeros, 1e-5, rate
        )  # fmt: skip
    kept = (marks > 0).double() / (1 - rate) if rate else torch.ones(rows, 64).double()
    assert rate == 0 or 0.6 < (kept > 0).double().mean() < 0.8 or rows == 1
    x2, b2, r2, w2, beta2 = map(doubled, (x, made.bias, residual, weight, beta))
    h = F.linear(x2, made.weight.double(), b2) * kept
    truth = F.layer_norm(h + r2, (64,), w2, beta2, 1e-5)
    truth.backward(grad.double())
    check(
        [y, x.grad, made.bias.grad, residual.grad, weight.grad, beta.grad],
        [truth, x2.grad, b2.grad, r2.grad, w2.grad, beta2.grad],
    )


@pytest.mark.parametrize(("depth", "width"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rank", [1, 16, 32, 40])
def test_low_rank(depth: int, width: int, rows: int, rank: int) -> None:
    made, x, scale = layer(depth, width), leaf(rows, depth), 0.7
    A, B = leaf(rank, depth, scale=depth**-0.5), leaf(width, rank, scale=0.5)
    y = frozen.LinearLowRank.apply(frozen.packed(made), x, made.bias, A, B, scale)
    grad = torch.randn(rows, width).bfloat16()
    y.backward(grad)
    x2, A2, B2 = map(doubled, (x, A, B))
    truth = F.linear(x2, made.weight.double(), made.bias.double()) + scale * (x2 @ A2.T) @ B2.T
    truth.backward(grad.double())
    check([y, x.grad, A.grad, B.grad], [truth, x2.grad, A2.grad, B2.grad])


def test_low_rank_where_nothing_below_trains() -> None:
    made, x, A, B = layer(64, 64), torch.randn(40, 64).bfloat16(), leaf(8, 64), leaf(64, 8)
    frozen.LinearLowRank.apply(frozen.packed(made), x, made.bias, A, B, 0.5).sum().backward()
    A2, B2 = doubled(A), doubled(B)
    (0.5 * (x.double() @ A2.T) @ B2.T).sum().backward()
    check([A.grad, B.grad], [A2.grad, B2.grad])


def test_every_pass_draws_a_mask_of_its_own() -> None:
    made, x, zeros, ones = layer(64, 64), torch.zeros(40, 64).bfloat16(), torch.zeros(64), torch.ones(64)
    nn.init.constant_(made.bias, 100.0)
    ends = (torch.zeros_like(x), ones.bfloat16(), zeros.bfloat16(), 1e-5, 0.5)
    one, other = (frozen.LinearNorm.apply(frozen.packed(made), x, made.bias, *ends) > 0 for _ in range(2))
    assert 0.4 < (one == other).double().mean() < 0.6


def test_inputs_and_gradients_may_be_strided() -> None:
    """A view of every second column says the same as a copy of it."""
    dense, up = layer(64, 64, trains=True), layer(64, 64)
    A, B = leaf(8, 64), leaf(64, 8)

    def all_of_them(x: Tensor, residual: Tensor, norm: Tensor) -> Tensor:
        low = frozen.LinearLowRank.apply(frozen.packed(up), x, up.bias, A, B, 0.5)
        y = frozen.LinearGelu.apply(frozen.packed(dense), low + dense(x), dense.bias)
        return frozen.LinearNorm.apply(frozen.packed(up), y, up.bias, residual, norm, norm, 1e-5, 0.0)

    wide = [torch.randn(*shape).bfloat16() for shape in ((9, 128), (9, 128), (128,), (9, 128))]
    views, copies = ([t[..., ::2] for t in wide], [t[..., ::2].contiguous() for t in wide])
    results = []
    for x, residual, norm, grad in (views, copies):
        x = x.detach().requires_grad_()
        y = all_of_them(x, residual, norm)
        results.append([y, *torch.autograd.grad(y, [x, A, B, dense.bias], grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lane", [0, 1])
def test_clients_have_their_own_factors(lane: int) -> None:
    made, x = layer(64, 96), torch.randn(3, 40, 64).bfloat16()
    A, B, grad = leaf(3, 8, 64, scale=0.1), leaf(3, 96, 8, scale=0.5), torch.randn(3, 40, 96).bfloat16()
    matrix = frozen.packed(made)

    def one(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return frozen.LinearLowRank.apply(matrix, x, made.bias, A, B, 0.7)

    inputs = [t.detach().movedim(0, lane).contiguous().requires_grad_() for t in (x, A, B)]
    together = vmap(one, in_dims=lane)(*inputs)
    grads = [g.movedim(lane, 0) for g in torch.autograd.grad(together, inputs, grad)]
    for client in range(3):
        own = [t[client].detach().requires_grad_() for t in (x, A, B)]
        alone = one(*own)
        check([together[client]], [alone])
        check([g[client] for g in grads], list(torch.autograd.grad(alone, own, grad[client])))


def test_several_clients_at_once() -> None:
    """What trains has a dimension of clients, and meets one packed matrix."""

    class Sub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.dropout, self.LayerNorm = (
                layer(64, 64),
                nn.Dropout(0.0),
                nn.LayerNorm(64).bfloat16(),
            )
            self.wide = FusedIntermediate()
            self.wide.dense, self.wide.intermediate_act_fn = layer(64, 64), nn.GELU()
            self.forward = lambda x: FusedOutput.forward(self, self.wide(x), x)

    made, x = Sub().eval(), torch.randn(3, 2, 40, 64).bfloat16()
    one = [name for name, _ in made.named_parameters() if name.endswith("bias")]  # as BitFit has it
    for names in ([], one):
        leaves = {
            name: torch.randn(3, *made.get_parameter(name).shape).bfloat16().requires_grad_()
            for name in names
        }
        y = vmap(lambda own, x: functional_call(made, own, (x,)))(leaves, x) if names else vmap(made)(x)
        for client in range(3):
            own = {name: t[client] for name, t in leaves.items()}
            assert distance(y[client], functional_call(made, own, (x[client],))) < 1e-3
        if names:
            grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
            own = {name: t[1].detach().requires_grad_() for name, t in leaves.items()}
            alone = functional_call(made, own, (x[1],)).float().square().sum()
            check([g[1] for g in grads], list(torch.autograd.grad(alone, list(own.values()))))


@pytest.mark.parametrize("method", ["lora", "federa", "bitfit", "adapter", "ft"])
def test_a_step_goes_through_packed_matrices(recipe: dict[str, Any], method: str) -> None:
    """Of two layers: what is frozen is packed before the first step, and every product that can be is one of ours."""
    experiment = build(recipe, method__name=method, client__precision="bf16")
    trainer = experiment.trainer
    linears = [m for m in trainer.model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    assert all("packed" in m.__dict__ for m in linears)
    assert len(linears) == (0 if method == "ft" else 12)
    trainer.model.train()
    loss = trainer.model(**experiment.train.batch(np.arange(4), trainer.device)).loss
    names, open_nodes = [], [loss.grad_fn]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        names.append(node.name())
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        open_nodes += following
    kinds = ("Maps", "FeedForward", "LinearGelu", "LinearNorm", "LinearLowRank")
    found = {kind: names.count(f"{kind}Backward") for kind in kinds}
    # The last layer's query is of the first token alone. An adapter comes between its product and the norm, and
    # no gradient goes below the first one.
    expected = {"ft": (0, 0, 0, 0, 0), "adapter": (1, 0, 1, 1, 0), "bitfit": (2, 2, 0, 2, 0)}
    assert tuple(found.values()) == expected.get(method, (2, 2, 0, 2, 1))


@pytest.mark.parametrize("how", ["in place", "exchanged", "copied model", "from elsewhere"])
def test_a_matrix_that_changed_is_packed_anew(how: str) -> None:
    made, x = layer(64, 64), torch.randn(5, 64).bfloat16()
    made(x)
    if how == "in place":
        with torch.no_grad():
            made.weight.mul_(-2)
    elif how == "exchanged":
        made.weight.data = made.weight.data * -2
    elif how == "copied model":
        made = copy.deepcopy(made)
        with torch.no_grad():
            made.weight.mul_(-2)
    else:
        made.load_state_dict({"weight": made.weight * -2, "bias": made.bias})
    assert distance(made(x), F.linear(x, made.weight, made.bias)) < 1e-2


def test_a_matrix_that_was_packed_is_not_taken_for_another() -> None:
    x = torch.randn(4, 64).bfloat16()
    made = layer(64, 64)
    assert frozen.packed(made, x) is not None
    assert frozen.packed(made, x.float()) is None, "other numbers go in"
    with native.without():
        assert frozen.packed(made, x) is None
    made.weight.requires_grad_()
    assert frozen.packed(made, x) is None, "it trains"
    made.weight.requires_grad_(requires_grad=False)
    weight = torch.randn(64, 64).bfloat16()
    out = torch.func.functional_call(made, {"weight": weight}, (x,))
    assert torch.equal(out, F.linear(x, weight, made.bias))
    made.bias.data = made.bias.data.float()
    assert frozen.packed(made, x) is None
    made.bias.data = made.bias.data.bfloat16()
    made.weight.data = made.weight.data.t()
    assert distance(made(x), F.linear(x, made.weight, made.bias)) < 1e-2
    nn.utils.parametrizations.weight_norm(made)
    assert distance(made(x), F.linear(x, made.weight, made.bias)) < 1e-2


def test_what_the_tiles_do_not_take_is_left_to_torch() -> None:
    x = torch.randn(4, 64)
    for made in (
        layer(64, 64).float(),
        layer(64, 64).requires_grad_(),
        frozen.FrozenLinear(64, 40).bfloat16().requires_grad_(requires_grad=False),
        frozen.FrozenLinear(40, 64).bfloat16().requires_grad_(requires_grad=False),
    ):
        inputs = x[:, : made.in_features].to(made.weight.dtype)
        assert frozen.packed(made, inputs) is None
        assert torch.equal(made(inputs), F.linear(inputs, made.weight, made.bias))
    assert frozen.packed(layer(64, 64), x) is None, "other numbers go in"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(64, 64)(torch.randn(4, 96).bfloat16())
    odd = layer(64, 64)
    odd.bias.data = odd.bias.data.float()
    assert frozen.packed(odd, x.bfloat16()) is None
    with torch.inference_mode():
        still = frozen.FrozenLinear(64, 64).bfloat16().requires_grad_(requires_grad=False)
    assert frozen.packed(still) is None
    assert layer(64, 64)(torch.empty(0, 3, 64).bfloat16()).shape == (0, 3, 64)
    with native.without():
        assert frozen.packed(layer(64, 64), x.bfloat16()) is None
    assert torch.isnan(layer(64, 64)(torch.full((3, 64), float("nan")).bfloat16())).all()
