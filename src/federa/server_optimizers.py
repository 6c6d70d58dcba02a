"""Server optimizers: how the round's delta changes the global parameters.

The delta is local minus global, so it points the way to go: it takes the place of the negative gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from federa.registry import Component, Registry
from federa.types import State

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ServerOptimizer(Component, ABC):
    """A pure step on states: what it remembers between rounds is in `opt` and travels in the checkpoint."""

    @abstractmethod
    def init(self, params: State) -> State:
        """Return the optimizer's first state, float32, with keys like `momentum/<name of the parameter>`."""

    @abstractmethod
    def step(self, params: State, delta: State, opt: State) -> tuple[State, State]:
        """Return the new parameters and the new optimizer state, float32; the inputs stay as they are.

        Args:
            params: the global parameters.
            delta: the round's delta; the keys and shapes of `params`.
            opt: what `init` or the step before returned.
        """


SERVER_OPTIMIZERS: Registry[ServerOptimizer] = Registry("server_optimizer")


@SERVER_OPTIMIZERS.register
class Sgd(ServerOptimizer):
    """`params + lr * delta`; federated averaging with `lr` 1 (McMahan et al. 2017). Remembers nothing.

    Attributes:
        lr: server learning rate.
    """

    name: Literal["sgd"] = "sgd"
    lr: Positive = 1.0

    def init(self, params: State) -> State:  # noqa: D102
        return {}

    def step(self, params: State, delta: State, opt: State) -> tuple[State, State]:  # noqa: D102
        return added(params, delta, self.lr), {}


@SERVER_OPTIMIZERS.register
class Momentum(ServerOptimizer):
    """FedAvgM (Hsu et al. 2019): `v = momentum * v + delta`, `params + lr * v`.

    Attributes:
        lr: server learning rate.
        momentum: how much of the last step's `v` is kept.
    """

    name: Literal["momentum"] = "momentum"
    lr: Positive = 1.0
    momentum: Decay = 0.9

    def init(self, params: State) -> State:  # noqa: D102
        return filled("momentum", params, 0.0)

    def step(self, params: State, delta: State, opt: State) -> tuple[State, State]:  # noqa: D102
        velocity = {name: self.momentum * opt[f"momentum/{name}"] + delta[name] for name in params}
        return added(params, velocity, self.lr), keyed("momentum", velocity)


@SERVER_OPTIMIZERS.register
class Adam(ServerOptimizer):
    """FedAdam (Reddi et al. 2021, Algorithm 2): no bias correction, second moment from `tau**2`.

    Attributes:
        lr: server learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity, added to the root of the second moment; a small one adapts more.
    """

    name: Literal["adam"] = "adam"
    lr: Positive = 1e-2
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3

    def init(self, params: State) -> State:  # noqa: D102
        return first_moments(params, self.tau)

    def step(self, params: State, delta: State, opt: State) -> tuple[State, State]:  # noqa: D102
        def second(v: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return adaptive_step(params, delta, opt, second, lr=self.lr, beta1=self.beta1, tau=self.tau)


@SERVER_OPTIMIZERS.register
class Yogi(ServerOptimizer):
    """FedYogi (Reddi et al. 2021, Algorithm 2): Adam with a second moment that shrinks slowly.

    Attributes:
        lr: server learning rate.
        beta1: decay of the first moment.
        beta2: 1 - beta2 is the share of the squared delta by which the second moment moves.
        tau: adaptivity, added to the root of the second moment; a small one adapts more.
    """

    name: Literal["yogi"] = "yogi"
    lr: Positive = 1e-2
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3

    def init(self, params: State) -> State:  # noqa: D102
        return first_moments(params, self.tau)

    def step(self, params: State, delta: State, opt: State) -> tuple[State, State]:  # noqa: D102
        def second(v: Tensor, square: Tensor) -> Tensor:
            return v - (1 - self.beta2) * square * torch.sign(v - square)

        return adaptive_step(params, delta, opt, second, lr=self.lr, beta1=self.beta1, tau=self.tau)


def added(params: State, direction: State, lr: float) -> State:
    """Return `params + lr * direction`; the exact float32 sum where `lr` is 1."""
    return {name: torch.add(tensor, direction[name], alpha=lr) for name, tensor in params.items()}


def keyed(slot: str, tensors: State) -> State:
    """Return tensors by parameter as optimizer tensors, by `<slot>/<parameter>`."""
    return {f"{slot}/{name}": tensor for name, tensor in tensors.items()}


def filled(slot: str, params: State, value: float) -> State:
    """Return one constant tensor for each parameter, by `<slot>/<parameter>`."""
    return keyed(slot, {name: torch.full_like(tensor, value) for name, tensor in params.items()})


def first_moments(params: State, tau: float) -> State:
    """Return the moments before the first step: `m` zero, and `v` the least that the paper allows, tau^2."""
    return {**filled("m", params, 0.0), **filled("v", params, tau**2)}


def adaptive_step(
    params: State,
    delta: State,
    opt: State,
    second: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    beta1: float,
    tau: float,
) -> tuple[State, State]:
    """Return parameters and moments after one step of Reddi et al. 2021, Algorithm 2.

    Args:
        params: the global parameters.
        delta: the round's delta.
        opt: the moments `m/<parameter>` and `v/<parameter>`.
        second: the new second moment, from the old one and the squared delta.
        lr: server learning rate.
        beta1: decay of the first moment.
        tau: added to the root of the second moment.
    """
    m = {name: beta1 * opt[f"m/{name}"] + (1 - beta1) * delta[name] for name in params}
    v = {name: second(opt[f"v/{name}"], delta[name] ** 2) for name in params}
    direction = {name: m[name] / (v[name].sqrt() + tau) for name in params}
    return added(params, direction, lr), {**keyed("m", m), **keyed("v", v)}
