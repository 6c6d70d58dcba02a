"""What partitions skew on: names to numbers, columns, and clusters that anyone finds again."""

import datasets
import numpy as np
import pytest
import torch

from federa.config import parse_config
from federa.data.datasets import read_splits
from federa.data.groups import MAX_TOKENS, UNKNOWN, clustered, column_values, embeddings, numbered
from federa.experiment import build_experiment, group_examples
from federa.models import ModelConfig, load_pretrained
from federa.types import FederaError
from running import build
from small import TASKS, sentences, write_task

# By name


def test_names_are_sorted_and_unknown_ones_have_no_number():
    found = numbered(["b", "a", "b"], ["a", "c", "b"])
    assert found.names == ["a", "b"]
    assert found.train.tolist() == [1, 0, 1]
    assert found.evaluation.tolist() == [0, UNKNOWN, 1]
    assert found.train.dtype == found.evaluation.dtype == np.int64


def test_some_names_come_first_in_their_own_order():
    found = numbered(["x", "b", "a"], [], first=["b", "z", "a"])
    assert found.names == ["b", "z", "a", "x"], "whether they occur or not"
    assert found.train.tolist() == [3, 0, 2]
    assert found.evaluation.tolist() == []


def test_a_columns_values_are_words():
    table = datasets.Dataset.from_dict({"author": [3, None, 3], "text": list("xyz")})
    assert column_values(table, "author", "task.group_by") == ["3", "None", "3"]
    with pytest.raises(
        FederaError, match=r"^task\.group_by: the table has no column 'writer'; it has author, text$"
    ):
        column_values(table, "writer", "task.group_by")


# By clusters


def blobs(rng, sizes, width=8):
    """Return points round far corners, and the corner of each."""
    corner = np.repeat(np.arange(len(sizes)), sizes)
    points = 10 * np.eye(len(sizes), width)[corner] + rng.normal(scale=0.1, size=(len(corner), width))
    return points.astype(np.float32), corner


def test_clusters_are_found_and_evaluation_joins_the_nearest():
    rng = np.random.default_rng(0)
    train, corner = blobs(rng, [30, 5, 12])
    test, test_corner = blobs(rng, [2, 2, 2])
    found = clustered(train, test, 3, seed=1)
    assert found.names == ["cluster 0", "cluster 1", "cluster 2"]
    name_of = {corner[i]: found.train[i] for i in range(len(corner))}
    assert sorted(name_of.values()) == [0, 1, 2]
    assert found.train.tolist() == [name_of[c] for c in corner]
    assert found.evaluation.tolist() == [name_of[c] for c in test_corner]
    assert clustered(train, test[:0], 3, seed=1).evaluation.tolist() == []


def test_clusters_belong_to_the_seed():
    train = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    first, again, other = (clustered(train, train, 12, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.train, again.train) and np.array_equal(first.train, first.evaluation)
    assert not np.array_equal(first.train, other.train)
    assert first.names[0] == "cluster 00" and first.names[-1] == "cluster 11"


def test_no_more_clusters_than_examples():
    points, _ = blobs(np.random.default_rng(0), [3, 2])
    assert set(clustered(points, points, 5, seed=0).train) == set(range(5))
    with pytest.raises(FederaError, match=r"^task\.clusters: 6 clusters of 5 training examples$"):
        clustered(points, points, 6, seed=0)


# Embeddings


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def encoder_and_tokenizer(request, encoder):
    loaded = load_pretrained(
        ModelConfig(name=str(encoder(request.param))),
        "AutoModelForSequenceClassification",
        ["a", "b"],
        seed=0,
    )
    return loaded.model, loaded.tokenizer


TEXTS = ["goal team cup", "soup", "the the the the the the phone", "", "data code app chip screen", "win"]


def test_an_embedding_is_the_mean_of_the_hidden_states(encoder_and_tokenizer):
    model, tokenizer = encoder_and_tokenizer
    model.train()
    found = embeddings(model, tokenizer, TEXTS, batch_size=4)
    assert model.training and model.base_model.training, "left as it was"
    assert found.shape == (6, 32) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    model.eval()
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model.base_model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)
    np.testing.assert_allclose(embeddings(model, tokenizer, TEXTS, batch_size=1), found, atol=1e-6)


