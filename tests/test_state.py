"""Copies, norms, fingerprints, and files that are whole or not there."""

import os

import pytest
import torch
from torch import nn

from federa.state import (
    fingerprint,
    load_state,
    norm,
    num_bytes,
    num_parameters,
    save_state,
    snapshot,
    trained_parameters,
    write_atomically,
)
from federa.types import FederaError

STATE = {"b": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "a": torch.tensor([12.0])}


def test_snapshot_is_a_detached_float32_copy():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    copy = snapshot(dict(model.named_parameters()))
    assert all(
        t.dtype == torch.float32 and not t.requires_grad and t.device.type == "cpu" for t in copy.values()
    )
    kept = copy["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(copy["weight"], kept)
    state = {"x": torch.ones(3)}
    snapshot(state)["x"].zero_()
    assert torch.equal(state["x"], torch.ones(3)), "a copy even where nothing is converted"


def test_trained_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(trained_parameters(model)) == ["1.weight", "1.bias"]
    assert trained_parameters(model)["1.bias"] is model[1].bias


def test_norm_and_sizes():
    assert norm(STATE) == 13.0
    assert norm({}) == 0.0
    assert num_parameters(STATE.values()) == 5
    assert num_bytes(STATE) == 20


def test_norm_is_summed_in_float64_and_shows_what_is_no_number():
    assert norm({"x": torch.tensor([1e25, 1e25])}) == pytest.approx(2**0.5 * 1e25, rel=1e-6)
    assert norm({"x": torch.tensor([4096.0]), "y": torch.full((1000,), 1e-2)}) > 4096
    assert str(norm({"x": torch.tensor([1.0, float("nan")])})) == "nan"
    assert norm({"x": torch.tensor([1.0, float("-inf")])}) == float("inf")


def test_fingerprint_is_of_names_shapes_types_and_bytes():
    same = fingerprint(STATE)
    assert len(same) == 64
    assert fingerprint(dict(reversed(STATE.items()))) == same, "not of the order"
    assert fingerprint({n: t.clone().requires_grad_() for n, t in STATE.items()}) == same
    assert fingerprint({**STATE, "b": STATE["b"].T.contiguous().T}) == same, "not of the strides"
    b = STATE["b"]
    others = [
        {**STATE, "b": torch.nextafter(b, b + 1)},
        {**STATE, "b": b.view(4)},
        {**STATE, "b": b.double()},
        {**STATE, "b": b.view(torch.int32)},
        {"a": STATE["a"], "c": b},
        {"b": b},
        {**STATE, "c": torch.ones(1)},
        {"a": torch.tensor([-0.0])},
        {"a": torch.tensor([0.0])},
        {},
    ]
    prints = [same, *map(fingerprint, others)]
    assert len(set(prints)) == len(prints)


def test_fingerprint_of_scalars_and_half_precision():
    assert fingerprint({"s": torch.tensor(1.0)}) != fingerprint({"s": torch.tensor([1.0])})
    assert fingerprint({"s": torch.ones(2, dtype=torch.bfloat16)}) != fingerprint({"s": torch.ones(2).half()})


def test_a_state_survives_the_disk(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    state = {**STATE, "view": torch.arange(6.0).view(2, 3).T, "s": torch.tensor(2.5), "n": torch.tensor([7])}
    save_state(path, state, {"round": "3", "fingerprint": "ü"})
    tensors, metadata = load_state(path)
    assert metadata == {"round": "3", "fingerprint": "ü"}
    assert fingerprint(tensors) == fingerprint(state)
    save_state(path, {}, {})
    assert load_state(path) == ({}, {})


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_state(tmp_path / name, STATE, {"round": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:5], lambda b: b[:-1], lambda b: b"x" * len(b)]
)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    save_state(path, STATE, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FederaError, match="is not a whole safetensors file") as error:
        load_state(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FederaError, match="does not exist"):
        load_state(tmp_path / "nowhere")


def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*args):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, crash)
            with pytest.raises(KeyboardInterrupt):
                write_atomically(path, b"new and longer")
        assert path.read_bytes() == b"old", step
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["file"], "nothing is left beside it"


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, then rename, then fsync of the folder: another order can lose both after a power cut."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    write_atomically(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"]
