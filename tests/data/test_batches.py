"""Every row exactly once an epoch, padded to its batch and masked; evaluation loses nothing."""

import numpy as np
import pytest
import torch

from federa.data.batches import IGNORED_LABEL, Encoded, Ragged, evaluation_batches, training_batches

CPU = torch.device("cpu")
ROWS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


def encoded(labels=(0, 1, 2, 1), example=None, **features):
    features = {name: Ragged.from_rows(rows) for name, rows in {"input_ids": ROWS, **features}.items()}
    labels = Ragged.from_rows(labels) if isinstance(labels[0], list) else np.array(labels)
    pad = {"input_ids": 33, "token_type_ids": 0, "labels": IGNORED_LABEL}
    return Encoded(features, {"labels": labels}, pad, None if example is None else np.array(example))


# Flat rows


def test_ragged_keeps_the_rows():
    ragged = Ragged.from_rows(ROWS)
    assert len(ragged) == 4
    assert ragged.lengths().tolist() == [3, 1, 4, 2]
    assert ragged.values.dtype == np.int32 and ragged.values.tolist() == list(range(5, 15))
    assert ragged.offsets.tolist() == [0, 3, 4, 8, 10]


def test_ragged_of_empty_rows():
    ragged = Ragged.from_rows([[], [1], []])
    assert ragged.lengths().tolist() == [0, 1, 0]
    assert ragged.padded(np.array([0, 1, 2]), 7).tolist() == [[7], [1], [7]]
    assert len(Ragged.from_rows([])) == 0


def test_parts_joined_are_the_whole():
    parts = [Ragged.from_rows(ROWS[:1]), Ragged.from_rows([]), Ragged.from_rows(ROWS[1:])]
    joined, whole = Ragged.joined(parts), Ragged.from_rows(ROWS)
    assert np.array_equal(joined.values, whole.values) and np.array_equal(joined.offsets, whole.offsets)
    assert (joined.values.dtype, joined.offsets.dtype) == (whole.values.dtype, whole.offsets.dtype)


def test_padded_to_the_longest_of_the_batch_at_the_right():
    ragged = Ragged.from_rows(ROWS)
    out = ragged.padded(np.array([3, 0]), fill=-1)
    assert out.dtype == torch.int64
    assert out.tolist() == [[13, 14, -1], [5, 6, 7]]
    assert ragged.padded(np.array([1]), fill=-1).tolist() == [[8]]


# Batches of tensors


