"""Classification: texts to tokens, labels to ids, scores by hand."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score

from federa.data.batches import IGNORED_LABEL, Encoded, Ragged
from federa.data.datasets import DataConfig
from federa.models import ModelConfig, add_tokens, load_pretrained
from federa.tasks import TASKS, Classification
from federa.tasks.classification import macro_f1, relation, require_relations, semeval_f1
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
    row = values.index(None)
    with pytest.raises(FederaError, match=rf"^data: row {row}: column 'label' is empty$"):
        TASK.labels(table(text=list("xyz"), label=values), DATA)


def test_a_client_without_a_relation_has_no_official_score(tokenizer):
    """It would be zero, however good the model is."""
    rows = table(text=list("abc"), label=["Other", "Cause-Effect(e1,e2)", "Other"])
    for metric, expected in (("semeval_f1", [False, True, True]), ("accuracy", [True, True, True])):
        task = Classification(official="semeval2010_task8", metric=metric)
        encoded = task.encode(rows, DATA, tokenizer, ["Cause-Effect(e1,e2)", "Other"])
        some = ([0, 2], [1], [0, 1])
        assert [task.scorable(encoded, np.array(examples)) for examples in some] == expected
        assert not task.scorable(encoded, np.array([], dtype=np.int64))


def test_one_label_is_not_enough():
    with pytest.raises(FederaError, match="'label' has one value only; two are needed"):
        TASK.labels(table(text=list("xyz"), label=["a"] * 3), DATA)


def test_encode_numbers_the_labels(tokenizer):
    names = ["food", "sport", "tech"]
    encoded = TASK.encode(
        table(text=["goal", "soup", "goal"], label=["sport", "food", "sport"]), DATA, tokenizer, names
    )
    assert encoded.targets["labels"].tolist() == [1, 0, 1] and encoded.targets["labels"].dtype == np.int64
    assert encoded.reference == names and encoded.pad["labels"] == IGNORED_LABEL
    numbers = TASK.encode(table(text=["goal", "soup"], label=[10, 9]), DATA, tokenizer, ["2", "9", "10"])
    assert numbers.targets["labels"].tolist() == [2, 1]


def test_encode_takes_the_ids_of_class_labels(tokenizer):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["goal", "soup"], "label": [1, 0]}, features=features)
    assert TASK.encode(rows, DATA, tokenizer, ["z", "a"]).targets["labels"].tolist() == [1, 0]
    unlabelled = datasets.Dataset.from_dict({"text": ["goal", "soup"], "label": [-1, 0]}, features=features)
    with pytest.raises(FederaError, match="label '-1' is outside"):
        TASK.encode(unlabelled, DATA, tokenizer, ["z", "a"])


def test_a_label_that_lacks_is_no_class_of_that_name(tokenizer):
    rows = table(text=["goal", "soup"], label=["sport", None])
    with pytest.raises(FederaError, match="row 1: column 'label' is empty"):
        TASK.encode(rows, DATA, tokenizer, ["None", "sport"])
    numbers = table(text=["goal", "soup"], label=[3.0, float("nan")])
    with pytest.raises(FederaError, match="row 1: column 'label' is empty"):
        TASK.encode(numbers, DATA, tokenizer, ["3.0", "4.0"])


def test_a_label_outside_the_training_set_is_refused(tokenizer):
    rows = table(text=["goal", "soup"], label=["sport", "foods"])
    message = r"^data: row 1: label 'foods' is outside the training set's labels \(did you mean 'food'\?\): food, sport, tech$"
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
    assert encoded.targets["labels"].tolist() == [1, 0]
    assert encoded.features["input_ids"].values[1] == tokenizer.get_vocab()["goal"]


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (3, "3")])
def test_an_example_without_text_is_refused(tokenizer, value, shown):
    rows = datasets.Dataset.from_list(
        [{"text": v, "label": "a"} for v in ([value] if value == 3 else ["goal", value])]
    )
    with pytest.raises(
        FederaError, match=rf"^data: row {len(rows) - 1}: column 'text' is {shown}, not a text$"
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
    with pytest.raises(FederaError, match="row 1: column 'other' is None"):
        TASK.encode(lone, data, fast, ["a", "b"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder("bert"))
    swapped = TASK.encode(
        table(text=rows["other"], other=rows["text"], label=["a", "b"]), data, fast, ["a", "b"]
    )
    first = TASK.outputs(model.eval()(**inputs))
    second = TASK.outputs(model(**swapped.batch(np.array([0, 1]), torch.device("cpu"))))
    assert not torch.allclose(first, second)


# Scores


def score(predicted, truth, classes, rows=None, task=TASK, names=()):
    """Score logits whose largest entry is the prediction."""
    outputs = [np.eye(classes, dtype=np.float32)[p] * 2 - 1 for p in predicted]
    features = {"input_ids": Ragged.from_rows([[1]] * len(truth))}
    pad = {"input_ids": 0, "labels": IGNORED_LABEL}
    data = Encoded(features, {"labels": np.array(truth)}, pad, reference=list(names))
    examples = np.arange(len(truth)) if rows is None else np.array(rows)
    return task.score(task.decode(outputs, data, examples), data, examples)


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


@pytest.mark.filterwarnings("ignore")
def test_scores_are_sklearns_on_a_thousand_random_cases():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        classes, count = int(rng.integers(1, 9)), int(rng.integers(1, 40))
        truth, guess = rng.integers(0, classes, (2, count))
        expected = {
            "accuracy": accuracy_score(truth, guess),
            "macro_f1": f1_score(truth, guess, average="macro", zero_division=0),
        }
        assert score(guess, truth, classes) == pytest.approx(expected, abs=1e-12)


# Predictions


def test_predictions_are_the_softmax_of_the_logits(tokenizer):
    encoded = TASK.encode(table(text=["goal", "soup", "cup"]), DATA, tokenizer, None)
    assert encoded.targets == {} and encoded.num_examples == 3
    logits = np.array([[0, np.log(3), -np.inf], [700, 0, 0], [-800, -800, -800]], dtype=np.float32)
    shown = [TASK.show(one, ["a", "b", "c"]) for one in TASK.decode(list(logits), encoded, np.arange(3))]
    assert shown == [
        {"label": "b", "probability": 0.75},
        {"label": "a", "probability": 1.0},
        {"label": "a", "probability": 0.333333},
    ]
    assert json.loads(json.dumps(shown)) == shown


def test_columns_groups_and_texts():
    assert (TASK.inputs(DATA), TASK.answers(DATA)) == (["text"], ["label"])
    assert TASK.inputs(DataConfig(text_column="one", text_pair_column="other")) == ["one", "other"]
    rows = table(text=["goal", "soup"], other=["cup", "salt"], label=["sport", "food"])
    assert TASK.groups(rows, DATA) == TASK.strata(rows, DATA) == ["sport", "food"]
    assert TASK.units(rows, DATA) is None
    assert TASK.texts(rows, DATA) == ["goal", "soup"]
    assert TASK.texts(rows, DataConfig(text_pair_column="other")) == ["goal cup", "soup salt"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    named = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    assert TASK.groups(named, DATA) == ["a", "z"], "names, not numbers"


def test_class_labels_go_by_name(tokenizer):
    """A test table that numbers its labels in another order means the same labels."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "z"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["goal", "soup"], "label": [0, 1]}, features=features)
    assert TASK.encode(rows, DATA, tokenizer, ["z", "a"]).targets["labels"].tolist() == [1, 0]


