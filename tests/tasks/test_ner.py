"""NER: one label a word whatever the tokenizer, windows that lose no entity, and one line for bad tags."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federa.data.batches import IGNORED_LABEL
from federa.data.datasets import DataConfig
from federa.tasks import NER, TASKS
from federa.tasks.ner import NO_ENTITY
from federa.tasks.spans import span_scores
from federa.types import FederaError

TASK = NER()
DATA = DataConfig()
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
# Words that tokenizers stumble over: joined emoji, accents, no letters at all, spaces that are none.
UNICODE = [
    ["Ångström", "né", "à", "Lögdö"],
    ["👩\u200d🚀", "flew", "to", "🇫🇷", "!"],
    ["東京", "is", "not", "京都市"],
    ["\u200d", "Paris", "\u200b", "\u00ad"],
    ["\u00a0", "Paris", "\u00a0", "\u00a0", "Lyon"],
    ["10\u00a0000", "people"],
    ["e\u0301cole", "ﬁn", "½", "Ⅳ"],
    ["don't", "can", "'t", "...", "-", "''"],
    ["\u3000", "\t", "x\u2028y", "\x85"],
    ["مرحبا", "שלום", "привет", "ไทย"],
    ["\ufeff", "\ufffd", "\x00", "\x7f", "a"],
    ["unbelievable" * 12, "x"],
    ["[CLS]", "[SEP]", "[PAD]"],
    ["▁", "Ġ", "##ing", "▁Paris"],
]


def table(tokens, tags=None):
    columns = {"tokens": tokens} | ({} if tags is None else {"tags": tags})
    return datasets.Dataset.from_dict(columns)


def rows_of(ragged):
    return [ragged.row(i).tolist() for i in range(len(ragged))]


def one_hot(encoded, rng=None):
    """Return the outputs of a model that knows every label that it is trained on, and guesses elsewhere."""
    rng = rng or np.random.default_rng(0)
    rows = rows_of(encoded.targets["labels"])
    return [
        np.array([rng.integers(0, 5) if label == IGNORED_LABEL else label for label in row] + [1, 1])
        for row in rows
    ]  # two tokens of padding behind


def tags_of(task, encoded, outputs, labels, examples=None):
    examples = np.arange(encoded.num_examples) if examples is None else np.array(examples)
    return [task.show(one, labels)["tags"] for one in task.decode(outputs, encoded, examples)]


@pytest.fixture(scope="module")
def word_level(encoder):
    """A token a word."""
    return transformers.AutoTokenizer.from_pretrained(encoder("bert"))


# Labels


def test_the_tag_set_is_closed_and_sorted():
    rows = table([["a", "b"], ["c"]], [["B-PER", "O"], ["B-creative-work"]])
    assert TASK.labels(rows, DATA) == ["O", "B-PER", "I-PER", "B-creative-work", "I-creative-work"]


def test_a_mark_that_training_never_had_is_no_error(word_level):
    """`I-` occurs in the test set alone, and `B-` in the training set alone."""
    labels = TASK.labels(table([["goal"]], [["B-PER"]]), DATA)
    encoded = TASK.encode(table([["goal", "team"]], [["B-PER", "I-PER"]]), DATA, word_level, labels)
    assert rows_of(encoded.targets["labels"]) == [[-100, 1, 2, -100]]


def test_tags_that_are_numbers_have_names(word_level):
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
        }
    )
    rows = datasets.Dataset.from_dict({"tokens": [["goal", "team", "cup"]], "tags": [[1, 2, 0]]}, features)
    assert TASK.labels(rows, DATA) == ["O", "B-PER", "I-PER"]
    other = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    encoded = TASK.encode(rows, DATA, word_level, other)
    assert rows_of(encoded.targets["labels"]) == [[-100, 3, 4, 0, -100]], "by name, not by number"


def test_iob1_is_read_when_asked_for(word_level):
    rows = table([["goal", "team", "cup"]], [["I-PER", "I-PER", "B-PER"]])
    task = NER(scheme="iob1")
    labels = task.labels(rows, DATA)
    assert rows_of(task.encode(rows, DATA, word_level, labels).targets["labels"]) == [[-100, 1, 2, 1, -100]]
    with pytest.raises(
        FederaError, match=r"row 0: word 0: the tag 'I-PER' at the start is not BIO; .*scheme=iob1$"
    ):
        TASK.labels(rows, DATA)


@pytest.mark.parametrize("letters", ["BIES", "BILU"])
def test_bioes_is_read_when_asked_for(word_level, letters):
    """BILOU is the same with other letters."""
    begin, inside, end, single = (f"{letter}-PER" for letter in letters)
    rows = table([["goal", "team", "cup", "win", "app", "chip"]], [[begin, inside, end, single, "O", single]])
    task = NER(scheme="bioes")
    labels = task.labels(rows, DATA)
    assert labels == ["O", "B-PER", "I-PER"]
    encoded = task.encode(rows, DATA, word_level, labels)
    assert rows_of(encoded.targets["labels"]) == [[-100, 1, 2, 2, 1, 0, 1, -100]]
    with pytest.raises(
        FederaError,
        match=rf"word 2: the tag '{end}' after '{inside}' is not BIO; if .* in BIOES, set task\.scheme=bioes$",
    ):
        TASK.labels(rows, DATA)
    after = table([["goal", "team"]], [[single, inside]])
    with pytest.raises(
        FederaError, match=rf"row 0: word 1: the tag '{inside}' after '{single}' is not BIOES$"
    ):
        task.labels(after, DATA)


def test_no_scheme_is_named_where_none_helps():
    for tags in (["X", "O"], ["M-PER", "O"], ["E", "O"]):
        with pytest.raises(FederaError, match=r"is not BIO$"):
            TASK.labels(table([["a", "b"]], [tags]), DATA)


def test_groups_are_the_types_of_a_sentence():
    tags = [["B-PER", "O", "B-LOC"], ["O"], ["B-LOC", "I-LOC", "B-LOC"], ["B-LOC", "B-PER", "I-PER"]]
    rows = table([["w"] * len(one) for one in tags], tags)
    assert TASK.groups(rows, DATA) == ["LOC-PER", NO_ENTITY, "LOC", "LOC-PER"]
    assert TASK.texts(rows, DATA)[0] == "w w w"
    assert TASK.strata(rows, DATA) is None and TASK.units(rows, DATA) is None


def test_columns():
    data = DataConfig(tokens_column="words", tags_column="ner")
    assert (TASK.inputs(data), TASK.answers(data)) == (["words"], ["ner"])
    rows = datasets.Dataset.from_dict({"words": [["a"]], "ner": [["B-X"]]})
    assert TASK.labels(rows, data) == ["O", "B-X", "I-X"]


# What does not fit


def refused(message, tokens, tags, labels=None, tokenizer=None):
    with pytest.raises(FederaError, match=message) as error:
        if labels is None:
            TASK.labels(table(tokens, tags), DATA)
        else:
            TASK.encode(table(tokens, tags), DATA, tokenizer, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        ([["a"], ["b", "c"]], [["O"], ["O"]], r"^data: row 1: 2 words and 1 tags$"),
        ([["a"], ["b"]], [["O"], ["O", "O"]], r"^data: row 1: 1 words and 2 tags$"),
        ([["a"], ["b"]], [["O"], []], r"^data: row 1: 1 words and 0 tags$"),
        ([["a"], ["b"]], [["O"], None], r"^data: row 1: 1 words and no list of tags$"),
        ([["a"], ["b"]], ["O", "O"], r"^data: row 0: 1 words and no list of tags$"),
        ([["a"], ["b", "c"]], [["O"], ["O", None]], r"^data: row 1: word 1: the tag None is not a text$"),
        ([["a"]], [[3]], r"^data: row 0: word 0: the tag 3 is not a text$"),
        (
            [["a"], ["b", "c"]],
            [["O"], ["O", "I-X"]],
            r"^data: row 1: word 1: the tag 'I-X' after 'O' is not BIO",
        ),
        ([["b", "c"]], [["B-X", "I-Y"]], r"^data: row 0: word 1: the tag 'I-Y' after 'B-X' is not BIO"),
        ([["b", "c"]], [["X", "O"]], r"^data: row 0: word 0: the tag 'X' at the start is not BIO"),
        ([["a"], []], [["O"], []], r"^data: row 1: column 'tokens' has no words$"),
        ([["a"], None], [["O"], ["O"]], r"^data: row 1: column 'tokens' is not a list of words$"),
        (
            [["a"], ["b", None]],
            [["O"], ["O", "O"]],
            r"^data: row 1: column 'tokens' is not a list of words$",
        ),
        (["a b", "c"], [["O", "O"], ["O"]], r"^data: row 0: column 'tokens' is not a list of words$"),
        ([["a"], ["b"]], [["O"], ["O"]], r"^data\.tags_column: 'tags' has no entity; all tags are O$"),
    ],
)
def test_bad_rows_are_named(tokens, tags, message):
    refused(message, tokens, tags)


def test_a_type_that_training_never_had_is_refused(word_level):
    refused(
        r"^data: row 1: word 1: the training set has no entity of type 'PERS' \(did you mean 'PER'\?\); it has LOC, PER$",
        [["a"], ["b", "c"]],
        [["O"], ["O", "B-PERS"]],
        LABELS,
        word_level,
    )


@pytest.mark.parametrize(("max_length", "overlap"), [(8, 6), (32, 32), (4, 2)])
def test_windows_need_room(word_level, max_length, overlap):
    task = NER(max_length=max_length, overlap=overlap)
    with pytest.raises(FederaError, match=rf"^task\.overlap: windows of {max_length} tokens have room for "):
        task.encode(table([["goal"]], [["O"]]), DATA, word_level, LABELS)


# Rows by hand


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids"]], ids=len)
def test_the_label_is_on_the_first_piece(names):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "john", "##son", "##s", "in", "york"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=names,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=64,
    )
    tags = [["B-PER", "I-PER", "O", "B-LOC", "O"]]
    encoded = TASK.encode(table([["johnsons", "john", "in", "york", "zzz"]], tags), DATA, fast, LABELS)
    assert rows_of(encoded.features["input_ids"]) == [[2, 4, 5, 6, 4, 7, 8, 1, 3]]
    assert rows_of(encoded.targets["labels"]) == [[-100, 3, -100, -100, 4, 0, 1, 0, -100]]
    types = {name: rows_of(rows) for name, rows in encoded.features.items() if name != "input_ids"}
    assert types == ({"token_type_ids": [[0] * 9]} if len(names) > 1 else {})
    assert encoded.example is None and encoded.num_examples == 1


def test_windows_by_hand(word_level):
    """Room for four tokens, two shared: a word's label is in the window where it has the most context."""
    words = ["goal", "team", "cup", "win", "soup", "bread", "salt"]
    tags = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "I-LOC", "O"]
    rows = table([["goal"], words, ["team"]], [["O"], tags, ["B-LOC"]])
    task = NER(max_length=6, overlap=2)
    encoded = task.encode(rows, DATA, word_level, LABELS)
    vocabulary = word_level.get_vocab()
    ids = [vocabulary[word] for word in words]
    assert rows_of(encoded.features["input_ids"]) == [
        [2, ids[0], 3],
        [2, *ids[0:4], 3],
        [2, *ids[2:6], 3],
        [2, *ids[3:7], 3],
        [2, ids[1], 3],
    ]
    assert rows_of(encoded.targets["labels"]) == [
        [-100, 0, -100],
        [-100, 3, 4, 0, -100, -100],
        [-100, -100, 1, 2, -100, -100],
        [-100, -100, -100, 2, 0, -100],
        [-100, 1, -100],
    ]
    assert encoded.example.tolist() == [0, 1, 1, 1, 2]
    assert tags_of(task, encoded, one_hot(encoded), LABELS) == [["O"], tags, ["B-LOC"]]


