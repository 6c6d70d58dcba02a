"""A node by itself: what it refuses, what it wants first, and that it trains as the simulator's client does."""

import json
import re

import pytest
import torch

from federa.client import Trainer
from federa.data.datasets import Table, read_table
from federa.flower.messages import (
    INIT,
    PROTOCOL,
    SLACK_BYTES,
    VERSION,
    Hello,
    Here,
    Refused,
    Train,
    Trained,
    agreed,
    pack,
    unpack,
)
from federa.flower.node import Node
from federa.progress import console
from federa.state import norm
from federa.types import Job
from running import same

SECRETS = ("Wilhelmina", "Quokka", "Zanzibar", "Xylophone")


def hello(experiment, **changes):
    said = Hello(
        protocol=PROTOCOL,
        version=VERSION,
        run="run-1",
        recipe=agreed(experiment.config),
        base=experiment.fingerprint,
        labels=experiment.labels,
    )
    return said.model_copy(update=changes)


def job(number, **changes):
    said = Train(run="run-1", round=number, client=0, seed=10 + number, lr=3e-3)
    return said.model_copy(update=changes)


def ask(node, said, state=None):
    """Return what a node answers, and its tensors."""
    expected = Here if isinstance(said, Hello) else Trained
    return unpack(*node.answer(*pack(said, state)), expected, Refused)


def refused(answer):
    said, tensors = unpack(*answer, Here, Refused)
    assert isinstance(said, Refused) and not tensors, said
    return said


def refusal(node, said, state=None):
    return refused(node.answer(*pack(said, state)))


def ready(experiment, config):
    """Return a node that has joined."""
    node = Node(config)
    assert isinstance(ask(node, hello(experiment))[0], Here)
    return node


def with_init(experiment, state):
    return {**state, **{f"{INIT}{name}": tensor for name, tensor in experiment.params.items()}}


def served(node, experiment, said, state):
    """Return the delta of a job, after what the node wants first; and check that it is the simulator's."""
    answer, delta = ask(node, said, state)
    if isinstance(answer, Refused) and answer.wants == "hello":
        ask(node, hello(experiment))
        answer, delta = ask(node, said, state)
    if isinstance(answer, Refused) and answer.wants == "init":
        answer, delta = ask(node, said, with_init(experiment, state))
    assert isinstance(answer, Trained), answer
    update = experiment.train_client(state, Job(said.round, said.client, said.seed, said.lr))
    assert same(delta, update.delta)
    assert answer.weight == update.weight and answer.metrics["loss"] == update.metrics["loss"]
    return delta


def moved(state, by=0.01):
    """Return a state of a later round."""
    draw = torch.Generator().manual_seed(1)
    return {name: t + by * torch.randn(t.shape, generator=draw) for name, t in state.items()}


@pytest.fixture(params=["federa", "lora"])
def client(request, one_client):
    return one_client(request.param)


@pytest.fixture()
def lora(one_client):
    return one_client("lora")


@pytest.fixture()
def trainings(monkeypatch):
    """The jobs that are trained in earnest."""
    jobs, train = [], Trainer.train

    def counted(self, params, data, rows, job, local=None):
        jobs.append(job)
        return train(self, params, data, rows, job, local)

    monkeypatch.setattr(Trainer, "train", counted)
    return jobs


def table_of(config, folder, rows):
    """Return the recipe of an owner of other rows."""
    Table.from_list(rows).to_parquet(folder / "own.parquet")
    return config.replace(**{"data.train": str(folder / "own.parquet")})


