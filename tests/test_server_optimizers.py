import math

import pytest
import torch

from federa.server_optimizers import SERVER_OPTIMIZERS, Adam, Momentum, Sgd, Yogi
from federa.types import FederaError


def run(optimizer, deltas, start=1.0):
    """Return the parameter after each delta, and the last optimizer state, as floats."""
    params = {"w": torch.tensor([start])}
    opt = optimizer.init(params)
    path = []
    for delta in deltas:
        params, opt = optimizer.step(params, {"w": torch.tensor([delta])}, opt)
        path.append(float(params["w"]))
    return path, {name: float(tensor) for name, tensor in opt.items()}


def test_sgd_with_lr_one_adds_the_delta_exactly():
    params, delta = ({"w": torch.randn(1000, generator=torch.Generator().manual_seed(s))} for s in (0, 1))
    new, opt = Sgd().step(params, delta, {})
    assert torch.equal(new["w"], params["w"] + delta["w"])
    assert opt == {}


def test_sgd_scales_by_lr():
    assert run(Sgd(lr=0.5), [2.0, -4.0])[0] == [2.0, 0.0]


def test_momentum_by_hand():
    # v: 1, then 0.5 * 1 + 1 = 1.5, then 0.75; params 0 + 2 v each time.
    path, opt = run(Momentum(lr=2.0, momentum=0.5), [1.0, 1.0, 0.0], start=0.0)
    assert path == [2.0, 5.0, 6.5]
    assert opt == {"momentum/w": 0.75}


def test_momentum_zero_is_sgd():
    assert run(Momentum(lr=0.5, momentum=0.0), [2.0, -4.0])[0] == run(Sgd(lr=0.5), [2.0, -4.0])[0]


def test_the_second_moment_starts_at_tau_squared_and_the_first_at_zero():
    for optimizer in (Adam(tau=0.5), Yogi(tau=0.5)):
        assert {k: v.tolist() for k, v in optimizer.init({"w": torch.ones(2)}).items()} == {
            "m/w": [0, 0],
            "v/w": [0.25, 0.25],
        }


def test_adam_by_hand():
    # beta1 0.5, beta2 0.75, tau 1. Delta 2: m = 1, v = 0.75 * 1 + 0.25 * 4 = 1.75.
    # Delta 1: m = 0.5 + 0.5 = 1, v = 0.75 * 1.75 + 0.25 * 1 = 1.5625, whose root is 1.25.
    path, opt = run(Adam(lr=0.1, beta1=0.5, beta2=0.75, tau=1.0), [2.0, 1.0])
    first = 1 + 0.1 / (math.sqrt(1.75) + 1)
    assert path == pytest.approx([first, first + 0.1 / 2.25], rel=1e-6)
    assert opt == pytest.approx({"m/w": 1.0, "v/w": 1.5625})


def test_yogi_by_hand():
    # Delta 2: v = 1 + 0.25 * 4 = 2 (the square 4 is above v). Delta 1: v = 2 - 0.25 * 1 = 1.75 (1 is below).
    # Adam would give 1.75 and 1.5625.
    path, opt = run(Yogi(lr=0.1, beta1=0.5, beta2=0.75, tau=1.0), [2.0, 1.0])
    first = 1 + 0.1 / (math.sqrt(2) + 1)
    assert path == pytest.approx([first, first + 0.1 / (math.sqrt(1.75) + 1)], rel=1e-6)
    assert opt == pytest.approx({"m/w": 1.0, "v/w": 1.75})


@pytest.mark.parametrize("cls", [Adam, Yogi])
def test_no_bias_correction(cls):
    # A first delta d far above tau: m = 0.1 d and sqrt(v) about 0.1 d, so a step of about lr.
    path, _ = run(cls(lr=0.01), [1.0], start=0.0)
    assert path[0] == pytest.approx(0.01 * 0.1 / (math.sqrt(0.01) + 1e-3), rel=1e-3)


@pytest.mark.parametrize("cls", [Momentum, Adam, Yogi])
def test_a_resumed_optimizer_goes_on_as_if_uninterrupted(cls):
    optimizer = cls()
    params, opt = {"w": torch.ones(3)}, optimizer.init({"w": torch.ones(3)})
    delta = {"w": torch.tensor([0.1, -0.2, 0.3])}
    params, opt = optimizer.step(params, delta, opt)
    resumed = cls().step(params, delta, opt)[0]["w"]
    fresh = cls().step(params, delta, optimizer.init(params))[0]["w"]
    assert torch.equal(resumed, optimizer.step(params, delta, opt)[0]["w"])
    assert not torch.equal(resumed, fresh)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "sgd", "lr": 0},
        {"name": "momentum", "momentum": 1.0},
        {"name": "adam", "tau": 0},
        {"name": "yogi", "beta2": 1.5},
    ],
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(FederaError):
        SERVER_OPTIMIZERS.parse(config)
