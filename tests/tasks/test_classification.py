"""Classification: texts to tokens, labels to ids, scores by hand."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score

from federa.data.batches import Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.tasks import TASKS, Classification
from federa.tasks.classification import macro_f1
from federa.types import FederaError

TASK = Classification(max_length=8)
DATA = DataConfig()


def table(**columns):
    return datasets.Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return transformers.AutoTokenizer.from_pretrained(encoder("bert"))


# Labels


def test_labels_are_the_sorted_values():
    assert TASK.labels(table(text=list("wxyz"), label=["b", "a", "c", "a"]), DATA) == ["a", "b", "c"]


def test_number_labels_are_sorted_as_numbers():
    assert TASK.labels(table(text=list("wxyz"), label=[10, 9, 2, 10]), DATA) == ["2", "9", "10"]
    assert TASK.labels(table(text=list("wx"), label=[True, False]), DATA) == ["False", "True"]


def test_class_labels_keep_their_names_and_order():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [2, 0]}, features=features)
    assert TASK.labels(rows, DATA) == ["z", "a", "m"]


@pytest.mark.parametrize("values", [["a", None, "b"], [1, None, 2], [None, None, None]])
def test_an_empty_label_is_refused(values):
    with pytest.raises(FederaError, match=r"^data\.label_column: 'label' has empty cells$"):
        TASK.labels(table(text=list("xyz"), label=values), DATA)


def test_one_label_is_not_enough():
    with pytest.raises(FederaError, match="'label' has one value only; two are needed"):
        TASK.labels(table(text=list("xyz"), label=["a"] * 3), DATA)


def test_encode_numbers_the_labels(tokenizer):
    names = ["food", "sport", "tech"]
    encoded = TASK.encode(
        table(text=["goal", "soup", "goal"], label=["sport", "food", "sport"]), DATA, tokenizer, names
    )
    assert encoded.labels.tolist() == [1, 0, 1] and encoded.labels.dtype == np.int64
    assert TASK.groups(encoded).tolist() == [1, 0, 1]
    assert TASK.group_names(names) == names
    numbers = TASK.encode(table(text=["goal", "soup"], label=[10, 9]), DATA, tokenizer, ["2", "9", "10"])
    assert numbers.labels.tolist() == [2, 1]


def test_encode_takes_the_ids_of_class_labels(tokenizer):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["goal", "soup"], "label": [1, 0]}, features=features)
    assert TASK.encode(rows, DATA, tokenizer, ["z", "a"]).labels.tolist() == [1, 0]
    unlabelled = datasets.Dataset.from_dict({"text": ["goal", "soup"], "label": [-1, 0]}, features=features)
    with pytest.raises(FederaError, match="label '-1' is outside"):
        TASK.encode(unlabelled, DATA, tokenizer, ["z", "a"])


def test_a_label_outside_the_training_set_is_refused(tokenizer):
    rows = table(text=["goal", "soup"], label=["sport", "foods"])
    message = (
        r"label 'foods' is outside the training set's labels \(did you mean 'food'\?\): food, sport, tech$"
    )
    with pytest.raises(FederaError, match=message):
        TASK.encode(rows, DATA, tokenizer, ["food", "sport", "tech"])
    many = [f"label{i}" for i in range(12)]
    with pytest.raises(FederaError, match=r"label6, label7, \.\.\.$"):
        TASK.encode(rows, DATA, tokenizer, many)


# Texts


def test_encode_tokenises_and_cuts(tokenizer):
    rows = table(text=["goal", "match goal team player win cup league coach"], label=["a", "b"])
    encoded = TASK.encode(rows, DATA, tokenizer, ["a", "b"])
    ids = tokenizer.get_vocab()
    assert encoded.lengths().tolist() == [3, 8]
    first, second = (encoded.features["input_ids"].padded(np.array([i]), 0)[0].tolist() for i in (0, 1))
    assert first == [ids["[CLS]"], ids["goal"], ids["[SEP]"]]
    words = ["match", "goal", "team", "player", "win", "cup"]
    assert second == [ids["[CLS]"], *(ids[w] for w in words), ids["[SEP]"]]
    assert encoded.pad["input_ids"] == tokenizer.pad_token_id


def test_no_more_tokens_than_the_tokenizer_allows(tokenizer):
    rows = table(text=["goal " * 100] * 2, label=["a", "b"])
    encoded = Classification(max_length=4096).encode(rows, DATA, tokenizer, ["a", "b"])
    assert encoded.lengths().tolist() == [64, 64]


def test_other_columns(tokenizer):
    data = DataConfig(text_column="body", label_column="topic")
    rows = table(body=["goal", "soup"], topic=["b", "a"], text=["match"] * 2, label=["z", "z"])
    assert TASK.labels(rows, data) == ["a", "b"]
    encoded = TASK.encode(rows, data, tokenizer, ["a", "b"])
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.features["input_ids"].values[1] == tokenizer.get_vocab()["goal"]


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (3, "3")])
def test_an_example_without_text_is_refused(tokenizer, value, shown):
    rows = datasets.Dataset.from_list(
        [{"text": v, "label": "a"} for v in ([value] if value == 3 else ["goal", value])]
    )
    with pytest.raises(
        FederaError, match=rf"^data: row {len(rows) - 1} of column 'text' is {shown}, not a text$"
    ):
        TASK.encode(rows, DATA, tokenizer, ["a"])


def test_sentence_pairs(encoder, tmp_path):
    """Both texts go in, told apart by token types where the model has them."""
    fast = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    data = DataConfig(text_pair_column="other")
    rows = table(text=["goal", "match goal"], other=["soup cook", "bread"], label=["a", "b"])
    encoded = TASK.encode(rows, data, fast, ["a", "b"])
    ids = fast.get_vocab()
    cls, sep = ids["[CLS]"], ids["[SEP]"]
    inputs = encoded.batch(np.array([0, 1]), torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [
        [cls, ids["goal"], sep, ids["soup"], ids["cook"], sep],
        [cls, ids["match"], ids["goal"], sep, ids["bread"], sep],
    ]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    lone = table(text=["goal", "goal"], other=["soup", None], label=["a", "b"])
    with pytest.raises(FederaError, match="row 1 of column 'other' is None"):
        TASK.encode(lone, data, fast, ["a", "b"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder("bert"))
    swapped = TASK.encode(
        table(text=rows["other"], other=rows["text"], label=["a", "b"]), data, fast, ["a", "b"]
    )
    first = TASK.outputs(model.eval()(**inputs))
    second = TASK.outputs(model(**swapped.batch(np.array([0, 1]), torch.device("cpu"))))
    assert not torch.allclose(first, second)


# Scores


def score(predicted, truth, classes, rows=None):
    """Score logits whose largest entry is the prediction."""
    outputs = [np.eye(classes, dtype=np.float32)[p] * 2 - 1 for p in predicted]
    labels = np.array(truth)
    data = Encoded({"input_ids": Ragged.from_rows([[1]] * len(truth))}, labels, {"input_ids": 0})
    return TASK.score(outputs, data, np.arange(len(truth)) if rows is None else np.array(rows))


def test_scores_by_hand():
    # truth 0: 2 of 3 right; truth 1: 1 of 2; truth 2: 1 of 1. Predicted 0 twice, 1 twice, 2 twice.
    found = score([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2], 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert set(found) == {"accuracy", "macro_f1"}
    assert TASK.primary in found


def test_macro_f1_is_over_the_labels_that_occur():
    assert score([0, 0], [0, 0], 5) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert score([1, 1], [0, 0], 5) == {"accuracy": 0.0, "macro_f1": 0.0}


def test_scores_are_sklearns():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    found = score(predicted, truth, 4)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))


def test_the_rows_say_whose_outputs_they_are():
    """Outputs come in the order of the rows, which are some of the data set's, in any order."""
    assert score([2, 0], [0, 1, 2, 2], 3, rows=[3, 0])["accuracy"] == 1.0
    assert score([0, 2], [0, 1, 2, 2], 3, rows=[3, 0])["accuracy"] == 0.0


def test_registered():
    assert TASKS.parse("classification") == Classification()
    with pytest.raises(FederaError, match=r"task\.max_length"):
        TASKS.parse({"name": "classification", "max_length": 3})
    assert getattr(transformers, Classification.auto_class)


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_is_that_of_scikit_learn(seed):
    """Labels that nobody has or nobody guesses among them, and single rows."""
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 1 + seed % 7, 1 + seed), rng.integers(0, 9, 1 + seed)
    expected = f1_score(truth, guess, average="macro", zero_division=0)
    assert macro_f1(truth, guess) == pytest.approx(expected, abs=1e-12)
