"""The head's three modes are the same for every method."""

import numpy as np
import pytest
import torch

from federa.config import parse_config
from federa.experiment import build_experiment
from federa.methods import METHODS
from federa.types import FederaError, Job

NAMES = ("adapter", "bitfit", "federa", "ft", "lora")
HEAD = {f"{layer}.{p}" for layer in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}


def build(recipe, name, head, **method):
    recipe = {**recipe, "method": {"name": name, "head": head, **method}}
    return build_experiment(parse_config(recipe))


@pytest.mark.parametrize("name", NAMES)
def test_train_freeze_local(load, setup_for, name):
    """A trained head is in the state as drawn, a frozen one is not and does not train, a local one does."""
    for head, in_state in (("train", True), ("freeze", False), ("local", True)):
        loaded = load()
        drawn = {n: loaded.model.get_parameter(n).detach().clone() for n in HEAD}
        state = METHODS.parse({"name": name, "head": head}).prepare(loaded.model, setup_for(loaded))
        assert HEAD & set(state) == (HEAD if in_state else set())
        for n in HEAD:
            assert loaded.model.get_parameter(n).requires_grad == in_state
            assert torch.equal(loaded.model.get_parameter(n), drawn[n])
        assert set(state) - HEAD, "the encoder's part trains in every mode"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["train", "freeze", "local"])
def test_what_travels(recipe, name, head):
    experiment = build(recipe, name, head)
    assert HEAD & set(experiment.params) == (HEAD if head == "train" else set())
    assert set(experiment.kept.start) == (HEAD if head == "local" else set())
    update = experiment.train_client(experiment.params, Job(1, 0, 9, 0.05))
    assert set(update.delta) == set(experiment.params)
    if head == "train":
        assert all(torch.count_nonzero(update.delta[n]) for n in HEAD)


def test_a_frozen_head_stays_as_drawn(recipe):
    experiment = build(recipe, "lora", "freeze", rank=4)
    before = {n: experiment.trainer.model.get_parameter(n).detach().clone() for n in HEAD}
    update = experiment.train_client(experiment.params, Job(1, 0, 9, 0.05))
    assert any(torch.count_nonzero(d) for d in update.delta.values())
    for n, tensor in before.items():
        assert torch.equal(experiment.trainer.model.get_parameter(n), tensor)


def test_a_local_head_is_each_clients_own(recipe):
    experiment = build(recipe, "lora", "local", rank=4)
    experiment.train_client(experiment.params, Job(1, 0, 9, 0.05))
    next_round = [experiment.kept.load(Job(2, client, 9, 0.05)) for client in (0, 1)]
    start = experiment.kept.start
    assert all(not torch.equal(next_round[0][n], start[n]) for n in HEAD), "client 0 trained its own"
    assert all(torch.equal(next_round[1][n], start[n]) for n in HEAD), "client 1 has not trained yet"
    batches = [np.arange(4)]
    (mine,), (other,) = (experiment.predict(experiment.params, batches, Job(2, c, 0, 0.0)) for c in (0, 1))
    assert not np.allclose(mine, other)


def test_a_client_that_was_sent_no_head_starts_from_the_common_one(load, setup_for):
    """With a local head the server sends the rest; with a trained one a missing head is an error."""
    server, client, strict = load(), load(), load()
    state = METHODS.parse({"name": "lora", "head": "local"}).prepare(server.model, setup_for(server))
    sent = {name: tensor for name, tensor in state.items() if name not in HEAD}
    again = METHODS.parse({"name": "lora", "head": "local"}).prepare(
        client.model, setup_for(client, init=sent)
    )
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    with pytest.raises(FederaError, match=r"lacks 'bert\.pooler\.dense\.bias'"):
        METHODS.parse("lora").prepare(strict.model, setup_for(strict, init=sent))


def test_the_head_may_have_its_own_learning_rate(recipe):
    """With SGD the step is proportional to the rate: ten times the head's rate, ten times its step."""
    client = {
        **recipe["client"],
        "optimizer": "sgd",
        "clip_norm": 0,
        "max_steps": 1,
        "dropout": 0.0,
        "lr": 0.01,
    }
    updates = {}
    for head_lr in (None, 0.1):
        changed = {**recipe, "client": {**client, "head_lr": head_lr}, "method": {"name": "ft"}}
        experiment = build_experiment(parse_config(changed))
        updates[head_lr] = experiment.train_client(experiment.params, Job(1, 0, 9, 0.01)).delta
    for name, delta in updates[None].items():
        factor = 10 if name in HEAD else 1
        torch.testing.assert_close(updates[0.1][name], factor * delta, atol=1e-7, rtol=1e-3)
