"""The command line: what it prints and writes, and what it says to mistakes."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from federa import load_config, run
from running import configure, federa, short_reports, tree

FAST = {"client__max_steps": 2, "rounds": 2, "cohort": 2}


@pytest.fixture
def here(recipe, tmp_path, monkeypatch):
    """A folder to work in, with a recipe and its own copies of model and data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recipe["model"]["name"], "model")
    for split in ("train", "test"):
        shutil.copy(recipe["data"][split], f"{split}.csv")
    config = configure(recipe, **FAST, model__name="model", data__train="train.csv", data__test="test.csv")
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    return tmp_path


@pytest.fixture
def done(here, monkeypatch, capsys):
    """The same, with a finished run."""
    short_reports(monkeypatch)
    assert federa("run", "recipe.yaml", "--out", "done", "--quiet") == 0
    capsys.readouterr()
    return here


def refused(capsys, folder, *arguments):
    """Run a command that must be refused; return what it says."""
    before, _ = tree(folder), capsys.readouterr()
    assert federa(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("federa: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert tree(folder) == before, "something was written"
    return err.removeprefix("federa: ").rstrip("\n")


# mistakes


def write(path, text):
    path.write_text(text)
    return path.name


def drop_weights(here):
    (here / "model" / "model.safetensors").unlink()


def strange_label(here):
    with (here / "test.csv").open("a") as file:
        file.write("a strange one,sprt\n")


def few_rows(here):
    lines = (here / "train.csv").read_text().splitlines()
    (here / "train.csv").write_text("\n".join(lines[:5]) + "\n")


MISTAKES = {
    "unknown key": (["cohrt=3"], None, "unknown key 'cohrt' (did you mean 'cohort'?)"),
    "unknown nested key": (["client.learning=3"], None, "unknown key 'client.learning'"),
    "unknown name": (["method.name=fedra"], None, "unknown method 'fedra' (did you mean 'federa'?); known: adapter,"),
    "key of another method": (["method.name=ft", "method.rank=3"], None, "unknown key 'method.rank'"),
    "wrong value": (["rounds=many"], None, "rounds: input should be a valid integer"),
    "missing data": (["data.train=missing.csv"], None, "data.train: missing.csv does not exist"),
    "missing test data": (["data.test=missing.csv"], None, "data.test: missing.csv does not exist"),
    "no data hub": (["data.train=nobody/nothing"], None, "data.train: 'nobody/nothing' is no local file or folder"),
    "wrong format": (["data.train=recipe.yaml"], None, "data.train: {here}/recipe.yaml is not of a known format"),
    "wrong column": (["data.text_column=txt"], None, "data: the train table has no column 'txt' (did you mean 'text'?)"),
    "wrong label column": (["data.label_column=lbl"], None, "data: the train table has no column 'lbl'"),
    "strange label": ([], strange_label, "data: row 90 of the test table: label 'sprt' is outside the training set's labels"),
    "few rows": ([], few_rows, "partition: fewer rows than clients need: 4 rows, 6 clients"),
    "large cohort": (["cohort=7"], None, "cohort: 7 clients a round, but partition.clients is 6"),
    "no weights": ([], drop_weights, "model.name: {here}/model holds no weights"),
    "no model folder": (["model.name=./nowhere"], None, "model.name: the folder ./nowhere does not exist"),
    "no config": (["model.name=/"], None, "model.name: / has no config.json"),
    "no model hub": (["model.name=nobody/nothing"], None, "model.name: cannot load 'nobody/nothing': it is no local"),
    "large rank": (["method.rank=33"], None, "method.rank: 33 is larger than the smaller side of bert.encoder.layer.0"),
    "wrong target": (["method.targets=[quary]"], None, "method.targets: 'quary' fits no linear map"),
    "no column to split by": (["partition.name=natural", "partition.column=who"], None, "partition.column: the table"),
    "many threads": (["engine.threads=9999"], None, "engine: 1 workers x 9999 threads need more than the"),
    "many workers": (["engine.name=processes", "engine.workers=9999"], None, "engine: 9999 workers x 1 threads need"),
    "no plugin": (["plugins=[mine.py]"], None, "plugins: "),
    "no tracker": (["track=[wandbb]"], None, "track: unknown tracker 'wandbb' (did you mean"),
    "no validation": (["data.evaluate_on=validation"], None, "data.evaluate_on=validation: give"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_in_a_recipe(here, capsys, kind):
    overrides, prepare, message = MISTAKES[kind]
    if prepare is not None:
        prepare(here)
    for where in ([], ["--out", "a/b"]):
        said = refused(capsys, here, "run", "recipe.yaml", *overrides, *where)
        assert said.startswith(message.replace("{here}", str(here)))
    said = refused(capsys, here, "run", "recipe.yaml", *overrides, "--dry-run")
    assert said.startswith(message.replace("{here}", str(here)))


def test_mistakes_in_the_command(here, capsys):
    write(here / "bad.yaml", "a: [")
    write(here / "list.yaml", "- a")
    write(here / "words.txt", "a bad file")
    (here / "full").mkdir()
    write(here / "full" / "mine", "mine")
    cases = [
        (["run", "missing.yaml"], "recipe: missing.yaml does not exist"),
        (["run", "bad.yaml"], "recipe: bad.yaml is not YAML"),
        (["run", "list.yaml"], "recipe: list.yaml holds no mapping"),
        (["run", "recipe.yaml", "other.yaml"], "one recipe at a time, got recipe.yaml, other.yaml"),
        (["run", "recipe.yaml", "=3"], "override '=3'"),
        (["run", "recipe.yaml", "--out", "full"], "--out: full is there already"),
        (["run", "recipe.yaml", "--out", "words.txt"], "--out: words.txt is there already"),
        (["run", "--resume"], "--resume: say which run with --out DIR"),
        (["run", "--resume", "--out", "full"], "full is not a run directory (it has no config.yaml)"),
        (["run", "--resume", "--out", "nowhere"], "nowhere is not a run directory"),
        (
            ["run", "--resume", "--dry-run", "--out", "full"],
            "--resume: say which run with --out DIR, without --dry",
        ),
        (["export", "full", "--to", "x"], "full is not a run directory"),
        (
            ["export", "full", "--to", "x", "--format", "onnx"],
            "--format onnx: expected one of peft, merged, federa",
        ),
        (["predict", "full", "words.txt"], "full is not a run directory"),
        (["report", "full"], "full"),
        (["report", "nowhere"], "nowhere"),
        (["init"], "say which data with --train FILE"),
        (["init", "new.yaml", "--train", "missing.csv"], "--train: missing.csv does not exist"),
        (["init", "recipe.yaml", "--train", "train.csv"], "recipe.yaml exists"),
    ]
    for arguments, message in cases:
        assert refused(capsys, here, *arguments).startswith(message), arguments


def test_mistakes_with_a_run(done, capsys):
    cases = [
        (
            ["run", "recipe.yaml", "--out", "done"],
            "--out: done is there already and is not an empty directory; give another, or --resume",
        ),
        (
            ["run", "recipe.yaml", "rounds=9", "--resume", "--out", "done"],
            "--resume: done was started with rounds=2, not 9",
        ),
        (
            ["run", "recipe.yaml", "method.name=lora", "--resume", "--out", "done"],
            "--resume: done was started with method",
        ),
        (["run", "rounds=2", "--resume", "--out", "done"], "--resume: done was started with"),
        (["export", "done", "--to", "model"], "--to model is not empty"),
        (
            ["export", "done", "--to", "x", "--format", "federa"],
            "--format federa: method 'federa' can be exported as",
        ),
    ]
    write(done / "gap.txt", "one\n\nthree\n")
    write(done / "numbers.csv", "text,label\n1,food\n")
    cases += [
        (["predict", "done", "missing.txt"], "missing.txt does not exist"),
        (["predict", "done", "missing.csv"], "predict: missing.csv does not exist"),
        (
            ["predict", "done", "train.csv", "--column", "txt"],
            "data: train.csv has no column 'txt' (did you mean 'text'?); it has text, label",
        ),
        (
            ["predict", "done", "model/model.safetensors"],
            "predict: model/model.safetensors is not of a known format",
        ),
        (["predict", "done", "gap.txt"], "line 2 of gap.txt is blank"),
        (["predict", "done", "numbers.csv"], "example 0: text: expected text, got 1"),
    ]
    for arguments, message in cases:
        assert refused(capsys, done, *arguments).startswith(message), arguments
    (done / "done" / "result.json").unlink()
    weights = load_file(done / "model" / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    weights[name][0, 0] += 1e-3
    save_file(weights, done / "model" / "model.safetensors", metadata={"format": "pt"})
    for arguments in (
        ["run", "--resume", "--out", "done"],
        ["export", "done", "--to", "x"],
        ["predict", "done", "train.csv"],
    ):
        assert "is not the model that the run was started from" in refused(capsys, done, *arguments)
    (done / "done" / "config.yaml").write_text("rounds: [")
    assert refused(capsys, done, "run", "--resume", "--out", "done").startswith(
        "recipe: done/config.yaml is not YAML"
    )


def test_a_run_that_has_no_round_yet_cannot_predict(done, capsys):
    shutil.rmtree(done / "done" / "checkpoint")
    for arguments in (["predict", "done", "train.csv"], ["export", "done", "--to", "x"]):
        assert refused(capsys, done, *arguments).startswith("done has no finished round yet; run it on with")


def test_a_resume_with_other_data_is_refused(done, capsys):
    (done / "done" / "result.json").unlink()
    text = (done / "test.csv").read_text()
    (done / "test.csv").write_text(text.replace("goal", "cheese"))
    assert refused(capsys, done, "run", "--resume", "--out", "done").startswith(
        "--resume: the data are not those"
    )
    (done / "test.csv").write_text(text)
    assert federa("run", "--resume", "--out", "done", "--quiet") == 0


def test_a_damaged_checkpoint_is_said_to_be_one(done, capsys):
    (done / "done" / "result.json").unlink()
    state = done / "done" / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    assert "is not a whole safetensors file" in refused(capsys, done, "run", "--resume", "--out", "done")


@pytest.mark.slow
def test_mistakes_through_real_processes(here):
    """Side by side: what matters is that nothing else is printed, by whatever is imported."""
    before = tree(here)
    environment = {**os.environ, "COLUMNS": "40"}
    cases = [
        (["run", "recipe.yaml", "cohrt=3"], b"federa: unknown key 'cohrt' (did you mean 'cohort'?)"),
        (
            ["run", "recipe.yaml", "model.name=./nowhere"],
            b"federa: model.name: the folder ./nowhere does not exist",
        ),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "federa.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for arguments, _ in cases
    ]
    for process, (_, message) in zip(started, cases, strict=True):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 2 and out == b""
        assert err.startswith(message) and err.count(b"\n") == 1
    assert tree(here) == before


# what is printed


def test_run_prints_one_line_a_round_and_the_result(here, capfd, monkeypatch):
    short_reports(monkeypatch)
    assert federa("run", "recipe.yaml", "method.name=lora") == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("lora on model, 240 examples, 6 clients (dirichlet), 2 a round;")
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    assert all(" loss " in line and " accuracy " in line and " kB " in line for line in rounds)
    assert lines[-1].startswith("run directory: runs/lora-train-seed3 ")
    assert federa("run", "recipe.yaml", "method.name=lora", "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert sorted(os.listdir("runs")) == ["lora-train-seed3", "lora-train-seed3-2"]


def test_json_lines_parse_and_are_the_records(here, capfd, monkeypatch):
    short_reports(monkeypatch)
    assert federa("run", "recipe.yaml", "--out", "x", "--json") == 0
    out, err = capfd.readouterr()
    *records, last = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert records == [json.loads(line) for line in Path("x/metrics.jsonl").read_text().splitlines()]
    assert last == {"result": json.loads(Path("x/result.json").read_text()), "folder": "x"}


def test_dry_run_writes_nothing_and_says_what_would_be(here, capfd):
    before = tree(here)
    assert federa("run", "recipe.yaml", "rounds=7", "--dry-run", "--out", "x") == 0
    out, err = capfd.readouterr()
    assert err == "" and tree(here) == before
    assert "rounds: 7" in out and "name: dirichlet" in out
    assert "trained parameters: 2,179 of" in out
    assert "bytes expected: 34.9 kB a round, 244.0 kB in all" in out  # 2 clients x 2 ways x 2,179 x 4 bytes
    assert "time expected:" in out and "nothing was written" in out

    assert federa("run", "recipe.yaml", "rounds=7", "--dry-run", "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert tree(here) == before
    assert plan["config"]["rounds"] == 7 and sum(plan["partition"]["client_sizes"]) == 240
    assert plan["expected"]["bytes"] == 7 * 2 * 2 * 2179 * 4 and plan["expected"]["seconds"] > 0


@pytest.mark.parametrize("words", [["--dry-run"], ["--out", "x"], ["--out", "x", "--json"]])
def test_evaluating_on_the_training_rows_is_said(here, capfd, words):
    assert federa("run", "recipe.yaml", "data.test=train.csv", *words) == 0
    assert " ".join(capfd.readouterr().err.split()) == (
        "warning: 240 of 240 evaluation examples read to the model like training examples: "
        "scores flatter; give another data.test, or take repeats out"
    )
    if "x" in words:
        assert json.loads(Path("x/partition.json").read_text())["evaluation_examples_trained_on"] == 240


def test_list_names_every_component_with_its_keys(capsys):
    from federa.config import REGISTRIES

    assert federa("list") == 0
    out = capsys.readouterr().out
    for kind, registry in REGISTRIES.items():
        assert f"\n{kind}:\n" in f"\n{out}"
        for name in registry.names():
            if not registry.get(name).__module__.startswith("federa."):
                continue  # another test's
            line = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
            assert len(line.split(maxsplit=1)[1]) > 10, f"{name} has no description"
    assert "rank=32" in out and "trim=0.1" in out and "alpha=0.5" in out


def test_help_needs_no_terminal(capsys):
    assert federa("--help") == 0
    out = capsys.readouterr().out
    for command in ("run", "compare", "report", "export", "predict", "init", "list"):
        assert command in out
    assert federa("run", "--nonsense") == 2


# a finished run


def test_resume_of_a_finished_run_changes_nothing(done, capsys):
    before = tree(done)
    for arguments in (
        ["--resume"],
        ["recipe.yaml", "--resume"],
        ["--resume", "--json"],
        ["--resume", "--quiet"],
    ):
        assert federa("run", *arguments, "--out", "done") == 0
    assert tree(done) == before


def test_overrides_on_the_command_line_are_kept_in_the_run(done, capsys):
    assert federa("run", "recipe.yaml", "method.name=bitfit", "client.lr=1e-3", "--out", "b", "--quiet") == 0
    config = load_config(done / "b" / "config.yaml")
    assert config.method.model_dump() == {"name": "bitfit", "head": "train"} and config.client.lr == 1e-3
    again = run(config)
    assert again.records[-1]["accuracy"] == json.loads(Path("b/result.json").read_text())["final"]


def test_predict_from_a_table_a_file_and_standard_input(done, capsys, monkeypatch):
    assert federa("predict", "done", "test.csv") == 0
    from_table = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [row["text"] for row in from_table]
    assert len(texts) == 90 and texts[0] == Path("test.csv").read_text().splitlines()[1].rsplit(",", 1)[0]
    right = [line.rsplit(",", 1)[1] for line in Path("test.csv").read_text().splitlines()[1:]]
    accuracy = sum(row["label"] == label for row, label in zip(from_table, right, strict=True)) / 90
    assert accuracy == pytest.approx(json.loads(Path("done/result.json").read_text())["final"])
    assert all(0 < row["probability"] <= 1 for row in from_table)

    (done / "texts.txt").write_text("\n".join(texts[:3]) + "\n\n\n")
    assert federa("predict", "done", "texts.txt") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts[:3]

    monkeypatch.setattr(sys, "stdin", io.StringIO("käse und brot\n"))
    assert federa("predict", "done") == 0
    out = capsys.readouterr().out
    assert "käse" in out and json.loads(out)["label"] in ("food", "sport", "tech")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert federa("predict", "done") == 0
    assert capsys.readouterr().out == ""


def test_export_and_report(done, capsys):
    assert federa("export", "done", "--to", "peft") == 0
    assert capsys.readouterr().out == "peft\n" and (done / "peft" / "adapter_config.json").is_file()
    (done / "done" / "report.html").unlink()
    assert federa("report", "done") == 0
    page = (done / "done" / "report.html").read_text()
    assert capsys.readouterr().out == "done/report.html\n" and "accuracy" in page
    assert federa("report", "done", "--to", "pages/one.html") == 0
    assert (done / "pages" / "one.html").is_file()


def test_init_writes_a_recipe_that_runs(here, capsys, monkeypatch):
    short_reports(monkeypatch)
    arguments = ["--train", "train.csv", "--test", "test.csv", "--model", "model", "--clients", 4]
    assert federa("init", "new/mine.yaml", *arguments) == 0
    assert "federa run new/mine.yaml --dry-run" in capsys.readouterr().out
    config = load_config(here / "new" / "mine.yaml")
    assert (config.partition.clients, config.cohort, config.method.name) == (4, 4, "federa")
    assert yaml.safe_load((here / "new" / "mine.yaml").read_text())["data"]["train"] == str(
        here / "train.csv"
    )
    monkeypatch.chdir(here / "new")  # from anywhere
    overrides = [
        "method.rank=4",
        "rounds=1",
        "engine.workers=1",
        "client.precision=fp32",
        "client.max_steps=1",
    ]
    assert federa("run", "mine.yaml", *overrides, "--out", "out", "--json") == 0
    *_, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert last["result"]["rounds"] == 1


def test_ctrl_c_says_how_to_go_on(here, capsys, monkeypatch):
    from federa.experiment import Experiment

    def interrupted(self, params, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "train_client", interrupted)
    assert federa("run", "recipe.yaml", "--out", "x", "--quiet") == 130
    err = capsys.readouterr().err
    assert err == "federa: interrupted; go on with: federa run --resume --out x\n"
    assert (here / "x" / "config.yaml").is_file()
    assert torch.get_num_threads() == 1
