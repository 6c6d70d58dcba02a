"""The comparison against the peers: plan, equality, measurement, resume and refusal, on a small encoder."""

import json
import subprocess
import sys
from pathlib import Path

import compare
import contenders
import numpy as np
import pytest
import report
import torch
from agree import figures
from measure import Measurement
from safetensors.torch import save_file
from workload import Marks, Order, Plan, Workload

pytest.importorskip("peft")
HERE = Path(compare.__file__).parent


@pytest.fixture(scope="module")
def plan(encoder_folder, tmp_path_factory):
    """A plan of three rounds on a small BERT."""
    from plan import write_plan

    folder = tmp_path_factory.mktemp("peers") / "plan"
    settings = {"clients": 4, "cohort": 2, "examples": 8, "tokens": 12, "batch": 4, "rounds": 3, "rank": 4}
    write_plan(Workload(**settings, model=str(encoder_folder)), folder)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(encoder):
    return encoder("bert")


@pytest.fixture(scope="module")
def finals(plan, tmp_path_factory):
    """Run a script's `main` in this process, and return its final tensors and marks."""
    from safetensors.torch import load_file

    def run(script, threads=1, of=plan):
        out = tmp_path_factory.mktemp("run")
        module = __import__(f"run_{script}")
        module.main(Order(of, out, 3, 1, threads, 0.0, "fp32"))
        return load_file(out / "final.safetensors"), json.loads((out / "run.json").read_text())

    return run


def test_a_plan_is_of_equal_work(plan):
    read = Plan(plan)
    assert read.inputs.shape == (32, 12)
    assert (read.inputs > 0).all(), "no padding"
    assert read.cohorts.shape == (3, 2) and read.orders.shape == (3, 2, 8)
    orders: dict[int, list[list[int]]] = {}
    for round_number in (1, 2, 3):
        for client in read.cohort(round_number):
            assert read.batches(round_number, client).shape == (2, 4)
            rows = read.order(round_number, client)
            assert len(set(rows.tolist())) == 8
            orders.setdefault(int(client), []).append(rows.tolist())
    again = [seen for seen in orders.values() if len(seen) > 1]
    assert again, "no client trains twice: nothing is compared"
    for seen in again:
        assert sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1], "the same rows in another order"


def test_federa_and_the_plain_loop_end_in_the_same_tensors(plan, finals):
    ours, marks = finals("federa")
    theirs, plain_marks = finals("plain")
    apart = figures(Plan(plan).initial(), ours, theirs)
    assert apart["largest"] <= report.TOLERANCE
    assert apart["of_movement"] < 1e-3
    for one in (marks, plain_marks):
        assert len(one["round_ends"]) == len(one["train_seconds"]) == 3
        assert one["round_ends"] == sorted(one["round_ends"])


def test_another_order_of_rows_is_noticed(plan, finals, tmp_path):
    ours, _ = finals("federa")
    other = tmp_path / "plan"
    other.mkdir()
    for file in plan.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with np.load(plan / "plan.npz") as arrays:
        changed = {**arrays, "orders": arrays["orders"][:, :, ::-1]}
    np.savez(other / "plan.npz", **changed)
    theirs, _ = finals("plain", of=other)
    assert figures(Plan(plan).initial(), ours, theirs)["largest"] > report.TOLERANCE
    with pytest.raises(SystemExit, match="batches are not the plan's"):
        finals("federa", of=other)


def test_a_state_is_judged_on_texts_that_nobody_has_trained_on(plan, finals, tmp_path):
    import quality

    read = Plan(plan)
    texts, labels = quality.held_out(read)
    assert texts.shape == (quality.ROWS, 12) and np.bincount(labels).tolist() == [quality.ROWS // 5] * 5
    seen = {tuple(row) for row in read.inputs.tolist()}
    assert not seen & {tuple(row) for row in texts.tolist()}
    ours, _ = finals("federa")
    blind = {name: tensor * (not name.startswith("classifier")) for name, tensor in ours.items()}
    plain = {name: tensor * (not name.endswith("lora_B")) for name, tensor in ours.items()}
    broken = {name: tensor / 0 for name, tensor in ours.items()}
    for name, state in {"ours": ours, "blind": blind, "plain": plain, "broken": broken}.items():
        save_file(state, tmp_path / name)
    guessed = quality.scores(read, tmp_path / "blind")
    assert guessed == {"loss": pytest.approx(np.log(5)), "accuracy": pytest.approx(0.2)}
    losses = {guessed["loss"], *(quality.scores(read, tmp_path / name)["loss"] for name in ("ours", "plain"))}
    assert len(losses) == 3, "the head counts, and so do the factors"
    with pytest.raises(SystemExit, match="NaN or infinity"):
        quality.scores(read, tmp_path / "broken")


def test_figures_refuse_what_cannot_be_compared():
    one = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="names or shapes"):
        figures(one, one, {"b": torch.ones(3)})
    with pytest.raises(ValueError, match="NaN"):
        figures({"a": torch.zeros(3)}, one, {"a": torch.tensor([1.0, float("nan"), 1.0])})
    apart = figures({"a": torch.zeros(4)}, {"a": torch.ones(4)}, {"a": torch.tensor([1.0, 1, 1, 3])})
    assert apart == {"largest": 1.0, "of_movement": 1.0}


