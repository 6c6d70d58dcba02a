"""Contracts of tasks and methods, on small models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load, save
from torch import nn

from federa.client import ClientConfig, Trainer
from federa.data.batches import Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.methods import METHODS, Method, Setup
from federa.seeds import torch_seeded
from federa.tasks import TASKS, Classification, Task
from federa.testing.common import check_config, check_like, check_same, copied
from federa.types import FloatArray, Job, State

LOGIT_TOLERANCE = 1e-5


def check_task(task: Task, train: Any, data: DataConfig, tokenizer: Any) -> None:
    """Check that a task keeps its contract on a table of examples.

    Every example is encoded once, whatever rows it takes; encoding for predictions needs no answers and
    gives the
    same rows; decoding gives a prediction an example, whatever examples are asked for; a score is a number.

    Args:
        task: the task, with whatever fields.
        train: a table of eight examples or more that the task can take.
        data: which columns hold what.
        tokenizer: a fast tokenizer.

    Raises:
        AssertionError: it does not; the message says where.
    """
    labels = task.labels(train, data)
    assert labels and all(isinstance(label, str) for label in labels), "labels are words"
    encoded = task.encode(train, data, tokenizer, labels)
    assert encoded.num_examples == len(train), f"{len(train)} examples became {encoded.num_examples}"
    assert encoded.targets, "encoded with labels, but without targets"
    assert all(len(target) == len(encoded) for target in encoded.targets.values()), "a target a row"
    assert encoded.targets.keys() <= encoded.pad.keys(), "no fill for a target"
    assert int(encoded.lengths().max()) <= task.max_length, "a row is longer than max_length"
    bare = task.encode(train.select_columns(task.inputs(data)), data, tokenizer, None)
    assert not bare.targets, "encoded for predictions, but with targets"
    for name, rows in encoded.features.items():
        assert np.array_equal(rows.values, bare.features[name].values), f"{name} depends on the answers"
    groups = task.groups(train, data)
    assert groups is None or len(groups) == len(train), "a group an example"
    assert len(task.texts(train, data)) == len(train), "a text an example"
    rng = np.random.default_rng(0)
    outputs = _random_outputs(task, encoded, len(labels), rng)
    for examples in (np.arange(len(train)), np.array([5, 1, 3])):
        own = [outputs[row] for row in encoded.rows_of(examples)]
        predictions = task.decode(own, encoded, examples)
        assert len(predictions) == len(examples), "a prediction an example"
        scores = task.score(predictions, encoded, examples)
        assert task.primary in scores, f"the score lacks {task.primary!r}"
        assert 0 <= scores[task.primary] <= 1, f"{task.primary} is no share, of which more is better"
        assert all(np.isfinite(value) for value in scores.values()), f"a score is not finite: {scores}"
        for prediction in predictions:
            json.dumps(task.show(prediction, labels))
    check_config(task, TASKS)


def _random_outputs(task: Task, encoded: Encoded, labels: int, rng: np.random.Generator) -> list[FloatArray]:
    """Return outputs of a random model of the task's kind, padded as in one batch."""
    width = int(encoded.lengths().max())
    shape = (len(encoded), labels) if "Sequence" in task.auto_class else (len(encoded), width, labels)
    logits = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    model_output = SimpleNamespace(logits=logits)
    if "Question" in task.auto_class:
        model_output = SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
    return list(task.outputs(model_output).float().numpy())


def check_method(method: Method, model_factory: Callable[[], nn.Module] | None = None) -> None:
    """Check that a method starts at the pretrained model's function, and that clients agree with the server.

    Two clients train on random tokens, on the server's own model and on one that was prepared from the state
    that the server sends.

    Args:
        method: its fields, `rank` for example, must fit the model.
        model_factory: returns the same fresh sequence classifier of transformers at every call, of 50 tokens
            or more; by default a BERT of two layers of width 64.

    Raises:
        AssertionError: what the method broke.
    """
    build = model_factory or _small_bert
    pristine, server, again, client, merged = (build().eval() for _ in range(5))
    names = [name for name, _ in pristine.named_parameters()]
    head = frozenset(name for name in names if not name.startswith(f"{pristine.base_model_prefix}."))
    data = _random_examples(pristine.config.num_labels)

    start = method.prepare(server, Setup(head, seed=5))
    _check_start(method, start, server, head)
    _check_logits(server, pristine, data, "the output at the start is not the pretrained model's")
    with torch_seeded(99):
        method.prepare(again, Setup(head, seed=5))
    check_same([_tensors(again)], [_tensors(server)], "the start depends on more than setup.seed")
    taken = method.prepare(client, Setup(head, seed=5, init=load(save(start))))
    check_same([taken], [start], "setup.init is not taken to the bit")
    check_same([_tensors(client)], [_tensors(server)], "a model prepared from setup.init is not the server's")

    trainer = _trainer(method, server, head)
    before = [copied(start), copied(_frozen(server))]
    deltas = _deltas(trainer, start, data, [0, 1])
    check_same([start, _frozen(server)], before, "training changed the state sent, or something frozen")
    _check_deltas(deltas, start, trainer, head)
    backwards = _deltas(trainer, start, data, [1, 0])
    check_same(backwards[::-1], deltas, "the order of the clients matters")
    theirs = _deltas(_trainer(method, client, head), start, data, [0, 1])
    check_same(theirs, deltas, "a client's update is not the one that the server's model gives")

    if "merged" in method.export_formats:
        method.prepare(merged, Setup(head, seed=5, init=start))
        trained = {name: start[name] + delta for name, delta in deltas[0].items()}
        for model in (again, merged):
            model.load_state_dict(trained, strict=False)
        method.merge(merged)
        assert [name for name, _ in merged.named_parameters()] == names, (
            "merge() leaves other names than it found"
        )
        _check_logits(merged, again, data, "merge() changes the output")
    check_config(method, METHODS)


