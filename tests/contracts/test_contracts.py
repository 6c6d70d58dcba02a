"""Every registered component keeps its contract, and the contract tests notice components that do not."""

import numpy as np
import pytest
import torch

from federa.aggregators import AGGREGATORS, Mean
from federa.data.partition import PARTITIONERS, Iid
from federa.server_optimizers import SERVER_OPTIMIZERS, Sgd
from federa.testing import check_aggregator, check_partitioner, check_server_optimizer

REQUIRED = {"natural": {"column": "author"}}


def component(registry, name, **fields):
    return registry.parse({"name": name, **REQUIRED.get(name, {}), **fields})


@pytest.mark.parametrize("fields", [{}, {"clients": 7, "min_examples": 9}], ids=["defaults", "min_examples"])
@pytest.mark.parametrize("name", PARTITIONERS.names())
def test_partitioners(name, fields):
    check_partitioner(component(PARTITIONERS, name, **fields))


@pytest.mark.parametrize("name", AGGREGATORS.names())
def test_aggregators(name):
    check_aggregator(component(AGGREGATORS, name))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS.names())
def test_server_optimizers(name):
    check_server_optimizer(component(SERVER_OPTIMIZERS, name))


@pytest.mark.parametrize("registry", [PARTITIONERS, AGGREGATORS, SERVER_OPTIMIZERS], ids=lambda r: r.kind)
def test_no_registered_class_builds_on_another(registry):
    classes = [registry.get(name) for name in registry.names()]
    assert classes
    assert not [cls for cls in classes if set(cls.__mro__[1:]) & set(classes)]


class Loses(Iid):
    def assign(self, groups, rng):
        first, *others = super().assign(groups, rng)
        return [first[1:], *others]


class Doubles(Iid):
    def assign(self, groups, rng):
        first, *others = super().assign(groups, rng)
        return [np.append(first, others[0][0]), *others]


class Unseeded(Iid):
    def assign(self, groups, rng):
        return super().assign(groups, np.random.default_rng())


class Scribbles(Iid):
    def assign(self, groups, rng):
        groups[:] = 0
        return super().assign(groups, rng)


class TooMany(Iid):
    def assign(self, groups, rng):
        return np.array_split(np.arange(len(groups)), self.clients + 1)


class Unregistered(Iid):
    name: str = "nobody"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Loses, "not exactly the rows"),
        (Doubles, "held twice"),
        (Unseeded, "same seed"),
        (Scribbles, "in place"),
        (TooMany, "21 clients, not 20"),
        (Unregistered, "not registered"),
    ],
)
def test_wrong_partitioners_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_partitioner(cls())


class Sums(Mean):
    def finish(self, accumulator):
        return {name: total.float() for name, total in accumulator.total.items()}


class RawWeights(Mean):
    def finish(self, accumulator):
        w = accumulator.weight
        return {name: (t / w * (1 if w < 100 else 2)).float() for name, t in accumulator.total.items()}


class LastCounts(Mean):
    def accumulate(self, accumulator, update):
        accumulator = self.init(update.delta) if update.job.client_id == 2 else accumulator
        return super().accumulate(accumulator, update)


class Remembers(Mean):
    def init(self, params):
        return vars(self).setdefault("_kept", super().init(params))


class Clobbers(Mean):
    def accumulate(self, accumulator, update):
        accumulator = super().accumulate(accumulator, update)
        for tensor in update.delta.values():
            tensor.mul_(1.0000001).nextafter_(torch.tensor(9.0))
        return accumulator


class Doubled(Mean):
    def finish(self, accumulator):
        return {name: tensor.double() for name, tensor in super().finish(accumulator).items()}


class Silent(Mean):
    def finish(self, accumulator):
        return super().finish(accumulator) if accumulator.weight else {}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Sums, "one client alone|times 1000"),
        (RawWeights, "times 1000"),
        (LastCounts, "order of the clients"),
        (Remembers, "one client alone"),
        (Clobbers, "changed in place"),
        (Doubled, "float64, not float32"),
        (Silent, "must raise ValueError"),
    ],
)
def test_wrong_aggregators_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_aggregator(cls())


class Backwards(Sgd):
    def step(self, params, delta, opt):
        return {name: p - delta[name] for name, p in params.items()}, {}


class InPlace(Sgd):
    def step(self, params, delta, opt):
        return {name: p.add_(delta[name]) for name, p in params.items()}, {}


class Decays(Sgd):
    def step(self, params, delta, opt):
        return {name: 0.999 * p + delta[name] for name, p in params.items()}, {}


class Grows(Sgd):
    def step(self, params, delta, opt):
        return super().step(params, delta, opt)[0], {"count": torch.ones(())}


class HalfState(Sgd):
    def init(self, params):
        return {"count": torch.zeros((), dtype=torch.float16)}

    def step(self, params, delta, opt):
        return super().step(params, delta, opt)[0], dict(opt)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Backwards, "along the delta"),
        (InPlace, "changed in place"),
        (Decays, "zero delta"),
        (Grows, "optimizer state: keys"),
        (HalfState, "not float32"),
    ],
)
def test_wrong_server_optimizers_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_server_optimizer(cls())