@pytest.mark.parametrize(("change", "reason"), [({"examples": 10}, "multiple"), ({"cohort": 3}, "even")])
def test_a_workload_that_not_all_can_do_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Workload(**{"clients": 4, "cohort": 2, "examples": 8, "batch": 4, **change}).check()


def measured(code, timeout=600):
    """Measure a Python program from another process: what measures ends all that is left below itself."""
    script = (
        "import json, os, sys; from dataclasses import asdict; from pathlib import Path; import measure\n"
        "m = measure.run_measured([sys.executable, '-c', sys.argv[1]], os.environ, Path(sys.argv[2]),"
        f" None, {timeout})\n"
        "print(json.dumps(asdict(m)))"
    )
    log = "/dev/null"
    command = [sys.executable, "-c", script, code, log]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestMeasure:
    def test_counts_the_whole_tree_with_detached_daemons(self, tmp_path):
        burn = "import time\nwhile time.process_time() < 0.8: pass\nopen(sys.argv[1], 'w').close()"
        detach = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {'import sys;' + burn!r}, "
        detach += "sys.argv[1]], start_new_session=True)"
        lead = "import os, subprocess, sys, time\nheld = b'x' * 60_000_000\n"
        lead += f"subprocess.run([sys.executable, '-c', {detach!r}, {str(tmp_path / 'done')!r}])\n"
        lead += f"while not os.path.exists({str(tmp_path / 'done')!r}): time.sleep(0.1)"
        got = measured(lead)
        assert got["returncode"] == 0
        assert got["cpu"] >= 0.8, "the daemon's are among them"
        assert got["wall"] >= 0.8
        assert got["peak_pss"] > 60_000_000, "held by the leader"

    def test_what_runs_too_long_or_stays_behind_is_ended(self):
        got = measured("import time; time.sleep(600)", timeout=1)
        assert got["returncode"] is None
        assert got["wall"] < 60


def test_figures_of_a_run():
    marks = {"round_ends": [110.0, 112.0, 113.0, 114.0], "train_seconds": [9.0, 9.0, 1.6, 2.0]}
    got = report.derive(Measurement(0, 100.0, 15.0, 20.0, 7, 1.5), marks, workers=2, cohort=10)
    assert got["clients_per_second"] == 10
    assert got["start_seconds"] == 10
    assert got["overhead"] == pytest.approx(1 * 2 / 1.8)
    assert got["others_cpu_share"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="warm-up"):
        report.derive(
            Measurement(0, 0, 1, 1, 1, 0), {"round_ends": [1.0, 2.0], "train_seconds": [1, 1]}, 1, 1
        )


SPEED = {
    "federa-serial-fp32": 2.0,
    "federa-processes-fp32": 4.0,
    "federa-processes-bf16": 8.0,
    "plain-2x1": 1.0,
}


@pytest.fixture()
def stage(monkeypatch, tmp_path, plan):
    """A comparison whose contenders take no time: its command line, what ran, how far each is apart, who was judged."""
    ran, apart, judged = [], dict.fromkeys(SPEED, 1e-6), []

    def run_measured(command, environment, log, cores, timeout):
        out, rounds = (command[command.index(flag) + 1] for flag in ("--out", "--rounds"))
        folder = Path(out)
        kind = next(kind for kind in ("equality", "timed", "quality") if kind in folder.parts)
        assert ("--dropout" in command) == (kind == "equality")
        name = folder.parent.name if kind == "timed" else folder.name
        ran.append((kind, name))
        marks = Marks(folder)
        marks.rounds = [2 * (i + 1) / SPEED[name] for i in range(int(rounds))]
        marks.train_seconds = [1.0] * int(rounds)
        marks.write({"a": torch.ones(2)})
        return Measurement(0, 0.0, 60.0, 100.0, 10**9, 0.1)

    def helper(self, script, *files):
        if script == "agree.py":
            return {"largest": apart[files[-1].parent.name], "of_movement": 1e-4}
        judged.append(files[-1].parent.name)
        return {"loss": 0.5, "accuracy": 0.75}

    monkeypatch.setattr(compare, "environment", lambda name, cache: (Path(sys.executable), {"torch": "1"}))
    monkeypatch.setattr(compare, "run_measured", run_measured)
    monkeypatch.setattr(compare.Comparison, "_helper", helper)
    monkeypatch.setattr(compare.Comparison, "plan", lambda self: None)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text((plan / "plan.json").read_text())
    arguments = ["--out", str(tmp_path), "--cohort", "2", "--rounds", "4", "--repeats", "3"]
    return [*arguments, "--only", ",".join(SPEED)], ran, apart, judged


