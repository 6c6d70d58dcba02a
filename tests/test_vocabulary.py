"""Rows of the token embeddings that a client's texts do not have: left out of its steps, with the same result."""

import numpy as np
import pytest
import torch
import transformers

from federa import client
from federa.types import Job
from federa.vocabulary import Vocabulary, table_that_shrinks
from running import build, jobs_of
from small import FAMILIES

FT = {"method__name": "ft", "client__lr": 1e-2, "client__clip_norm": 0.0, "client__max_steps": 3}


def update(recipe, rows=None, **changes):
    """A client's update, and what it starts from."""
    experiment = build(recipe, **FT | changes)
    job = jobs_of(experiment)[0]
    rows = experiment.parts[job.client_id] if rows is None else rows
    return experiment.trainer.train(experiment.params, experiment.train, rows, job)[0], experiment


def without(monkeypatch):
    """Let every job have the whole table."""
    monkeypatch.setattr(client, "table_that_shrinks", lambda model: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "client__clip_norm": 0.1,
            "client__optimizer": "sgd",
        },  # AdamW makes much of gradients that are rounding
        {"client__proximal": 0.5},
        {"client__optimizer": "sgd", "client__momentum": 0.9},
        {"client__micro_batch": 3},
    ],
    ids=["adamw", "clipped", "proximal", "sgd", "micro batches"],
)
def test_an_update_is_what_it_is_with_the_whole_table(recipe, monkeypatch, precision, changes):
    changes = {"client__precision": precision} | changes
    short, experiment = update(recipe, **changes)
    assert experiment.trainer.flat.table is not None, "or nothing is tested here"
    without(monkeypatch)
    whole, experiment = update(recipe, **changes)
    assert experiment.trainer.flat.table is None
    assert short.delta.keys() == whole.delta.keys()
    tolerance = 0.0 if "client__clip_norm" not in changes else 1e-6  # a norm is summed in another order
    for name, delta in whole.delta.items():
        assert torch.allclose(short.delta[name], delta, atol=tolerance, rtol=10 * tolerance), name
    assert short.metrics["loss"] == whole.metrics["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_the_rows_of_other_tokens_stay(recipe, encoder, family):
    """Those of a client with two texts; the rows that it has change, but for the padding's where that is fixed."""
    recipe = recipe | {"model": {"name": str(encoder(family))}}
    found, experiment = update(recipe, np.arange(2))
    table = experiment.trainer.flat.table
    assert table is not None
    met = np.unique(np.concatenate([experiment.train.features["input_ids"].row(row) for row in range(2)]))
    changed = found.delta[table].abs().sum(dim=1) > 0
    assert set(torch.nonzero(changed).flatten().tolist()) - {0} == set(met.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_an_update_is_what_it_is_with_the_whole_table(recipe, encoder, family, monkeypatch):
    recipe = recipe | {"model": {"name": str(encoder(family))}}
    short, _ = update(recipe)
    without(monkeypatch)
    whole, _ = update(recipe)
    for name, delta in whole.delta.items():
        assert torch.equal(short.delta[name], delta), name


def test_jobs_leave_nothing_behind(recipe):
    """After a client with few tokens the next has all of its own, and the model predicts with the whole table."""
    experiment = build(recipe, **FT)
    few, many = Job(1, 0, 5, 1e-2), Job(1, 1, 6, 1e-2)
    rows = experiment.parts[1]
    before = experiment.trainer.train(experiment.params, experiment.train, rows, many)[0]
    batches = [np.arange(5)]
    said = next(iter(experiment.predict(experiment.params, batches)))
    experiment.trainer.train(experiment.params, experiment.train, np.arange(1), few)
    after = experiment.trainer.train(experiment.params, experiment.train, rows, many)[0]
    assert all(torch.equal(before.delta[name], delta) for name, delta in after.delta.items())
    assert np.array_equal(next(iter(experiment.predict(experiment.params, batches))), said)


def test_a_job_that_fails_gives_the_table_back(recipe, monkeypatch):
    experiment = build(recipe, **FT)
    trainer = experiment.trainer
    size = trainer.model.get_input_embeddings().weight.shape
    monkeypatch.setattr(trainer.flat.__class__, "backward_", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(experiment.params, experiment.train, np.arange(1), Job(1, 0, 5, 1e-2))
    assert trainer.model.get_input_embeddings().weight.shape == size
    assert trainer.flat.tokens is None


def test_decay_needs_the_whole_table(recipe):
    assert build(recipe, **FT, client__weight_decay=0.1).trainer.flat.table is None


@pytest.mark.parametrize("method", ["federa", "lora", "adapter", "bitfit", "probe"])
def test_other_methods_have_no_table(recipe, method):
    assert build(recipe, method__name=method).trainer.flat.table is None


def test_new_numbers_keep_the_order_and_the_padding(recipe):
    experiment = build(recipe)
    own = Vocabulary(experiment.train, np.arange(3), 60, 2, torch.device("cpu"))
    assert own.tokens[:2].tolist() == [0, 1]
    assert torch.equal(own.places[own.tokens], torch.arange(len(own.tokens)))
    for row in range(3):
        ids = torch.from_numpy(experiment.train.features["input_ids"].row(row)).long()
        assert torch.equal(own.tokens[own.places[ids]], ids)


def test_models_that_need_all_of_the_table_keep_it():
    """GPT-2's classifier looks for the padding by its number; ALBERT's masked language model uses the table twice."""
    sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    gpt = transformers.GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, n_positions=20, pad_token_id=49)
    assert table_that_shrinks(transformers.GPT2ForSequenceClassification(gpt)) is None
    bert = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    assert table_that_shrinks(transformers.BertForMaskedLM(bert)) is None
    assert table_that_shrinks(transformers.BertForSequenceClassification(bert)) is not None