def test_no_more_tokens_than_the_tokenizer_allows(word_level):
    encoded = NER(max_length=4096).encode(table([["goal"] * 200], [["O"] * 200]), DATA, word_level, LABELS)
    assert encoded.lengths().max() == word_level.model_max_length == 64


def test_a_long_sentence_is_no_cause_for_alarm(encoder):
    """The library warns of indexing errors when it sees more tokens than the model takes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    TASK.encode(table([["goal"] * 200], [["O"] * 200]), DATA, tokenizer, LABELS)
    assert not tokenizer.deprecation_warnings, "it has warned"
    tokenizer(["goal " * 200])
    assert tokenizer.deprecation_warnings, "it would have"


def test_predictions_need_no_tags(word_level):
    rows = table([["goal", "team"], TASK.from_text(" goal  in the\tcup ")])
    encoded = TASK.encode(rows, DATA, word_level, None)
    assert encoded.targets == {}
    shown = [
        TASK.show(one, LABELS)
        for one in TASK.decode([np.array([9, 3, 4, 9]), np.array([9, 0, 0, 0, 1, 9])], encoded, np.arange(2))
    ]
    assert shown == [
        {"tokens": ["goal", "team"], "tags": ["B-PER", "I-PER"]},
        {"tokens": ["goal", "in", "the", "cup"], "tags": ["O", "O", "O", "B-LOC"]},
    ]
    assert json.loads(json.dumps(shown)) == shown


def test_some_examples_in_any_order(word_level):
    rows = table([["goal"] * n for n in (9, 1, 7)], [["B-PER"] * 9, ["B-LOC"], ["O"] * 7])
    task = NER(max_length=6, overlap=2)
    encoded = task.encode(rows, DATA, word_level, LABELS)
    outputs = one_hot(encoded)
    examples = np.array([2, 0])
    some = [outputs[row] for row in encoded.rows_of(examples)]
    assert tags_of(task, encoded, some, LABELS, examples) == [["O"] * 7, ["B-PER"] * 9]
    predictions = task.decode(some, encoded, examples)
    assert task.score(predictions, encoded, examples)["f1"] == 1.0
    assert task.score(predictions[::-1][:1], encoded, np.array([0]))["recall"] == 1.0


def test_scores_are_of_spans(word_level):
    words, truth = ["goal", "team", "cup"], ["B-PER", "I-PER", "O"]
    encoded = TASK.encode(table([words], [truth]), DATA, word_level, LABELS)
    for guess in (["B-PER", "I-PER", "O"], ["B-PER", "O", "O"], ["I-PER", "I-PER", "B-LOC"]):
        output = np.array([0, *(LABELS.index(tag) for tag in guess), 0])
        predictions = TASK.decode([output], encoded, np.array([0]))
        assert TASK.score(predictions, encoded, np.array([0])) == span_scores([truth], [guess])
    assert TASK.primary in span_scores([truth], [truth])


# Any tokenizer


def first_pieces(words, tokenizer):
    """Return for every word the number of its first piece, or None, looking at one character after another."""
    text = " ".join(words)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found, begin = [], 0
    for word in words:
        inside = range(begin, begin + len(word))
        found.append(next((piece for piece, (_, end) in enumerate(offsets) if end - 1 in inside), None))
        begin += len(word) + 1
    return found


def check_one_label_a_word(words, tokenizer, task):
    tags = [f"B-{i}" for i in range(len(words))]
    labels = ["O", *tags]
    encoded = task.encode(table([words], [tags]), DATA, tokenizer, labels)
    given = [label for row in rows_of(encoded.targets["labels"]) for label in row if label >= 0]
    assert given == list(range(1, len(words) + 1)), "each word once, in order"
    assert encoded.lengths().max() <= task.max_length
    return encoded


@pytest.mark.parametrize("words", UNICODE, ids=ascii)
def test_every_word_has_one_label(any_tokenizer, words):
    task = NER(max_length=256)
    encoded = check_one_label_a_word(words, any_tokenizer, task)
    ids, labels = encoded.features["input_ids"].row(0), encoded.targets["labels"].row(0)
    pieces = any_tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    shift = 1  # [CLS], and a token for each word that comes to nothing
    for word, piece in enumerate(first_pieces(words, any_tokenizer)):
        (at,) = np.flatnonzero(labels == word + 1)
        if piece is None:
            assert ids[at] == any_tokenizer.unk_token_id
            shift += 1
        else:
            assert (ids[at], at) == (pieces[piece], piece + shift)
    assert len(ids) == len(pieces) + shift + 1, "nothing else is added"
    check_one_label_a_word(words, any_tokenizer, NER(max_length=7, overlap=2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(words=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=8))
def test_any_words_have_one_label_each(any_tokenizer, words):
    check_one_label_a_word(words, any_tokenizer, NER(max_length=9, overlap=3))


def test_windows_inside_one_word_are_left_out(byte_level):
    """Nothing could be learnt from them, and a batch of them alone would lose 0 / 0."""
    words = ["Paris", "qzx" * 30, "York"]
    task = NER(max_length=12, overlap=2)
    encoded = task.encode(table([words], [["B-LOC", "O", "B-LOC"]]), DATA, byte_level, LABELS)
    assert 1 < len(encoded) < 6, "90 pieces would be nine windows"
    given = rows_of(encoded.targets["labels"])
    assert all(max(row) >= 0 for row in given)
    assert sum(label >= 0 for row in given for label in row) == 3
    found = task.decode(one_hot(encoded, np.random.default_rng(0)), encoded, np.arange(1))
    assert [LABELS[tag] for tag in found[0][1]] == ["B-LOC", "O", "B-LOC"]


@pytest.mark.parametrize(("max_length", "overlap"), [(128, 32), (12, 4), (6, 3), (4, 1), (5, 0)])
def test_no_entity_is_lost_at_a_cut(any_tokenizer, max_length, overlap):
    rng = np.random.default_rng(max_length)
    words = [word for sentence in UNICODE for word in sentence] + ["Paris", "unforgettable", "New", "York"]
    sentences, tags = [], []
    for _ in range(12):
        sentence = rng.choice(words, rng.integers(1, 40)).tolist()
        one = []
        while len(one) < len(sentence):
            kind = rng.choice(["PER", "LOC", ""])
            one += [f"B-{kind}", *[f"I-{kind}"] * int(rng.integers(0, 6))] if kind else ["O"]
        sentences.append(sentence)
        tags.append(one[: len(sentence)])
    task = NER(max_length=max_length, overlap=overlap)
    encoded = task.encode(table(sentences, tags), DATA, any_tokenizer, LABELS)
    assert max_length == 128 or len(encoded) > 24, "there are windows"
    outputs = one_hot(encoded, rng)
    assert tags_of(task, encoded, outputs, LABELS) == tags
    predictions = task.decode(outputs, encoded, np.arange(12))
    assert task.score(predictions, encoded, np.arange(12))["f1"] == 1.0


# With a model


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_takes_the_rows_and_the_loss_skips_what_has_no_label(encoder, word_level, family):
    model = transformers.AutoModelForTokenClassification.from_pretrained(encoder(family), num_labels=5).eval()
    rows = table([["goal", "team", "cup"], ["soup"]], [["B-PER", "I-PER", "O"], ["B-LOC"]])
    encoded = TASK.encode(rows, DATA, word_level, LABELS)
    batch = encoded.batch(np.array([0, 1]), torch.device("cpu"))
    out = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    best = TASK.outputs(out)
    assert best.shape == (2, 5) and torch.equal(best, out.logits.argmax(-1))
    truth = [(0, 1, 3), (0, 2, 4), (0, 3, 0), (1, 1, 1)]  # row, token, label
    loss = -sum(out.logits[row, token].log_softmax(-1)[label] for row, token, label in truth) / 4
    torch.testing.assert_close(out.loss, loss)
    predictions = TASK.decode(list(best.numpy()), encoded, np.arange(2))
    assert [tags.tolist() for _, tags in predictions] == [best[0, 1:4].tolist(), best[1, 1:2].tolist()]


def test_registered():
    assert TASKS.parse("ner") == NER()
    assert getattr(transformers, NER.auto_class)
    for field, value in (("max_length", 3), ("overlap", -1), ("scheme", "iobes"), ("metric", "accuracy")):
        with pytest.raises(FederaError, match=rf"task\.{field}"):
            TASKS.parse({"name": "ner", field: value})


# Real data


@pytest.mark.parametrize(("max_length", "overlap"), [(128, 32), (16, 6)])
@pytest.mark.parametrize("name", ["wnut17", "crossner"])
def test_gold_tags_score_one_through_the_whole_pipeline(shared, minilm, name, max_length, overlap):
    task = NER(max_length=max_length, overlap=overlap)
    labels = task.labels(shared(name, "train"), DATA)
    entities = 0
    for split in ("validation", "test"):
        rows = shared(name, split)
        encoded = task.encode(rows, DATA, minilm, labels)
        assert encoded.num_examples == len(rows)
        if max_length == 16:
            assert len(encoded) > 1.5 * len(rows), "there are windows"
        examples = np.arange(len(rows))
        predictions = task.decode(one_hot(encoded), encoded, examples)
        scores = task.score(predictions, encoded, examples)
        assert scores == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "macro_f1": 1.0}
        shown = [task.show(one, labels) for one in predictions]
        assert [one["tokens"] for one in shown] == list(rows["tokens"])
        assert [one["tags"] for one in shown] == list(rows["tags"])
        entities += sum(tag.startswith("B-") for one in shown for tag in one["tags"])
    if name == "wnut17":
        assert entities == 836 + 1079