def test_embeddings_do_not_depend_on_the_number_of_threads(encoder_and_tokenizer):
    model, tokenizer = encoder_and_tokenizer
    texts = [sentence["text"] for sentence in sentences(200)]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(embeddings(model, tokenizer, texts))
        assert torch.get_num_threads() == threads, "as it was before"
    assert np.array_equal(*found)


def test_long_texts_are_cut(encoder_and_tokenizer, monkeypatch):
    """At 64 tokens, two of them special, though the model takes more."""
    model, tokenizer = encoder_and_tokenizer
    monkeypatch.setattr(tokenizer, "model_max_length", 79)
    words = ["goal"] * (MAX_TOKENS - 2)
    texts = [" ".join(some) for some in (words, [*words, "soup"], [*words[1:], "soup"])]
    whole, longer, other = embeddings(model, tokenizer, texts)
    np.testing.assert_allclose(whole, longer, atol=1e-6)
    assert np.abs(whole - other).max() > 1e-4, "the last word that is not cut counts"


# In a recipe


def with_column(folder, csv, name):
    """Write a table again with another column: the first letter of its text."""
    lines = csv.read_text().splitlines()
    path = folder / name
    path.write_text("\n".join([f"{lines[0]},first", *(f"{line},{line[0]}" for line in lines[1:])]) + "\n")
    return str(path)


def test_labels_are_the_groups_unless_said_otherwise(recipe):
    experiment = build(recipe)
    assert experiment.groups.names == ["food", "sport", "tech"]
    assert np.array_equal(experiment.groups.train, experiment.train.targets["labels"])
    assert np.array_equal(experiment.groups.evaluation, experiment.evaluation.targets["labels"])


def test_a_column_is_the_group(recipe, tmp_path, train_csv, test_csv):
    recipe["data"] = {
        name: with_column(tmp_path, path, f"{name}.csv")
        for name, path in (("train", train_csv), ("test", test_csv))
    }
    experiment = build(recipe, task__group_by="first")
    letters = [line[0] for line in train_csv.read_text().splitlines()[1:]]
    assert experiment.groups.names == sorted(set(letters))
    assert [experiment.groups.names[g] for g in experiment.groups.train] == letters
    assert experiment.counts.sum(axis=0).tolist() == [letters.count(name) for name in experiment.groups.names]
    with pytest.raises(
        FederaError, match=r"^task\.group_by: the table has no column 'author'; it has text, label, first$"
    ):
        build(recipe, task__group_by="author")


def test_a_column_that_the_test_set_lacks_is_unknown_there(recipe, tmp_path, train_csv):
    recipe["data"]["train"] = with_column(tmp_path, train_csv, "train.csv")
    found = build(recipe, task__group_by="first").groups
    assert set(found.evaluation) == {UNKNOWN} and len(found.evaluation) == 90


def test_clusters_of_the_texts_are_the_groups(recipe):
    experiment = build(recipe, task__group_by="clusters", task__clusters=4)
    found = experiment.groups
    assert found.names == [f"cluster {i}" for i in range(4)]
    assert set(found.train) == set(range(4)) and len(found.train) == 240 and len(found.evaluation) == 90
    again = build(recipe, task__group_by="clusters", task__clusters=4, method__rank=2)
    assert np.array_equal(again.groups.train, found.train), "of the pretrained encoder, whatever is trained"
    with pytest.raises(FederaError, match=r"^task\.clusters: 241 clusters of 240 training examples$"):
        build(recipe, task__group_by="clusters", task__clusters=241)


