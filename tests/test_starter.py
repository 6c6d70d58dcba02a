"""`federa init`: a recipe that parses, whatever the data is called."""

import csv
import json

import pytest
import yaml

from federa import FederaError, load_config
from federa.starter import write_recipe


def table(path, columns, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[f"{column} {i}" for column in columns] for i in range(rows)])
    return str(path)


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (["text", "label"], "text", "label"),
        (["id", "category", "review"], "review", "category"),
        (["label", "text", "topic"], "text", "label"),
        (["sentence", "target"], "sentence", "target"),
    ],
)
def test_columns_are_found_by_their_names(tmp_path, columns, text, label):
    to = write_recipe(tmp_path / "r.yaml", train=table(tmp_path / "d.csv", columns))
    config = load_config(to)
    assert (config.data.text_column, config.data.label_column) == (text, label)
    assert config.data.train == str(tmp_path / "d.csv") and config.data.test is None
    assert (config.method.name, config.partition.name, config.engine.name) == (
        "federa",
        "dirichlet",
        "processes",
    )
    assert (config.partition.clients, config.cohort, config.rounds) == (20, 5, 20)
    assert to.read_text().count("#") > 15, "a recipe to learn from has comments"


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        ({"words": ["a"], "ner_tags": ["O"]}, "ner", {"tokens_column": "words", "tags_column": "ner_tags"}),
        ({"tokens": ["a"], "tags": ["O"], "text": "a", "label": "b"}, "ner", {"tokens_column": "tokens"}),
        (
            {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}},
            "qa",
            {"question_column": "question", "context_column": "context", "answers_column": "answers"},
        ),
        ({"text": "a", "label": "b", "question": "q"}, "classification", {"text_column": "text"}),
    ],
)
def test_the_columns_say_what_task_it_is(tmp_path, rows, task, columns):
    (tmp_path / "d.jsonl").write_text(json.dumps(rows) + "\n")
    config = load_config(write_recipe(tmp_path / "r.yaml", train=str(tmp_path / "d.jsonl")))
    assert config.task.name == task
    assert columns.items() <= config.data.model_dump().items()


def test_a_column_that_is_given_says_that_it_is_classification(tmp_path):
    row = {"tokens": ["a"], "tags": ["O"], "text": "a", "kind": "b"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    config = load_config(
        write_recipe(tmp_path / "r.yaml", train=str(tmp_path / "d.jsonl"), label_column="kind")
    )
    assert (config.task.name, config.data.label_column) == ("classification", "kind")


@pytest.mark.parametrize(
    "odd", ["a: b", "yes", "1", "x #y", "it's", '"quoted"', "null", "- x", "ü", "{a}", "%s"]
)
def test_odd_names_survive(tmp_path, odd):
    train = table(tmp_path / odd / "train.csv", [odd, "second"])
    test = table(tmp_path / odd / "test.csv", [odd, "second"])
    to = write_recipe(
        tmp_path / "r.yaml",
        train=train,
        test=test,
        text_column=odd,
        label_column="second",
        model="org/name",
        clients=3,
    )
    config = load_config(to)
    assert (config.data.train, config.data.test, config.data.text_column) == (train, test, odd)
    assert (config.model.name, config.partition.clients, config.cohort) == ("org/name", 3, 3)


def test_paths_are_absolute_so_that_the_recipe_runs_from_anywhere(tmp_path, monkeypatch):
    table(tmp_path / "d.csv", ["text", "label"])
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(write_recipe(tmp_path / "r.yaml", train="d.csv", model="encoder").read_text())
    assert raw["data"]["train"] == str(tmp_path / "d.csv") and raw["model"]["name"] == str(
        tmp_path / "encoder"
    )


def test_refusals(tmp_path):
    good = table(tmp_path / "d.csv", ["text", "label"])
    odd = table(tmp_path / "odd.csv", ["a", "b"])
    half = table(tmp_path / "half.csv", ["text", "b"])
    cases = [
        ({"train": str(tmp_path / "missing.csv")}, "--train: "),
        ({"train": good, "test": str(tmp_path / "missing.csv")}, "--test: "),
        ({"train": odd}, f"cannot tell which column of {odd} is which; give --text-column (a, b)"),
        ({"train": half}, f"cannot tell which column of {half} is which; give --label-column (text, b)"),
        (
            {"train": good, "text_column": "txt"},
            f"{good} has no column 'txt' (did you mean 'text'?); it has text, label",
        ),
        ({"train": good, "clients": 0}, "--clients 0: at least one is needed"),
    ]
    for arguments, message in cases:
        with pytest.raises(FederaError) as raised:
            write_recipe(tmp_path / "r.yaml", **arguments)
        assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
        assert not (tmp_path / "r.yaml").exists()
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(FederaError, match="exists; give another name"):
        write_recipe(tmp_path / "r.yaml", train=good)
    assert (tmp_path / "r.yaml").read_text() == "mine"