@pytest.mark.parametrize("number", [None, 2])
def test_a_node_says_how_many_rows_it_has_and_who_it_is(lora, number):
    experiment, config = lora
    answer, tensors = ask(Node(config, number), hello(experiment))
    assert answer == Here(client=number, rows=len(experiment.parts[0])) and not tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.0.1"}, f"federa {VERSION} here and 0.0.1 at the server"),
        ({"protocol": PROTOCOL + 1}, "install the same"),
        ({"recipe": {"seed": 4}}, "recipe: seed is 3 here and 4 at the server"),
        ({"recipe": {"method": {"rank": 8}}}, "recipe: method.rank is 4 here and 8 at the server"),
        ({"recipe": {"client": {"own": 1}}}, "recipe: client.own is None here and 1 at the server"),
        ({"base": "00ff"}, "model.name"),
    ],
    ids=["version", "protocol", "seed", "rank", "unknown", "base"],
)
def test_a_server_that_does_not_fit_is_refused(lora, changes, words):
    experiment, config = lora
    node, right = Node(config), hello(experiment)
    for part, value in changes.get("recipe", {}).items():
        whole = {**right.recipe[part], **value} if isinstance(value, dict) else value
        changes = {"recipe": {**right.recipe, part: whole}}
    answer = refusal(node, right.model_copy(update=changes))
    assert words in answer.reason and answer.wants is None
    assert refusal(node, job(1), experiment.params).wants == "hello"
    ask(node, right)
    served(node, experiment, job(1), experiment.params)


def test_a_label_that_the_server_does_not_have_is_not_told(lora, tmp_path):
    experiment, config = lora
    rows = [*read_table(config.data.train, "train"), {"text": "Zanzibar " * 3, "label": "Quokka"}]
    told = []
    node = Node(table_of(config, tmp_path, rows), told=told.append)
    answer = refusal(node, hello(experiment))
    assert answer.reason == "its own data do not fit"
    assert f"row {len(rows) - 1}: label 'Quokka'" in told[-1], "its owner is told"
    assert isinstance(ask(node, hello(experiment, labels=["Quokka", *experiment.labels]))[0], Here)


def test_nothing_is_trained_before_a_hello(client):
    experiment, config = client
    node = Node(config)
    assert refusal(node, job(1), experiment.params).wants == "hello"
    served(node, experiment, job(1), experiment.params)


def test_another_run_wants_a_hello_and_begins_at_its_first_round(client):
    experiment, config = client
    node = ready(experiment, config)
    for number in (1, 2):
        served(node, experiment, job(number), experiment.params)
    assert refusal(node, job(1, run="run-2"), experiment.params).wants == "hello"
    ask(node, hello(experiment, run="run-2"))
    delta = ask(node, job(1, run="run-2"), experiment.params)[1]
    assert same(delta, ask(ready(experiment, config), job(1), experiment.params)[1])
    assert refusal(node, job(3), experiment.params).wants == "hello"


def test_only_where_the_base_moves_a_late_node_wants_the_first_state(client):
    experiment, config = client
    node, state = ready(experiment, config), moved(experiment.params)
    answer, delta = ask(node, job(2), state)
    if config.method.name == "lora":
        assert isinstance(answer, Trained)
    else:
        assert (answer.kind, answer.wants, delta) == ("refused", "init", {})
    served(node, experiment, job(2), state)
    assert isinstance(ask(node, job(3), state)[0], Trained), "once is enough"


