"""The same words name the same matrices in every family."""

import pytest

from federa.methods import FeDeRA, LoRA
from federa.methods.lora import lora_layers
from federa.methods.targets import encoder_linears, find_targets
from federa.types import FederaError

COMMON = ("query", "key", "value", "attention_output", "ffn_input", "ffn_output")
BERT_LIKE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NAMES = {
    "bert": ("bert.encoder.layer", BERT_LIKE),
    "roberta": ("roberta.encoder.layer", BERT_LIKE),
    "electra": ("electra.encoder.layer", BERT_LIKE),
    "deberta-v2": (
        "deberta.encoder.layer",
        tuple(f"{n}_proj" if n.startswith("attention.self") else n for n in BERT_LIKE),
    ),
    "distilbert": (
        "distilbert.transformer.layer",
        (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
    ),
    "modernbert": ("model.layers", ("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
}


@pytest.mark.parametrize("family", NAMES)
def test_common_names(load, family):
    model = load(family).model
    prefix, ends = NAMES[family]
    for word, end in zip(COMMON, ends, strict=True):
        assert list(find_targets(model, [word])) == [f"{prefix}.{layer}.{end}" for layer in (0, 1)], word
    everything = {f"{prefix}.{layer}.{end}" for layer in (0, 1) for end in ends}
    assert set(find_targets(model, "all-linear")) == everything == set(encoder_linears(model))
    assert set(find_targets(model, COMMON)) == everything


@pytest.mark.parametrize("family", NAMES)
def test_all_linear_leaves_pooler_and_head_alone(load, setup_for, family):
    loaded = load(family)
    LoRA(rank=2, targets="all-linear").prepare(loaded.model, setup_for(loaded))
    layers = dict(lora_layers(loaded.model))
    assert len(layers) == (8 if family == "modernbert" else 12)
    assert not [name for name in layers if "pooler" in name or f"{name}.weight" in loaded.head]


def test_the_checkpoints_own_names(load):
    model = load().model
    one = "bert.encoder.layer.1.intermediate.dense"
    assert list(find_targets(model, [one])) == [one]
    assert list(find_targets(model, ["1.intermediate.dense"])) == [one]
    assert list(find_targets(model, ["self.query"])) == list(find_targets(model, ["query"]))
    assert not set(find_targets(model, ["output.dense"])) & set(find_targets(model, ["ffn_input"]))


def test_found_in_the_models_order_and_once(load):
    model = load().model
    found = list(find_targets(model, ["value", "query", "self.query"]))
    assert found == [f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]


@pytest.mark.parametrize(
    "wrong", ["queri", "uery", "quer", "classifier", "pooler.dense", "LayerNorm", "que.y"]
)
def test_an_unknown_target_lists_the_known_ones(load, setup_for, wrong):
    loaded = load()
    with pytest.raises(FederaError) as error:
        FeDeRA(rank=2, targets=("value", wrong)).prepare(loaded.model, setup_for(loaded))
    message = str(error.value)
    assert message.startswith(f"method.targets: {wrong!r} fits no linear map")
    assert "\n" not in message
    for known in (*COMMON, "all-linear", *BERT_LIKE):
        assert known in message