def write_questions(path, count):
    rows = [
        {
            "question": "goal team" if i % 2 else "soup salt",
            "context": f"the cup {'league' if i % 2 else 'bread'} of {i}",
            "answers": {"text": ["cup"], "answer_start": [4]},
        }
        for i in range(count)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def write_sentences(path, tags):
    datasets.Dataset.from_dict({"tokens": [["goal"] * len(one) for one in tags], "tags": tags}).to_parquet(
        str(path)
    )
    return str(path)


def groups_of(recipe):
    """Return the groups of a recipe without tokenising it."""
    config = parse_config(recipe)
    splits = read_splits(config.data, config.task)
    labels = config.task.labels(splits.train, config.data)
    loaded = load_pretrained(config.model, config.task.auto_class, labels, seed=0)
    return group_examples(config, splits, loaded, labels)


def test_questions_are_clustered(recipe, tmp_path):
    recipe["data"] = {
        "train": write_questions(tmp_path / "train.parquet", 40),
        "test": write_questions(tmp_path / "test.parquet", 6),
    }
    recipe["task"] = {"name": "qa", "max_length": 32, "overlap": 4, "clusters": 2}
    found = groups_of(recipe)
    assert found.names == ["cluster 0", "cluster 1"]
    assert len(set(found.train[::2])) == len(set(found.train[1::2])) == 1, "two kinds of question"
    assert found.evaluation.tolist() == found.train[:6].tolist()


def test_sentences_go_by_the_types_that_they_have(recipe, tmp_path):
    tags = [["B-PER", "O"], ["O"], ["B-LOC", "B-PER"], ["B-PER", "I-PER"]]
    recipe["data"] = {
        "train": write_sentences(tmp_path / "train.parquet", tags),
        "test": write_sentences(tmp_path / "test.parquet", [["B-LOC"], ["O", "O"], ["B-PER", "B-LOC"]]),
    }
    recipe["task"] = {"name": "ner", "max_length": 32, "overlap": 4}
    found = groups_of(recipe)
    assert found.names == ["LOC-PER", "PER", "none"]
    assert found.train.tolist() == [1, 2, 0, 1]
    assert found.evaluation.tolist() == [UNKNOWN, 2, 0]


def test_windows_of_an_example_stay_with_one_client(recipe, tmp_path):
    rng = np.random.default_rng(0)
    tags = [["B-PER", *["O"] * int(rng.integers(0, 40))] for _ in range(60)]
    recipe["data"] = {name: write_sentences(tmp_path / f"{name}.parquet", tags) for name in ("train", "test")}
    recipe["task"] = {"name": "ner", "max_length": 12, "overlap": 4}
    experiment = build_experiment(parse_config(recipe))
    train = experiment.train
    assert len(train) > train.num_examples == 60
    assert sorted(np.concatenate(experiment.parts)) == list(range(len(train)))
    held = [set(train.example[part]) for part in experiment.parts]
    assert sum(map(len, held)) == 60, "no example is part of two clients"
    assert experiment.counts.sum(axis=1).tolist() == [len(one) for one in held]


# Whatever the task


@pytest.mark.parametrize(
    "partition",
    [
        {"name": "iid", "clients": 3},
        {"name": "dirichlet", "clients": 3, "alpha": 0.5},
        {"name": "fednlp", "clients": 3, "alpha": 1.0},
        {"name": "quantity", "clients": 3},
        {"name": "pathological", "clients": 3, "classes_per_client": 2},
        {"name": "natural"},
    ],
    ids=lambda partition: partition["name"],
)
@pytest.mark.parametrize(("task", "column"), [("ner", "domain"), ("qa", "title")])
def test_every_partitioner_takes_what_a_task_without_labels_offers(
    task, column, partition, encoder, tmp_path
):
    """Entity types of a sentence, articles of questions; and a column is a client where that is asked for."""
    folder = write_task(tmp_path / "data", task)
    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    natural = partition["name"] == "natural"
    experiment = build_experiment(
        parse_config(
            {
                "cohort": 1,
                "model": {"name": str(encoder("bert"))},
                "data": {"train": str(folder)},
                "task": TASKS[task],
                "partition": partition | ({"column": column} if natural else {}),
            }
        )
    )
    example = experiment.train.example
    held = [{int(example[row]) for row in part} for part in experiment.parts]
    assert sorted(row for part in experiment.parts for row in part) == list(range(len(example)))
    assert sorted(one for part in held for one in part) == list(range(24)), "whole, whatever its windows"
    if natural:
        values = [{table[one][column] for one in part} for part in held]
        assert [len(own) for own in values] == [1] * len(set(table[column]))
        assert set().union(*values) == set(table[column])
        return
    assert len(held) == 3
    if partition["name"] == "pathological":
        assert all(len({int(experiment.groups.train[one]) for one in part}) <= 2 for part in held)