def test_a_job_that_is_asked_again_is_answered_from_memory(lora, trainings):
    experiment, config = lora
    node, said = ready(experiment, config), pack(job(1), experiment.params)
    first = node.answer(*said)
    assert node.answer(*said) == first
    assert [(job.round, job.seed) for job in trainings] == [(1, 11)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_that_is_over_is_refused(lora, trainings, number):
    experiment, config = lora
    node = ready(experiment, config)
    served(node, experiment, job(2), experiment.params)
    trainings.clear()
    answer = refusal(node, job(number, seed=99), experiment.params)
    assert answer.reason == f"round {number} is over: this node has answered round 2"
    assert answer.wants is None and not trainings
    served(node, experiment, job(3), experiment.params)


def test_a_second_hello_of_a_run_forgets_nothing(lora, trainings):
    experiment, config = lora
    node = ready(experiment, config)
    served(node, experiment, job(1), experiment.params)
    trainings.clear()
    assert isinstance(ask(node, hello(experiment))[0], Here)
    assert isinstance(ask(node, job(1), experiment.params)[0], Trained) and not trainings
    assert "fingerprint" in refusal(node, hello(experiment, base="00ff")).reason


FAULTS = {
    "missing": lambda name, state: {n: t for n, t in state.items() if n != name},
    "extra": lambda name, state: {**state, "odd": state[name].clone()},
    "shape": lambda name, state: {**state, name: state[name][:-1]},
    "NaN": lambda name, state: {**state, name: torch.full_like(state[name], torch.nan)},
    "Inf": lambda name, state: {**state, name: torch.full_like(state[name], torch.inf)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_that_does_not_fit_is_refused_and_leaves_nothing_behind(client, fault):
    experiment, config = client
    node, state = ready(experiment, config), moved(experiment.params)
    served(node, experiment, job(1), experiment.params)
    for name in state:
        answer = refusal(node, job(2), FAULTS[fault](name, state))
        assert ("odd" if fault == "extra" else name) in answer.reason and answer.wants is None
    served(node, experiment, job(2), state)


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "extra",
        "shape",
        "NaN",
        "Inf",
    ],
)
def test_a_first_state_that_does_not_fit_leaves_nothing_behind(client, fault):
    experiment, config = client
    for name in (next(iter(experiment.params)), [*experiment.params][-1]):
        node = ready(experiment, config)
        assert refusal(node, job(1), FAULTS[fault](name, experiment.params)).wants is None
        served(node, experiment, job(1), experiment.params)


@pytest.mark.parametrize(
    "fault",
    [
        "extra",
        "shape",
        "missing",
        "NaN",
    ],
)
def test_a_round_0_state_that_does_not_fit_leaves_nothing_behind(one_client, fault):
    experiment, config = one_client("federa")
    node, state = ready(experiment, config), moved(experiment.params)
    init = FAULTS[fault](next(name for name in state if "lora_A" in name), experiment.params)
    both = {**state, **{f"{INIT}{name}": tensor for name, tensor in init.items()}}
    refusal(node, job(2), both)
    served(node, experiment, job(2), state)


def test_a_node_that_replaces_another_goes_on_as_it_would_have(client):
    experiment, config = client
    one, state = ready(experiment, config), moved(experiment.params)
    served(one, experiment, job(1), experiment.params)
    other = ready(experiment, config)
    assert same(served(one, experiment, job(2), state), served(other, experiment, job(2), state))


def test_a_failure_is_told_by_its_kind_alone(lora, monkeypatch):
    experiment, config = lora
    told = []
    node = Node(config, told=told.append)
    ask(node, hello(experiment))
    with monkeypatch.context() as patch:

        def fail(*_):
            raise RuntimeError("Wilhelmina is row 3")

        patch.setattr(Trainer, "loss", fail)
        answer = refusal(node, job(1), experiment.params)
    assert answer.reason == "failed: RuntimeError" and answer.wants is None
    assert told[-1] == "failed: RuntimeError: Wilhelmina is row 3"
    served(node, experiment, job(1), experiment.params)


@pytest.mark.parametrize(
    "where",
    [
        "prepare",
        "KeptStates",
    ],
)
def test_a_model_that_was_prepared_half_way_is_loaded_again(client, monkeypatch, where):
    experiment, config = client
    node = ready(experiment, config)
    with monkeypatch.context() as patch:
        patch.setattr(f"federa.flower.node.{where}", lambda *_: 1 / 0)
        assert refusal(node, job(1), experiment.params).reason == "failed: ZeroDivisionError"
    assert refusal(node, job(1), experiment.params).wants == "hello"
    served(node, experiment, job(1), experiment.params)


@pytest.mark.parametrize(
    "header",
    [b"", b"\x80", b"{}", b'{"kind": "trained"}', b"[" * 100_000],
    ids=["empty", "no JSON", "no kind", "a reply", "deep"],
)
def test_whatever_is_asked_there_is_an_answer(lora, header):
    experiment, config = lora
    node = Node(config)
    assert refused(node.answer(header, b"")).reason.startswith("message: ")
    ask(node, hello(experiment))
    assert refused(node.answer(pack(job(1))[0], b"\x80\x04N.")).reason == "message: damaged (SafetensorError)"
    served(node, experiment, job(1), experiment.params)


def test_more_bytes_than_a_state_can_have_are_not_looked_at(client, monkeypatch):
    """Before the method has prepared the model a state's size is not known, but the model's is."""
    experiment, config = client
    node, state = ready(experiment, config), moved(experiment.params)
    model = sum(p.numel() for p in experiment.trainer.model.parameters())
    size = 4 * sum(t.numel() for t in state.values())
    for number, state, most in ((1, experiment.params, 2 * 2 * 4 * model), (2, state, 2 * size)):
        with monkeypatch.context() as patch:
            patch.setattr("federa.flower.messages.load", lambda _: pytest.fail("they were read"))
            reason = refused(node.answer(pack(job(number))[0], bytes(most + SLACK_BYTES + 1))).reason
        found = re.fullmatch(r"state: (\d+) bytes, more than (\d+)", reason)
        assert found and most <= int(found[2]) < int(found[1]) and int(found[2]) < 1.5 * most + SLACK_BYTES
        served(node, experiment, job(number), state)


def test_what_is_private_leaves_a_node_clipped(one_client):
    experiment, config = one_client("lora")
    plain = {"aggregator": {"name": "mean", "weighted": False}}
    private = config.replace(**plain, privacy={"clip": 0.01, "noise_multiplier": 1.0})
    whole = served(ready(experiment, config), experiment, job(1), experiment.params)
    node = Node(private)
    ask(node, hello(experiment, recipe=agreed(private)))
    answer, delta = ask(node, job(1), experiment.params)
    assert isinstance(answer, Trained) and norm(whole) > 0.02
    assert 0.0099 < norm(delta) <= 0.01 * (1 + 1e-6)


def test_words_that_look_like_markup_are_shown_as_they_are(lora, capsys):
    """Markup that is wrong would end the node: any server could."""
    node = Node(lora[1], told=console().print)
    assert "[/x]" in refused(node.answer(b'{"kind": "[/x]"}', b"")).reason
    assert "refused: message: '[/x]' was not expected\n" in capsys.readouterr().out


def test_text_that_cannot_be_written_is_answered(lora):
    """Half of a surrogate pair: JSON can say it, and a reason that repeats it is no UTF-8."""
    experiment, config = lora
    raw = {**hello(experiment).model_dump(), "version": "\ud800"}
    refused(Node(config).answer(json.dumps(raw).encode(), b""))


@pytest.mark.parametrize("task", ["whole", "broken"])
def test_no_word_of_the_table_leaves_a_node(lora, tmp_path, monkeypatch, task):
    experiment, config = lora
    rows = [
        {"text": f"{word} the match on the network {i}", "label": experiment.labels[i % 3]}
        for i, word in enumerate(SECRETS * 4)
    ]
    if task == "broken":
        rows[5]["label"] = "Mistletoe"
    node = Node(table_of(config, tmp_path, rows))
    said = [
        (hello(experiment), None),
        (job(1), experiment.params),
        (job(1), experiment.params),
        (job(1, seed=99), experiment.params),
        (job(2), {}),
        (job(2), with_init(experiment, moved(experiment.params))),
    ]
    answers = [node.answer(*pack(*one)) for one in said]
    monkeypatch.setattr(Trainer, "loss", lambda self, data, rows: {}["Mistletoe"])
    answers.append(node.answer(*pack(job(3), experiment.params)))
    kinds = [json.loads(header)["kind"] for header, _ in answers]
    if task == "whole":
        assert kinds == ["here", "trained", "trained", "refused", "refused", "trained", "refused"]
    else:
        assert set(kinds) == {"refused"}
    everything = b"".join(part for answer in answers for part in answer).lower()
    for word in (*SECRETS, "Mistletoe", "match", "network", *experiment.labels):
        assert word.lower().encode() not in everything
        assert word.lower().encode("utf-16-le") not in everything