def test_turns_are_taken_and_nothing_runs_twice(stage, tmp_path):
    arguments, ran, _, judged = stage
    assert compare.main(arguments) == 0
    order = [name for name in contenders.CONTENDERS if name in SPEED]
    assert ran == [("equality", name) for name in order] + 3 * [("timed", name) for name in order]
    assert not judged
    results = json.loads((tmp_path / "results.json").read_text())
    ratio = {row["kind"]: (row["median"], row["than"]) for row in results["ratios"]}
    assert ratio == {
        "equal arithmetic": (4, "plain-2x1"),
        "own arithmetic": (8, "plain-2x1"),
        "the arithmetic alone": (2, "federa-processes-fp32"),
    }
    ran.clear()
    (tmp_path / "timed" / "plain-2x1" / "1.json").unlink()
    assert compare.main(arguments) == 0
    assert ran == [("timed", "plain-2x1")]


def test_quality_is_told_of_one_run_more(stage, tmp_path):
    arguments, ran, _, judged = stage
    assert compare.main([*arguments, "--quality-rounds", "9", "--repeats", "1"]) == 0
    order = [name for name in contenders.CONTENDERS if name in SPEED]
    assert judged == order and ran[-len(order) :] == [("quality", name) for name in order]
    assert (tmp_path / "results.md").read_text().count("| 0.750, 0.500 after 9 rounds |") == len(order)
    assert compare.main([*arguments, "--quality-rounds", "9", "--repeats", "1"]) == 0
    assert judged == order, "nothing is judged twice"


def test_whose_results_differ_is_neither_timed_nor_compared(stage, tmp_path):
    arguments, ran, apart, _ = stage
    apart["plain-2x1"] = 2e-5
    assert compare.main(arguments) == 1
    assert ("timed", "plain-2x1") not in ran
    assert [row["kind"] for row in json.loads((tmp_path / "results.json").read_text())["ratios"]] == [
        "the arithmetic alone"
    ]
    assert "**not equal**" in (tmp_path / "results.md").read_text()


def test_a_ratio_is_refused_where_equality_was_lost_after_the_runs(stage, tmp_path):
    arguments, *_ = stage
    assert compare.main(arguments) == 0
    file = tmp_path / "equality" / "plain-2x1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "largest": 1.0}))
    assert compare.main(arguments) == 1
    assert "refused: the final tensors of plain-2x1" in (tmp_path / "results.md").read_text()


def test_a_framework_that_cannot_be_installed_is_named(stage, tmp_path, monkeypatch):
    arguments, ran, *_ = stage

    def environment(name, cache):
        if name == "plain":
            raise compare.CannotInstallError("no matching distribution")
        return Path(sys.executable), {}

    monkeypatch.setattr(compare, "environment", environment)
    assert compare.main(arguments) == 0
    assert not [name for _, name in ran if name == "plain-2x1"]
    assert "not run: no matching distribution" in (tmp_path / "results.md").read_text()


def test_other_code_is_warned_of(stage, tmp_path):
    arguments, *_ = stage
    assert compare.main(arguments) == 0
    file = tmp_path / "timed" / "plain-2x1" / "0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": "older"}))
    compare.main(arguments)
    assert "Warning: runs of plain-2x1 were made with other code" in (tmp_path / "results.md").read_text()


def test_an_out_folder_holds_one_workload(stage, monkeypatch):
    arguments, *_ = stage
    monkeypatch.undo()
    comparison = compare.Comparison(compare.parse([*arguments, "--clients", "50"]))
    with pytest.raises(SystemExit, match="another workload"):
        comparison.plan()
    written = json.loads((comparison.out / "plan" / "plan.json").read_text())["workload"]
    for rounds in (1, 3):
        comparison.workload = {**written, "rounds": rounds}
        assert comparison.plan() == comparison.out / "plan", "a longer plan serves"
    comparison.workload = {**written, "rounds": 4}
    with pytest.raises(SystemExit, match="ends with round 3"):
        comparison.plan()