# SemEval-2010 Task 8

CE12, CE21 = "Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)"
EO12, EO21 = "Entity-Origin(e1,e2)", "Entity-Origin(e2,e1)"
SEMEVAL = Classification(official="semeval2010_task8", metric="semeval_f1")


def test_a_relation_is_a_label_without_its_direction():
    assert [relation(name) for name in (CE12, CE21, "Other")] == ["Cause-Effect", "Cause-Effect", "Other"]


@pytest.mark.parametrize(
    ("truth", "guess", "expected"),
    [
        ([CE12, EO21], [CE12, EO21], 1),
        ([CE12, CE21], [CE12, CE12], 2 / 4),  # the wrong direction is a wrong guess of the relation
        ([CE12], [CE21], 0),
        ([CE12, CE21, EO12], [CE21, CE12, EO12], 1 / 2),
        ([CE12, EO12], [EO12, EO12], (0 + 2 / 3) / 2),
        ([CE12, CE21, CE12], [CE12, CE21, EO12], 4 / 5),  # both directions together; EO is not in the truth
        # Other is no relation, but a guess of one that is Other counts, and one that is missed for Other
        (["Other", CE12], ["Other", CE12], 1),
        (["Other", CE12], [CE12, CE12], 2 / 3),
        ([CE12, CE12], ["Other", CE12], 2 / 3),
        (["Other", "Other"], ["Other", "Other"], 0),
        (["Other", CE12], [EO12, CE12], 1),
    ],
)
def test_semeval_by_hand(truth, guess, expected):
    assert semeval_f1(truth, guess) == pytest.approx(expected)


