"""Where the numbers of a run go beside its own files."""

import json

import pytest

from federa import FederaError, run
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


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_a_mistake_that_leaves_no_trace(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setattr(TRACKERS[name], "package", "federa_not_there")
    with pytest.raises(
        FederaError, match=rf"^track: {name} needs its package: pip install 'federa\[{name}\]'$"
    ):
        run(configure(recipe, track=[name]), tmp_path / "run")
    assert tree(tmp_path) == {}