def _small_bert() -> nn.Module:
    """Return a BERT with random weights, large enough for its output to depend on all of them."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.2,
    )
    with torch_seeded(0):
        model: nn.Module = transformers.BertForSequenceClassification(config)
        with torch.no_grad():
            for vector in (p for p in model.parameters() if p.ndim == 1):
                vector.add_(torch.randn_like(vector), alpha=0.1)  # biases are zero in a fresh model
    return model


def _random_examples(num_labels: int) -> Encoded:
    """Return 24 examples of 3 to 12 tokens."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 50, rng.integers(3, 13)).tolist() for _ in range(24)]
    return Encoded(
        {"input_ids": Ragged.from_rows(rows)},
        {"labels": np.arange(24) % num_labels},
        {"input_ids": 0, "labels": -100},
    )


def _trainer(method: Method, model: nn.Module, head: frozenset[str]) -> Trainer:
    """Return a trainer of three steps a job."""
    local = head if method.head == "local" else frozenset[str]()
    return Trainer(model, head, local, Classification(), ClientConfig(batch_size=4, precision="fp32"))


def _deltas(trainer: Trainer, start: State, data: Encoded, clients: Sequence[int]) -> list[State]:
    """Return the updates of clients that hold half of the rows each, and train in the given order."""
    sent, kept = ({name: start[name] for name in names} for names in (trainer.shared, trainer.local))
    deltas = []
    for client in clients:
        job = Job(round=1, client_id=client, seed=client, lr=1e-3)
        update, _ = trainer.train(sent, data, np.arange(client, 24, 2), job, kept)
        deltas.append(update.delta)
    return deltas


def _tensors(model: nn.Module) -> State:
    """Return all parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _frozen(model: nn.Module) -> State:
    """Return the parameters that do not train, and the buffers."""
    return {name: tensor for name, tensor in _tensors(model).items() if not tensor.requires_grad}


def _check_start(method: Method, start: State, model: nn.Module, head: frozenset[str]) -> None:
    """Check that the round-0 state is a float32 copy of exactly what trains, the head as `head` says."""
    trains = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    check_like(start, trains, "the state of what requires_grad")
    check_same([start], [trains], "the state is not what the model holds")
    shared = [name for name, tensor in start.items() if tensor.data_ptr() == trains[name].data_ptr()]
    assert not shared, f"the state is no copy: it shares memory with the model ({shared[0]})"
    expected = frozenset[str]() if method.head == "freeze" else head
    assert head & start.keys() == expected, (
        f"head={method.head}, but the state has {sorted(head & start.keys())}"
    )


def _check_deltas(deltas: Sequence[State], start: State, trainer: Trainer, head: frozenset[str]) -> None:
    """Check that something travels, outside the head too where it trains, and that clients differ."""
    assert trainer.shared, "nothing travels"
    own = [name for name in trainer.shared if name not in head] or trainer.shared
    for delta in deltas:
        check_like(delta, {name: start[name] for name in trainer.shared}, "an update")
        assert all(bool(tensor.isfinite().all()) for tensor in delta.values()), "an update is not finite"
        assert any(bool(delta[name].any()) for name in own), "training changes nothing that travels"
    assert any(not torch.equal(deltas[0][name], deltas[1][name]) for name in own), "all clients send the same"


def _check_logits(model: nn.Module, expected: nn.Module, data: Encoded, message: str) -> None:
    inputs = data.batch(np.arange(len(data)), torch.device("cpu"), labels=False)
    with torch.no_grad():
        ours, theirs = (m.eval()(**inputs).logits for m in (model, expected))
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert worst <= LOGIT_TOLERANCE, f"{message}: off by {worst:.1e}"