def test_batch():
    inputs = encoded(token_type_ids=[[0, 0, 1], [0], [0, 1, 1, 1], [0, 1]]).batch(np.array([2, 1, 0]), CPU)
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert inputs["input_ids"].tolist() == [[9, 10, 11, 12], [8, 33, 33, 33], [5, 6, 7, 33]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert inputs["labels"].tolist() == [2, 1, 0]
    assert {t.dtype for t in inputs.values()} == {torch.int64}


def test_a_gpus_batch_is_copied_from_pinned_memory_without_a_wait(monkeypatch):
    pinned, copies = [], []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor, device, *, non_blocking):
        copies.append((any(tensor is t for t in pinned), device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    inputs = encoded().batch(np.array([2, 1]), torch.device("cuda"))
    assert inputs["labels"].tolist() == [2, 1]
    assert copies == [(True, "cuda", True)] * 3
    encoded().batch(np.array([2, 1]), CPU)
    assert len(pinned) == 3, "what stays on the CPU is not copied"


def test_batch_without_labels():
    assert set(encoded().batch(np.array([0, 1]), CPU, labels=False)) == {"input_ids", "attention_mask"}


def test_labels_of_tokens_are_padded_with_what_the_loss_skips():
    inputs = encoded(labels=[[0, 1, 0], [2], [1, 1, 1, 1], [2, 0]]).batch(np.array([0, 1]), CPU)
    assert inputs["labels"].tolist() == [[0, 1, 0], [2, -100, -100]]
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED_LABEL


def test_several_targets_each_with_its_own_padding():
    features = {"input_ids": Ragged.from_rows(ROWS)}
    targets = {
        "start_positions": np.array([1, 0, 2, 0]),
        "tags": Ragged.from_rows([[1, 1, 1], [2], [3] * 4, [4, 4]]),
    }
    data = Encoded(features, targets, {"input_ids": 33, "start_positions": 99, "tags": -7})
    inputs = data.batch(np.array([3, 0]), CPU)
    assert inputs["start_positions"].tolist() == [0, 1]
    assert inputs["tags"].tolist() == [[4, 4, -7], [1, 1, 1]]
    assert set(data.batch(np.array([0]), CPU, labels=False)) == {"input_ids", "attention_mask"}


# Examples of several rows


def test_a_row_is_an_example_unless_said_otherwise():
    data = encoded()
    assert len(data) == data.num_examples == 4
    assert data.rows_of(np.array([2, 0])).tolist() == [2, 0]
    assert [data.num_whole(rows) for rows in range(5)] == [0, 1, 2, 3, 4]


def test_the_rows_of_examples():
    data = encoded(example=[0, 0, 1, 2])
    assert (len(data), data.num_examples) == (4, 3)
    assert data.rows_of(np.arange(3)).tolist() == [0, 1, 2, 3]
    assert data.rows_of(np.array([2, 0])).tolist() == [3, 0, 1]
    assert data.rows_of(np.array([1])).tolist() == [2]
    assert data.rows_of(np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("example", "whole"),
    [([0, 0, 1, 2], [0, 0, 1, 2, 3]), ([0, 1, 1, 1], [0, 1, 1, 1, 2]), ([0, 0, 0, 0], [0, 0, 0, 0, 1])],
)
def test_examples_that_are_whole_among_the_first_rows(example, whole):
    assert [encoded(example=example).num_whole(rows) for rows in range(5)] == whole


def test_how_many_examples_are_examples_of_another_set():
    other = Encoded({"input_ids": Ragged.from_rows([[8], [5, 6, 7], [8]])}, {}, {})
    assert encoded().num_among(other) == 2 and other.num_among(encoded()) == 3
    assert encoded(example=[0, 0, 1, 2]).num_among(other) == 0, "a part of an example is not the example"
    assert encoded(example=[0, 0, 1, 2]).num_among(encoded(example=[0, 0, 1, 1])) == 1
    assert encoded().num_among(Encoded({"input_ids": Ragged.from_rows([])}, {}, {})) == 0


def test_padding_does_not_change_what_a_model_says(encoder):
    """The mask is right: a row alone, unpadded, gives the logits that it gives in a batch."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder("bert"), num_labels=3
    ).eval()
    data = encoded()
    together = model(**data.batch(np.arange(4), CPU)).logits
    for row in range(4):
        alone = model(**data.batch(np.array([row]), CPU)).logits[0]
        torch.testing.assert_close(alone, together[row], atol=1e-6, rtol=1e-5)


# An epoch


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("batch_size", [1, 8, 50])
def test_every_row_exactly_once_an_epoch(count, batch_size):
    rows = np.arange(1000, 1000 + count)
    lengths = np.random.default_rng(1).integers(1, 90, 1000 + count)
    batches = list(training_batches(rows, lengths, batch_size, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    assert len(batches) == -(-count // batch_size), "no more steps than the rows ask for"
    assert sorted({len(batch) for batch in batches})[-1] == min(batch_size, count)
    assert sum(len(batch) < batch_size for batch in batches) <= 1, "only one batch is short"


def test_epochs_are_random_and_seeded():
    rows, lengths = np.arange(64), np.ones(64, dtype=np.int64)
    first, again, other = (
        list(training_batches(rows, lengths, 8, np.random.default_rng(s))) for s in (0, 0, 1)
    )
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    rng = np.random.default_rng(0)
    epochs = [[frozenset(b.tolist()) for b in training_batches(rows, lengths, 8, rng)] for _ in range(2)]
    assert not set(epochs[0]) & set(epochs[1]), "batches are made up anew"
    assert np.array_equal(rows, np.arange(64)), "the client's rows are left alone"


def test_batches_hold_examples_of_like_length():
    lengths = np.random.default_rng(1).integers(1, 129, 512)
    padded = {}
    for name, batches in {
        "ours": list(training_batches(np.arange(512), lengths, 16, np.random.default_rng(0))),
        "plain": np.split(np.random.default_rng(0).permutation(512), 32),
    }.items():
        padded[name] = sum(len(b) * lengths[b].max() for b in batches) / lengths.sum()
    assert padded["plain"] > 1.7
    assert padded["ours"] < 1.2


def test_batches_do_not_come_in_order_of_length():
    lengths = np.arange(64)
    means = [lengths[b].mean() for b in training_batches(np.arange(64), lengths, 8, np.random.default_rng(0))]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_evaluation_batches():
    lengths = np.array([3, 9, 1, 9, 5, 2, 7])
    rows = np.array([0, 1, 2, 3, 4, 6])
    batches = evaluation_batches(rows, lengths, 4)
    assert [b.tolist() for b in batches] == [[1, 3, 6, 4], [0, 2]], "longest first, ties in order"
    assert evaluation_batches(np.array([], dtype=np.int64), lengths, 4) == []


def test_lengths_are_rounded_up_but_not_beyond_the_longest_row():
    """A row of the data set may fill the model's positions: nothing is to be longer."""
    rows = Ragged.from_rows([[1] * n for n in (3, 9, 20)])
    data = Encoded({"input_ids": rows}, {"labels": rows}, {"input_ids": 0, "labels": -100})
    cpu = torch.device("cpu")
    for chosen, multiple, expected in (
        ([0], 8, 8),
        ([0, 1], 8, 16),
        ([2], 8, 20),
        ([0], None, 3),
        ([0], 32, 20),
    ):
        batch = data.batch(np.array(chosen), cpu, multiple=multiple)
        assert {name: t.shape[1] for name, t in batch.items()} == dict.fromkeys(batch, expected)
        assert batch["attention_mask"].sum() == rows.lengths()[chosen].sum()
        assert (batch["labels"] == -100).sum() == batch["labels"].numel() - rows.lengths()[chosen].sum()