# What the official scorer (version 1.2) printed of two systems: per relation, in the order of its output, the
# right ones, the guesses, those of the wrong direction besides, and the true ones.
PUBLISHED = {
    69.10: [  # 1782 of 2717 right
        (263, 293, 21, 328),
        (187, 283, 41, 312),
        (156, 211, 8, 192),
        (256, 318, 3, 292),
        (190, 271, 13, 258),
        (80, 126, 7, 156),
        (176, 246, 12, 233),
        (179, 248, 25, 261),
        (132, 207, 21, 231),
    ],
    83.25: [  # 2146 of 2706 right
        (300, 326, 3, 324),
        (235, 282, 8, 311),
        (160, 194, 4, 192),
        (264, 301, 1, 292),
        (226, 269, 1, 257),
        (118, 164, 0, 155),
        (206, 249, 0, 232),
        (229, 281, 1, 261),
        (177, 219, 2, 230),
    ],
}


@pytest.mark.parametrize("percent", PUBLISHED)
def test_semeval_is_the_official_scorers(percent):
    """Whom a wrong guess was mistaken for is no matter of the score: here it is Other."""
    truth, guess = [], []
    for i, (right, guesses, wrong_way, true) in enumerate(PUBLISHED[percent]):
        one, other = f"R{i}(e1,e2)", f"R{i}(e2,e1)"
        missed, extra = true - right - wrong_way, guesses - right
        truth += [one] * (right + wrong_way + missed) + ["Other"] * extra
        guess += [one] * right + [other] * wrong_way + ["Other"] * missed + [one] * extra
    assert 100 * semeval_f1(truth, guess) == pytest.approx(percent, abs=0.005)


def test_semeval_beside_accuracy():
    names = sorted([CE12, CE21, EO12, "Other"])
    truth = [names.index(one) for one in (CE12, CE21, EO12, "Other")]
    guess = [names.index(one) for one in (CE12, CE12, EO12, "Other")]
    found = score(guess, truth, 4, task=SEMEVAL, names=names)
    assert found["semeval_f1"] == pytest.approx((2 / 4 + 1) / 2) and found["accuracy"] == 0.75
    assert SEMEVAL.primary == "semeval_f1"
    assert "semeval_f1" not in score(guess, truth, 4, names=names)


def test_semeval_needs_its_own_labels():
    require_relations([CE12, CE21, "Other"])
    for odd in ("Cause-Effect", "3", "Cause-Effect(e1,e1)", "Other(e1,e2) ", "(e1,e2)"):
        with pytest.raises(
            FederaError, match=r"^task\.official=semeval2010_task8: the label .* is neither 'Other' nor"
        ):
            require_relations([CE12, odd])
    with pytest.raises(
        FederaError, match=r"the label '3' is neither .*set data\.label_column to the column of names$"
    ):
        SEMEVAL.labels(table(text=["x", "y"], label=[3, 4]), DATA)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])}
    )
    named = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    with pytest.raises(FederaError, match="the label 'spam' is neither"):
        SEMEVAL.labels(named, DATA)
    assert SEMEVAL.labels(table(text=["x", "y"], label=["Other", CE12]), DATA) == [CE12, "Other"]


def test_the_official_score_is_asked_for_twice():
    with pytest.raises(
        FederaError, match=r"^task\.metric: semeval_f1 needs task\.official=semeval2010_task8$"
    ):
        TASKS.parse({"name": "classification", "metric": "semeval_f1"})
    assert TASKS.parse({"name": "classification", "metric": "macro_f1"}).primary == "macro_f1"


def test_semeval_gold_labels_score_one(shared):
    rows = shared("semeval2010_task8", "test")
    data = DataConfig(label_column="label_name")
    names = SEMEVAL.labels(shared("semeval2010_task8", "train"), data)
    assert len(names) == 19
    truth = list(rows["label_name"])
    assert len(truth) == 2717 and semeval_f1(truth, truth) == 1.0
    swapped = [one.translate(str.maketrans("12", "21")) for one in truth]
    assert semeval_f1(truth, swapped) == 0.0


