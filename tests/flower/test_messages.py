"""Messages: they come as they were sent, and whatever is wrong with one is a line."""

import json
import math
import pickle
import re
import struct

import pytest
import torch

from federa.flower.messages import (
    HEADER_BYTES,
    KINDS,
    Hello,
    Here,
    Refused,
    Train,
    Trained,
    agreed,
    difference,
    pack,
    unpack,
)
from federa.types import FederaError
from running import configure, same

SAID = {
    "hello": Hello(
        protocol=1,
        version="0.1",
        run="r1",
        recipe={"seed": 3, "client": {"lr": 0.1, "max_steps": None}},
        base="00ff",
        labels=["ä", "b"],
    ),
    "here": Here(client=None, rows=12),
    "train": Train(run="r1", round=2, client=0, seed=2**63 - 1, lr=1e-3 / 3),
    "trained": Trained(run="r1", round=2, client=0, seed=5, weight=12.0, metrics={"loss": 1 / 3}),
    "refused": Refused(reason="why", wants="init"),
}
STATE = {"a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(0.5), "c": torch.zeros(0, 3)}
HEADER, TENSORS = pack(SAID["trained"], STATE)


def changed(**changes):
    """The header of `Trained` with fields changed; those that are None are left out."""
    raw = {**json.loads(HEADER), **changes}
    return json.dumps({key: value for key, value in raw.items() if value is not None}).encode()


def refusal(header, tensors=b""):
    """What is said of a message that is not right: one line, that a terminal can show."""
    with pytest.raises(FederaError) as caught:
        unpack(header, tensors, Trained, Refused)
    line = str(caught.value)
    assert line.startswith("message: ") and line.isprintable() and len(line) < 500
    return line


@pytest.mark.parametrize("state", [None, STATE], ids=["bare", "tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_as_it_was_sent(kind, state):
    said, tensors = unpack(*pack(SAID[kind], state), type(SAID[kind]), Refused)
    assert said == SAID[kind] and type(said) is KINDS[kind]
    assert same(tensors, state or {})
    assert (pack(SAID[kind], state)[1] == b"") == (state is None)


def test_metrics_that_are_no_numbers_come_as_such():
    metrics = {"loss": math.nan, "up": math.inf, "down": -math.inf}
    said, _ = unpack(*pack(SAID["trained"].model_copy(update={"metrics": metrics})), Trained, Refused)
    assert math.isnan(said.metrics["loss"])
    assert said.metrics["up"] == math.inf and said.metrics["down"] == -math.inf


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (changed(kind="exec"), "'exec' was not expected"),
        (changed(kind=["trained"]), "was not expected"),
        (changed(kind=None), "None was not expected"),
        (changed(kind="x" * 1000), "^message: .{,40} was not expected"),
        (pack(SAID["hello"])[0], "'hello' was not expected"),
        (changed(extra=1), "extra: Extra inputs are not permitted"),
        (changed(weight=None), "weight: Field required"),
        (changed(round="2"), "round: Input should be a valid integer"),
        (changed(round=True), "round: Input should be a valid integer"),
        (changed(weight="12"), "weight: Input should be a valid number"),
        (changed(weight=10**400), "weight: Input should be a valid number"),
        (changed(metrics={"loss": "low"}), "metrics.loss: Input should be a valid number"),
        (b"", "damaged"),
        (b"\x80\x04N.", "damaged"),
        (HEADER[:-1], "damaged"),
        (HEADER.replace(b"12.0", b"1" * 5000), "damaged"),
        (b"[1, 2]", "None was not expected"),
        (b'"trained"', "None was not expected"),
        (b"[" * 100_000, "damaged"),
        (b'{"kind":' * 100_000, "damaged"),
        (HEADER.ljust(HEADER_BYTES + 1), f"a header of {HEADER_BYTES + 1} bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_is_not_right_is_a_line(header, words):
    assert re.search(words, refusal(header))


def test_a_header_may_be_as_long_as_the_limit():
    unpack(HEADER.ljust(HEADER_BYTES), b"", Trained, Refused)


class Opened:
    """A pickle that says when it is opened."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def blob(dtype, shape, data):
    """A safetensors file by hand."""
    about = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(about)) + about + data


@pytest.mark.parametrize(
    "tensors",
    [
        TENSORS[:-1],
        TENSORS[:7],
        TENSORS + b"x",
        pickle.dumps(Opened()),
        struct.pack("<Q", 1 << 60) + TENSORS[8:],
        blob("F32", [5], bytes(16)),
        blob("F32", [1 << 62, 4], b""),
        blob("none", [4], bytes(16)),
        blob("F4", [8], bytes(4)),
        blob("F8_E8M0", [8], bytes(8)),
    ],
    ids=["cut", "short", "longer", "pickle", "header", "size", "vast", "type", "F4", "F8_E8M0"],
)
def test_tensors_that_are_not_right_are_a_line(tensors):
    assert "damaged" in refusal(HEADER, tensors)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "x" * 1000], ids=["two lines", "terminal", "long"])
def test_a_strangers_names_are_no_more_than_a_line(name):
    refusal(changed(**{name: 1}))


def test_text_that_cannot_be_written_is_refused():
    """Half of a surrogate pair: JSON can say it, and no file or terminal takes it."""
    refusal(changed(run="\ud800"))


def test_what_is_of_one_machine_need_not_agree(recipe):
    one = agreed(configure(recipe))
    other = configure(
        recipe,
        device="cpu",
        client__precision="bf16",
        client__micro_batch=1,
        client__cuda_graphs=False,
        client__checkpointing=True,
        client__reuse_frozen=True,
        engine={"name": "processes"},
        data={"train": "x"},
    )
    assert agreed(other) == one
    assert json.loads(json.dumps(one)) == one


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"task__max_length": 16},
        {"method__rank": 8},
        {"client__lr": 0.5},
        {"client__batch_size": 4},
        {"wire": {"name": "int8"}},
        {"model__train_pooler": False},
    ],
    ids=str,
)
def test_what_shapes_an_update_must_agree(recipe, changes):
    assert agreed(configure(recipe, **changes)) != agreed(configure(recipe))


@pytest.mark.parametrize(
    ("asked", "own", "words"),
    [
        ({"a": 1, "b": {"c": 2.0}}, {"a": 1, "b": {"c": 2}}, None),
        ({"a": 1, "z": 0}, {"z": 1, "a": 2}, "z is 1 here and 0 at the server"),
        ({"b": {"c": {"d": "x"}}}, {"b": {"c": {"d": "y"}}}, "b.c.d is 'y' here and 'x' at the server"),
        ({"b": {}}, {"b": {"c": 3}}, "b.c is 3 here and None at the server"),
        ({"a": 1, "b": {"c": 3}}, {"a": 1}, "b is None here and {'c': 3} at the server"),
        ({"a": {"c": 1}}, {"a": "c"}, "a is 'c' here and {'c': 1} at the server"),
    ],
)
def test_the_first_key_that_differs_is_named(asked, own, words):
    assert difference(asked, own) == words


def test_a_long_value_that_differs_is_cut_short():
    assert len(difference({"a": "x" * 1000}, {"a": "y" * 1000})) < 200
