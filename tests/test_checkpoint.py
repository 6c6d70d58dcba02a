"""The files of a run, and what is made of them when they are not as they should be."""

import json

import pytest
import torch

from federa.checkpoint import RunDirectory
from federa.types import FederaError, ServerState
from running import same

PARAMS = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "scale": torch.tensor(0.5)}
OPT = {"m/a.weight": torch.ones(3, 2), "v/scale": torch.tensor(2.0)}


@pytest.fixture
def folder(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_a_checkpoint_gives_back_what_it_was_given(folder):
    state = ServerState(7, PARAMS, OPT)
    folder.save_checkpoint(state)
    found = folder.load_checkpoint()
    assert found.round == 7 and same(found.params, PARAMS) and same(found.opt, OPT)
    folder.save_checkpoint(ServerState(8, PARAMS))
    found = folder.load_checkpoint()
    assert (found.round, dict(found.opt)) == (8, {})
    assert [f.name for f in folder.state.parent.iterdir()] == ["state.safetensors"]


def test_parameters_and_optimizer_of_like_names_stay_apart(folder):
    params, opt = {"opt/x": torch.ones(1), "params/x": torch.zeros(2)}, {"params/x": torch.full((3,), 2.0)}
    folder.save_checkpoint(ServerState(1, params, opt))
    found = folder.load_checkpoint()
    assert same(found.params, params) and same(found.opt, opt)


def test_the_same_state_is_the_same_bytes(folder):
    contents = set()
    for _ in range(8):
        folder.save_checkpoint(ServerState(3, PARAMS, OPT))
        contents.add(folder.state.read_bytes())
    assert len(contents) == 1


def test_a_checkpoint_that_is_none_or_damaged_is_one_line(folder, tmp_path):
    with pytest.raises(FederaError, match="does not exist"):
        folder.load_checkpoint()
    folder.save_checkpoint(ServerState(3, PARAMS))
    whole = folder.state.read_bytes()
    for damaged in (b"", whole[:9], whole[: len(whole) // 2], b"x" * 100):
        folder.state.write_bytes(damaged)
        with pytest.raises(FederaError, match="not a whole safetensors file"):
            folder.load_checkpoint()
    folder.save_init(PARAMS, "abc")
    folder.init.rename(folder.state)
    with pytest.raises(FederaError, match="names no round"):
        folder.load_checkpoint()


def test_records_leave_out_a_line_that_a_crash_cut_short(folder):
    assert folder.records() == []
    folder.path.mkdir()
    for number in (1, 2):
        folder.append({"round": number, "loss": 0.1 * number})
    whole = folder.metrics.read_text()
    assert folder.records() == [{"round": 1, "loss": 0.1}, {"round": 2, "loss": 0.2}]
    for cut in range(1, len(whole.splitlines()[1]) + 1):
        folder.metrics.write_text(whole[:-cut])
        assert folder.records() == [{"round": 1, "loss": 0.1}]
    folder.metrics.write_text(whole.replace("0.2", "oops"))
    with pytest.raises(FederaError, match="changed by hand"):
        folder.records()


def test_rewind_keeps_the_finished_rounds_and_wants_them_all(folder):
    folder.path.mkdir()
    lines = [{"round": number, "loss": 1.0} for number in (1, 2, 3)]
    for line in lines:
        folder.append(line)
    assert folder.rewind(2) == lines[:2] == folder.records()
    folder.append(lines[2])
    assert folder.rewind(3) == lines
    assert folder.metrics.read_text() == "".join(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(FederaError, match="every round up to 4"):
        folder.rewind(4)
    folder.metrics.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(FederaError, match="every round up to 2"):
        folder.rewind(2)
    assert folder.rewind(0) == [] and folder.metrics.read_bytes() == b""


def test_where_a_run_may_start(folder):
    assert folder.free and not folder.started
    with pytest.raises(FederaError, match=r"is not a run directory \(it has no config.yaml\)"):
        folder.require()
    folder.path.mkdir()
    assert folder.free
    (folder.path / ".config.yaml.partial").write_text("seed: 0\nrou")
    assert folder.free, "what a crash in the very first write leaves is in nobody's way"
    (folder.path / "notes.txt").write_text("mine")
    assert not folder.free
    folder.config.write_text("seed: 0\n")
    assert folder.started
    folder.require()


def test_json_files(folder):
    assert folder.read_json("result.json") is None
    folder.write_json("result.json", {"a": [1, None]})
    assert folder.read_json("result.json") == {"a": [1, None]}