# Marks that become tokens

MARKS = ("<e1>", "</e1>", "goal-match")


def load(folder, words=()):
    config = ModelConfig(name=str(folder))
    return load_pretrained(config, TASK.auto_class, ["a", "b"], seed=1, added_tokens=words)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "modernbert"])
def test_a_mark_starts_as_the_mean_of_what_it_was(encoder, family):
    plain, loaded = load(encoder(family)), load(encoder(family), MARKS)
    old, new = (one.model.get_input_embeddings().weight.detach() for one in (plain, loaded))
    ids = plain.tokenizer.get_vocab()
    unknown, goal, match = (old[ids[word]] for word in ("[UNK]", "goal", "match"))
    assert len(new) == len(old) + 3 == len(loaded.tokenizer)
    assert torch.equal(new[: len(old)], old), "what was there stays"
    torch.testing.assert_close(new[-3], unknown)
    torch.testing.assert_close(new[-1], (goal + unknown + match) / 3)
    assert loaded.model.config.vocab_size == len(new)
    assert loaded.fingerprint == plain.fingerprint and loaded.head == plain.head


def test_spare_rows_of_the_table_are_used_first(encoder, tmp_path):
    """As DeBERTaV3 has them: more embeddings than tokens."""
    model = transformers.AutoModel.from_pretrained(encoder("deberta-v2"))
    model.resize_token_embeddings(53, mean_resizing=False)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(encoder("deberta-v2")).save_pretrained(tmp_path)
    words = [(), ("<e1>", "goal-match"), ("<e1>", "</e1>", "<e2>", "</e2>", "goal-match")]
    loaded = [load(tmp_path, some) for some in words]
    old, few, many = (one.model.get_input_embeddings().weight.detach() for one in loaded)
    assert [len(one.tokenizer) for one in loaded] == [50, 52, 55]
    assert (len(old), len(few), len(many)) == (53, 53, 55)
    ids = loaded[0].tokenizer.get_vocab()
    mean = (old[ids["goal"]] + old[ids["[UNK]"]] + old[ids["match"]]) / 3
    torch.testing.assert_close(few[51], mean)
    torch.testing.assert_close(many[54], mean)
    assert torch.equal(few[:50], old[:50]) and torch.equal(many[:50], old[:50])
    assert torch.equal(few[52], old[52]), "a row that is spare still"


def test_marks_are_tokens_wherever_they_stand(encoder):
    loaded = load(encoder("bert"), ("<e1>", "</e1>"))
    ids = loaded.tokenizer.get_vocab()
    encoded = TASK.encode(
        table(text=["the <e1>goal</e1> of"], label=["a"]), DATA, loaded.tokenizer, ["a", "b"]
    )
    words = ["[CLS]", "the", "<e1>", "goal", "</e1>", "of", "[SEP]"]
    assert encoded.features["input_ids"].row(0).tolist() == [ids[word] for word in words]
    out = loaded.model(**encoded.batch(np.array([0]), torch.device("cpu")))
    assert TASK.outputs(out).shape == (1, 2)


def test_a_mark_that_cannot_be_is_refused(encoder):
    for word, message in (
        ("goal", r"^task\.added_tokens: 'goal' is a token of the vocabulary already$"),
        ("[CLS]", "is a token of the vocabulary already"),
        (" ", r"^task\.added_tokens: the tokenizer makes nothing of ' '$"),
    ):
        with pytest.raises(FederaError, match=message):
            load(encoder("bert"), ("<e1>", word))
    with pytest.raises(FederaError, match=r"task\.added_tokens"):
        TASKS.parse({"name": "classification", "added_tokens": [""]})
    marked = TASKS.parse({"name": "classification", "added_tokens": ["<e1>", "</e1>"]})
    assert marked.added_tokens == ("<e1>", "</e1>")


def test_no_marks_change_nothing(encoder):
    loaded = load(encoder("bert"))
    before = loaded.model.get_input_embeddings()
    add_tokens(loaded.model, loaded.tokenizer, ())
    assert loaded.model.get_input_embeddings() is before and len(loaded.tokenizer) == before.num_embeddings
