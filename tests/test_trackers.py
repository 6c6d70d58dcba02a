"""Where the numbers of a run go beside its own files."""

import json
import shutil
import struct

import pytest

from federa import FederaError, run, trackers
from federa.run import Observer
from federa.trackers import TRACKERS
from running import configure, short_reports, tree


def scalars(folder):
    """Read TensorBoard's files back: `{tag: {step: value}}`."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_number_of_every_round(recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    short_reports(monkeypatch)
    config = configure(recipe, rounds=3, client__max_steps=1, evaluate_every=2, track=["tensorboard"])
    result = run(config, tmp_path / "run")
    found = scalars(tmp_path / "run" / "tensorboard")
    for tag in ("loss", "clients", "rejected", "bytes_up", "seconds_round"):
        assert found[tag] == pytest.approx({r["round"]: r[tag] for r in result.records}, rel=1e-6)
    assert found["accuracy"] == pytest.approx(
        {r["round"]: r["accuracy"] for r in result.records if "accuracy" in r}
    )
    assert sorted(found["accuracy"]) == [2, 3]
    assert not {"round", "verdicts"} & set(found)


def test_a_tracker_gets_what_is_in_the_metrics_and_is_closed(recipe, tmp_path, monkeypatch):
    short_reports(monkeypatch)
    seen, closed = [], []

    class Mine:
        def __init__(self, folder):
            assert folder == tmp_path / "run"

        def log(self, record):
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == record, "told of a round that is not on the disk"
            seen.append(record["round"])
            if record["round"] == fail_at:
                raise RuntimeError("no more")

        def close(self):
            closed.append(len(seen))

    monkeypatch.setitem(TRACKERS, "mine", Mine)
    config, fail_at = configure(recipe, rounds=3, client__max_steps=1, evaluate_every=0, track=["mine"]), 2
    with pytest.raises(RuntimeError, match="no more"):
        run(config, tmp_path / "run")
    assert (seen, closed) == ([1, 2], [2])
    fail_at = 0
    run(None, tmp_path / "run", resume=True)
    assert (seen, closed) == ([1, 2, 3], [2, 3]), "a resume goes on, and tells no round twice"


def test_a_tracker_that_does_not_start_is_a_mistake_that_leaves_no_trace(recipe, tmp_path, monkeypatch):
    closed = []

    class First:
        def __init__(self, folder):
            self.close = lambda: closed.append(folder)

    def second(folder):
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setitem(TRACKERS, "first", First)
    monkeypatch.setitem(TRACKERS, "second", second)
    words = r"^track: second does not start \(ConnectionError: nobody answers\)$"
    with pytest.raises(FederaError, match=words):
        run(configure(recipe, track=["first", "second"]), tmp_path / "run")
    assert closed == [tmp_path / "run"] and tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_a_mistake_that_leaves_no_trace(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setattr(TRACKERS[name], "package", "federa_not_there")
    with pytest.raises(
        FederaError, match=rf"^track: {name} needs its package: pip install 'federa\[{name}\]'$"
    ):
        run(configure(recipe, track=[name]), tmp_path / "run")
    assert tree(tmp_path) == {}


def test_a_run_is_told_from_one_that_was_in_its_folder_before(tmp_path):
    (tmp_path / "run").mkdir()
    first = trackers._id(tmp_path / "run")
    assert trackers._id(tmp_path / "run") == first, "a resumed run goes on"
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert trackers._id(tmp_path / "run") != first


def halves(recipe, folder, tracker):
    """Run two rounds, and go on for one more as after a crash; return what all three recorded."""
    config = configure(recipe, rounds=3, client__max_steps=1, evaluate_every=3, track=[tracker])

    class Stop(Observer):
        def finished_round(self, record):
            if record["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, folder / "run", observer=Stop())
    return run(None, folder / "run", resume=True).records


def test_mlflow_goes_on_with_a_resumed_run(recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    short_reports(monkeypatch)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what is newer wants a data base
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    records = halves(recipe, tmp_path, "mlflow")
    (one,) = mlflow.search_runs(experiment_names=["federa"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(one.info.run_id, "loss")
    assert {m.step: m.value for m in history} == pytest.approx({r["round"]: r["loss"] for r in records})
    assert one.info.status == "FINISHED"
    assert one.data.metrics["accuracy"] == pytest.approx(records[-1]["accuracy"])


def log_records(content):
    """Yield the records of a log as LevelDB writes it, which W&B's files are behind seven bytes of their own."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # no room for a header in this block
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_writes_what_can_be_synced_later(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    short_reports(monkeypatch)
    records = halves(recipe, tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            if items:
                found[items["_step"]] = items["loss"]
    assert found == pytest.approx({r["round"]: r["loss"] for r in records})


def test_trackio_keeps_the_numbers_on_this_machine(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    short_reports(monkeypatch)
    records = halves(recipe, tmp_path, "trackio")
    storage = sqlite_storage.SQLiteStorage
    (name,) = storage.get_runs("federa")
    found = {log["step"]: log["loss"] for log in storage.get_logs("federa", name)}
    assert found == pytest.approx({r["round"]: r["loss"] for r in records})
