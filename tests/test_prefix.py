"""What frozen layers make of a text is computed once, with the result that it has when it is computed in every step."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from families import FAMILIES, build_family
from federa import prefix, run
from federa.engines import Processes, Serial
from federa.prefix import frozen_prefix
from federa.run import Observer
from federa.types import FederaError, Job
from running import build, configure, federa, jobs_of, play_on, same, short_reports
from small import TASKS, write_task

TOP = {
    "bert": "layer.1.attention.self.query",
    "roberta": "layer.1.attention.self.query",
    "electra": "layer.1.attention.self.query",
    "deberta-v2": "layer.1.attention.self.query_proj",
    "distilbert": "layer.1.attention.q_lin",
    "modernbert": "layers.1.attn.Wqkv",
}
PLAIN = {"client__optimizer": "sgd", "client__clip_norm": 0.0, "client__lr": 0.05, "client__dropout": 0.0}


def method(kind, family="bert"):
    return {
        "probe": {"name": "probe"},
        "top": {"name": "lora", "rank": 4, "targets": [TOP[family]]},
        "local": {"name": "probe", "head": "local"},
    }[kind]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = str(build_family(family, tmp_path_factory.mktemp("families") / family))
        return made[family]

    return get


@pytest.fixture()
def recipe(recipe, family_of):
    """A model whose logits depend on every layer; SGD, since AdamW makes much of gradients that are rounding."""
    return recipe | {"model": {"name": family_of("bert")}}


def with_and_without(recipe, kind="probe", family="bert", **changes):
    """Return an experiment that reuses what is frozen, and one that does not."""
    changes = {"method": method(kind, family), **PLAIN, **changes}
    return [build(recipe, **changes, client__reuse_frozen=on) for on in (True, False)]


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def count(experiment, number=0):
    """Return a list that gets the texts that a layer is given, batch by batch."""
    seen = []
    layers_of(experiment.trainer.model)[number].register_forward_hook(
        lambda module, given, out: seen.append(len(given[0]))
    )
    return seen


def check_close(one, other, tolerance):
    """Require that two plays are equal to rounding: what was learned, the losses, and predictions."""
    (state, story, outputs), (expected, told, said) = one, other
    for name, tensor in expected.params.items():
        assert torch.dist(state.params[name], tensor) <= tolerance * tensor.norm(), name
    assert [loss for loss, *_ in story] == pytest.approx([loss for loss, *_ in told], rel=tolerance)
    assert np.linalg.norm(outputs - said) <= tolerance * np.linalg.norm(said)


def texts(data, rows):
    return {tuple(data.features["input_ids"].row(row)) for row in rows}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["probe", "top"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_rounds_are_what_they_are_without(recipe, family_of, family, kind, precision):
    """Two rounds of three clients with two epochs each, and an evaluation."""
    recipe = recipe | {"model": {"name": family_of(family)}}
    reusing, plain = with_and_without(recipe, kind, family, client__precision=precision, client__epochs=2)
    assert reusing.trainer.prefix is not None
    assert plain.trainer.prefix is None
    seen, all_seen, above = count(reusing), count(plain), count(reusing, 1)
    one, other = play_on(reusing, Serial(threads=1)), play_on(plain, Serial(threads=1))
    check_close(one, other, 1e-5 if precision == "fp32" else 2e-2)
    moved = {n: torch.dist(t, plain.params[n]) / (t.norm() + 1) for n, t in other[0].params.items()}
    assert max(moved.values()) > 1e-3, "something was learned at all"
    trained = np.concatenate([reusing.parts[j.client_id] for n in (1, 2) for j in jobs_of(reusing, n)])
    met = texts(reusing.train, trained) | texts(reusing.evaluation, np.arange(30))
    assert sum(seen) == len(met), "a text is computed once"
    assert sum(all_seen) == 2 * len(trained) + 30
    assert sum(above) == (sum(seen) if kind == "probe" else sum(all_seen))


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize("kind", ["probe", "top"])
@pytest.mark.parametrize("task", ["ner", "qa"])
def test_tasks_of_tokens_are_what_they_are_without(recipe, family_of, tmp_path, family, kind, task):
    """Their heads read every token, and nothing of the padding."""
    folder = write_task(tmp_path / task, task)
    recipe = recipe | {
        "model": {"name": family_of(family)},
        "data": {"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")},
        "task": TASKS[task],
        "partition": {"name": "iid", "clients": 3},
    }
    reusing, plain = with_and_without(recipe, kind, family)
    seen = count(reusing)
    for job in jobs_of(reusing):
        one, other = (
            e.trainer.train(e.params, e.train, e.parts[job.client_id], job)[0] for e in (reusing, plain)
        )
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
        for name, delta in other.delta.items():
            assert torch.dist(one.delta[name], delta) <= 1e-5 * delta.norm(), name
    rows = np.concatenate([reusing.parts[job.client_id] for job in jobs_of(reusing)])
    assert sum(seen) == len(texts(reusing.train, rows))
    batches = reusing.batches(np.arange(len(reusing.evaluation)))
    said = zip(*(e.predict(e.params, batches) for e in (reusing, plain)), batches, strict=True)
    for one, other, rows in said:
        for found, expected, length in zip(one, other, reusing.evaluation.lengths()[rows], strict=True):
            assert np.allclose(found[:length], expected[:length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"client__micro_batch": 3},
        {"client__checkpointing": True},
        {"client__weight_decay": 0.1},
        {"method": {"name": "lora", "rank": 4, "targets": [TOP["bert"]], "dora": True}},
        {"method": {"name": "federa", "rank": 4, "targets": [TOP["bert"]], "head": "freeze"}},
        {"method": method("local")},
        {"model__train_pooler": False},
        {"client__optimizer": "adamw", "client__lr": 1e-3},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_whatever_else_a_client_does(recipe, changes):
    reusing, plain = with_and_without(recipe, "top", client__max_steps=3, **changes)
    seen = count(reusing)
    tolerance = 1e-3 if "client__optimizer" in changes else 1e-5
    check_close(play_on(reusing, Serial(threads=1)), play_on(plain, Serial(threads=1)), tolerance)
    assert sum(seen) < len(reusing.train)


def test_workers_fill_their_own(recipe):
    reusing, plain = with_and_without(recipe, "top", client__max_steps=3)
    expected = play_on(plain, Serial(threads=1))
    check_close(play_on(reusing, Processes(workers=2, threads=1)), expected, 1e-5)


class Stop(Observer):
    """Ends a run after its first round, as Ctrl-C would."""

    def finished_round(self, record):
        raise KeyboardInterrupt


def test_a_resumed_run_comes_to_the_same(recipe, tmp_path, monkeypatch):
    short_reports(monkeypatch)
    config = configure(recipe, method=method("top"), **PLAIN, client__reuse_frozen=True)
    whole, plain = run(config), run(config.replace(**{"client.reuse_frozen": False}))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", observer=Stop())
    resumed = run(None, tmp_path / "run", resume=True)
    for name, tensor in plain.state.params.items():
        for state in (whole.state, resumed.state):
            assert torch.dist(state.params[name], tensor) <= 1e-5 * tensor.norm(), name
    assert resumed.summary["final"] == plain.summary["final"]


def test_what_was_kept_while_predicting_serves_training(recipe):
    """Predictions are made in inference mode, whose tensors no backward pass may need."""
    reusing, plain = with_and_without(recipe, "top")
    seen, rows = count(reusing), np.arange(16)
    for experiment in (reusing, plain):
        list(experiment.trainer.predict(experiment.params, experiment.train, [rows]))
    assert sum(seen) == len(texts(reusing.train, rows))
    one, other = (e.trainer.train(e.params, e.train, rows, Job(1, 0, 5, 0.05))[0] for e in (reusing, plain))
    assert sum(seen) == len(texts(reusing.train, rows))
    for name, delta in other.delta.items():
        assert torch.dist(one.delta[name], delta) <= 1e-5 * delta.norm(), name


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_does_not_fit_is_computed_each_time(recipe, monkeypatch, share):
    reusing, plain = with_and_without(recipe, "top", client__epochs=2)
    whole = 4 * 32 * int(sum(reusing.train.lengths()[part].sum() for part in reusing.parts))
    room = share * whole / prefix.SHARE
    monkeypatch.setattr(prefix, "free_memory", lambda _: room - reusing.trainer.prefix._bytes)
    seen = count(reusing)
    check_close(play_on(reusing, Serial(threads=1)), play_on(plain, Serial(threads=1)), 1e-5)
    held = reusing.trainer.prefix._kept.values()
    size = sum(t.untyped_storage().nbytes() for t in held)
    assert size == reusing.trainer.prefix._bytes <= share * whole
    assert size >= 0.8 * share * whole, "and what fits is kept"
    assert sum(seen) > len(reusing.trainer.prefix._kept) + 100


def test_of_a_classifier_that_reads_one_token_one_is_kept(recipe):
    reusing, _ = with_and_without(recipe)
    reusing.train_client(reusing.params, jobs_of(reusing)[0])
    assert {t.shape for t in reusing.trainer.prefix._kept.values()} == {(1, 32)}


def test_the_model_is_whole_afterwards(recipe, monkeypatch):
    """Also after a step that fails."""
    reusing, _ = with_and_without(recipe)
    model = reusing.trainer.model
    names, training = [name for name, _ in model.named_modules()], model.training
    monkeypatch.setattr(model.classifier.__class__, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reusing.trainer.loss(reusing.train, np.arange(4))
    assert [name for name, _ in model.named_modules()] == names
    assert model.training == training


@pytest.mark.parametrize(
    "changes",
    [{"name": "federa", "rank": 4}, {"name": "adapter", "width": 4}, {"name": "bitfit"}, {"name": "ft"}],
    ids=lambda changes: changes["name"],
)
def test_where_the_first_layer_trains_nothing_changes_but_a_word(recipe, caplog, changes):
    reusing, plain = with_and_without(recipe, method=changes)
    assert reusing.trainer.prefix is None
    assert [r.getMessage() for r in caplog.records] == [
        "client.reuse_frozen: the first layer trains, or what comes before it: there is nothing to reuse"
    ]
    job = jobs_of(plain)[0]
    one, other = (e.train_client(e.params, job) for e in (reusing, plain))
    assert same(one.delta, other.delta)


@pytest.mark.parametrize("dropout", [None, 0.01], ids=["the model's own", "0.01"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_in_frozen_layers_is_refused(recipe, dropout, precision):
    changes = {**PLAIN, "client__dropout": dropout, "client__precision": precision}
    with pytest.raises(FederaError, match=r"^client\.reuse_frozen: .*set client\.dropout=0$"):
        build(recipe, method=method("probe"), **changes, client__reuse_frozen=True)


def test_wrong_uses_are_one_line(recipe, tmp_path, capsys):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"method": "probe"}))
    for changes, word in (
        ((), "client.dropout=0"),
        (("client.dropout=0", "engine.name=stacked"), "engine.name=serial"),
        (("client.reuse_frozen=2",), "client.reuse_frozen"),
    ):
        assert federa("run", path, "client.reuse_frozen=true", *changes, "--out", tmp_path / "run") == 2
        said = capsys.readouterr().err.strip()
        assert word in said and "client.reuse_frozen" in said and "\n" not in said


def bert(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **sizes, intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes
    )
    model = transformers.BertForSequenceClassification(config).requires_grad_(requires_grad=False)
    model.classifier.requires_grad_(requires_grad=True)
    return model


HEAD = frozenset({"classifier.weight", "classifier.bias"})


def test_a_model_that_reads_below_is_refused():
    """Its head sees what the first layer said, which is not computed any more."""
    model, said = bert(), []
    assert frozen_prefix(model, HEAD) is not None
    model.bert.encoder.layer[0].register_forward_hook(
        lambda module, given, out: said.append(out[..., 0].square().mean())
    )
    model.classifier.register_forward_hook(lambda module, given, out: out + said[-1])
    with pytest.raises(
        FederaError, match=r"^client\.reuse_frozen: BertFor.* says something else .* to false$"
    ):
        frozen_prefix(model, HEAD)
    said.clear()
    model.classifier.register_forward_hook(lambda module, given, out: 1 / 0)
    with pytest.raises(FederaError, match=r"^client\.reuse_frozen: .*ZeroDivisionError"):
        frozen_prefix(model, HEAD)


def test_layers_that_mix_texts_are_refused():
    model = bert()
    model.bert.encoder.layer[0].register_forward_hook(lambda module, given, out: out + out.mean(0))
    with pytest.raises(FederaError, match="says something else"):
        frozen_prefix(model, HEAD)


def test_a_model_without_layers_is_refused():
    with pytest.raises(
        FederaError, match=r"^client\.reuse_frozen: Linear is not one list of layers; set it to false$"
    ):
        frozen_prefix(nn.Linear(2, 2), HEAD)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_it_ends_below_the_lowest_layer_that_trains(depth):
    model = bert()
    if depth < 3:
        model.bert.encoder.layer[depth].output.dense.bias.requires_grad_()
    found = frozen_prefix(model, HEAD)
    assert (found is None) == (depth == 0)
    if depth:
        assert len(found._below) == depth + 1
        assert len(found._above) == 3 - depth + 2


def test_what_trains_before_the_layers_leaves_nothing_to_reuse():
    model = bert()
    model.bert.embeddings.LayerNorm.bias.requires_grad_()
    assert frozen_prefix(model, HEAD) is None


@pytest.mark.parametrize("depth", [1, 2])
def test_the_convolution_of_a_large_deberta_stays_where_it_is(depth):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(
        **sizes, intermediate_size=16, conv_kernel_size=3, relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.DebertaV2ForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            ("encoder" not in name and "embeddings" not in name) or f"layer.{depth}." in name
        )
    head = frozenset(n for n, _ in model.named_parameters() if not n.startswith("deberta."))
    assert frozen_prefix(model, head) is not None
