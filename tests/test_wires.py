"""Updates that are rounded on their way: what comes back, what is counted, and that nothing else changes."""

import json

import pytest
import torch

from federa import run
from federa.config import parse_config
from federa.server import verdict
from federa.types import FederaError, Job, Update
from federa.wires import WIRES, Fp16, Fp32, Int8, encode_update
from running import build, configure, furthest, same, steady

JOB = Job(1, 0, 0, 0.1)


class Memory:
    def __init__(self):
        self.kept = {}

    def load(self, job):
        return self.kept

    def save(self, job, state):
        self.kept = state


def test_int8_by_hand():
    delta = {"w": torch.tensor([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0]]), "b": torch.tensor([2.54, 0.02])}
    sent = Int8().encode(delta)
    assert sent["w"].tolist() == [[127, -64, 1], [0, 0, 0]] and sent["w"].dtype == torch.int8
    assert sent["w/scale"].tolist() == [[pytest.approx(1 / 127)], [0.0]]
    assert sent["b"].tolist() == [127, 1]
    read = Int8().decode(sent, delta)
    torch.testing.assert_close(read["w"][0], torch.tensor([1.0, -64 / 127, 1 / 127]))
    assert read["w"][1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("shape", "scales"), [((32, 384), 32), ((384, 32), 32), ((384,), 1), ((), 1)])
def test_a_scale_is_shared_along_the_longest_axis(shape, scales):
    sent = Int8().encode({"w": torch.randn(shape)})
    assert sent["w/scale"].numel() == scales


@pytest.mark.parametrize(("name", "at_least"), [("fp32", 1), ("fp16", 2), ("int8", 3.5)])
def test_bytes_at_the_default_rank(recipe, name, at_least):
    params = build(recipe, method__rank=32).params
    assert WIRES.parse("fp32").size(params) / WIRES.parse(name).size(params) >= at_least


def test_what_rounding_takes_away_is_sent_later():
    kept, wire = Memory(), Int8()
    delta = {"w": torch.tensor([1.0, 0.001])}  # the second is less than half a step
    total = torch.zeros(2)
    for _ in range(12):
        sent = encode_update(wire, Update(JOB, delta, 1.0, {}), kept)
        total += wire.decode(sent, delta)["w"]
    torch.testing.assert_close(total, 12 * delta["w"], atol=1 / 127, rtol=0)
    assert wire.decode(wire.encode(delta), delta)["w"][1] == 0, "without feedback never"


def test_without_feedback_nothing_is_kept():
    kept = Memory()
    encode_update(Int8(error_feedback=False), Update(JOB, {"w": torch.randn(5)}, 1.0, {}), kept)
    assert kept.kept == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WIRES.names())
def test_what_is_no_number_is_still_none_at_the_server(name, value):
    delta = {"w": torch.randn(4, 3), "b": torch.randn(3)}
    delta["w"][2, 1] = value
    wire = WIRES.parse(name)
    read = wire.decode(wire.encode(delta), delta)
    assert verdict(Update(JOB, read, 1.0, {}), delta, 1e9).startswith("not finite")


LIKE = {"w": torch.zeros(4, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sent: sent.pop("b"),
        lambda sent: sent.pop("w/scale"),
        lambda sent: sent.update(c=torch.zeros(1)),
        lambda sent: sent.update(w=sent["w"].int()),
        lambda sent: sent.update(w=sent["w"][:2]),
        lambda sent: sent.update({"w/scale": sent["w/scale"].double()}),
        lambda sent: sent.update({"w/scale": sent["w/scale"][:, :1]}),
    ],
)
def test_int8_that_does_not_fit_is_refused(spoil):
    sent = Int8().encode({name: torch.randn(t.shape) for name, t in LIKE.items()})
    spoil(sent)
    with pytest.raises(FederaError, match=r"^wire int8: "):
        Int8().decode(sent, LIKE)


def test_fp16_that_came_wider_is_refused():
    with pytest.raises(FederaError, match=r"wire fp16: 'w' came as torch\.float32"):
        Fp16().decode({"w": torch.zeros(4, 3), "b": torch.zeros(3).half()}, LIKE)


def test_fp32_leaves_wrong_updates_to_the_servers_checks():
    found = Fp32().decode({"x": torch.zeros(1), "b": torch.zeros(3)}, LIKE)
    assert list(found) == ["b", "x"]
    assert verdict(Update(JOB, found, 1.0, {}), LIKE, 1.0).startswith("wrong keys")


# Runs


def test_a_rounded_run_stays_close_to_a_whole_one(recipe):
    changes = {"client__dropout": 0.0, "rounds": 2}
    whole, half, byte = (run(configure(recipe, wire=name, **changes)) for name in ("fp32", "fp16", "int8"))
    start = build(recipe).params
    moved = furthest(start, whole.state.params)
    assert furthest(half.state.params, whole.state.params) < 0.01 * moved
    assert furthest(byte.state.params, whole.state.params) < 0.2 * moved
    assert not same(byte.state.params, half.state.params)


@pytest.mark.parametrize("engine", [{"name": "processes", "workers": 2}, {"name": "stacked", "threads": 1}])
def test_every_engine_sends_the_same(recipe, engine):
    changes = {"wire": "int8", "client__dropout": 0.0, "rounds": 2}
    serial, other = run(configure(recipe, **changes)), run(configure(recipe, engine=engine, **changes))
    if engine["name"] == "processes":
        assert same(serial.state.params, other.state.params)
        assert steady(serial.records) == steady(other.records)
    else:  # to rounding, of which a step of int8 may be the consequence
        assert furthest(serial.state.params, other.state.params) < 1e-3


def test_bytes_are_those_of_the_wire(recipe, tmp_path):
    config = configure(recipe, wire="int8", rounds=1)
    experiment = build(recipe)
    record = run(config).records[0]
    assert record["bytes_up"] == 3 * Int8().size(experiment.params)
    assert record["bytes_up"] < run(configure(recipe, rounds=1)).records[0]["bytes_up"] / 2


def test_a_resumed_run_remembers_what_was_not_sent(recipe, tmp_path):
    class Stop(Exception):
        pass

    class Stops:
        def __getattr__(self, name):
            return lambda *_: None

        def finished_round(self, record):
            if record["round"] == 2:
                raise Stop

    config = configure(recipe, wire="int8", rounds=4, cohort=5)
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        run(config, tmp_path / "cut", observer=Stops())
    resumed = run(None, tmp_path / "cut", resume=True)
    assert same(resumed.state.params, whole.state.params)
    assert steady(resumed.records) == steady(whole.records)
    forgetful = run(config.replace(wire={"name": "int8", "error_feedback": False}))
    assert not same(forgetful.state.params, whole.state.params), "else nothing was remembered"


def test_recipes_name_it(recipe):
    assert parse_config({**recipe, "wire": "fp16"}).wire == Fp16()
    assert parse_config(recipe).wire == Fp32()
    assert json.loads(parse_config({**recipe, "wire": "int8"}).model_dump_json())["wire"]["error_feedback"]
    with pytest.raises(FederaError, match="wire"):
        parse_config({**recipe, "wire": "int4"})
