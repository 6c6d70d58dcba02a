"""What leaves a run opens elsewhere and says the same; what cannot leave is refused and leaves nothing behind."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from federa.checkpoint import RunDirectory
from federa.config import parse_config, read_yaml
from federa.data.datasets import read_splits
from federa.experiment import build_experiment
from federa.export import _top_modules, export, load, read_examples
from federa.methods import METHODS as REGISTRY
from federa.models import ModelConfig, load_pretrained
from federa.run import run
from federa.seeds import seed_for
from federa.state import load_state
from federa.types import FederaError
from running import short_reports

TEXTS = [
    "the match goal of the team",
    "soup and bread",
    "a new phone chip for the screen of it",
    "cup",
    "x y z",
]
FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "modernbert")
METHODS = {
    "federa": {"name": "federa", "rank": 4},
    "federa-scaled": {"name": "federa", "rank": 4, "alpha": 10},
    "federa-minor": {"name": "federa", "rank": 3, "alpha": 2, "components": "minor", "targets": "all-linear"},
    "lora": {"name": "lora", "rank": 4, "alpha": 10},
    "rslora": {"name": "lora", "rank": 4, "alpha": 6, "rslora": True},
    "dora": {"name": "lora", "rank": 4, "alpha": 6, "dora": True, "targets": ["query", "ffn_output"]},
    "frozen-head": {"name": "federa", "rank": 4, "alpha": 10, "head": "freeze"},
    "adapter": {"name": "adapter", "width": 8},
    "bitfit": {"name": "bitfit"},
    "ft": {"name": "ft"},
    "probe": {"name": "probe"},
    "local": {"name": "lora", "rank": 4, "head": "local"},
}


@pytest.fixture(scope="module")
def base_of(encoder, tmp_path_factory):
    """Return a function from a family to a checkpoint of large matrices and random biases.

    Fresh ones are so small, or zero, that logits hardly depend on the encoder: any export would pass.
    """
    made = {}

    def get(family):
        if family not in made:
            made[family] = shutil.copytree(encoder(family), tmp_path_factory.mktemp("base") / family)
            model = transformers.AutoModel.from_pretrained(made[family])
            torch.manual_seed(0)
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight.mul_(10)
                        if module.bias is not None:
                            module.bias.normal_(std=0.2)
            model.save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def trained(base_of, train_csv, test_csv, tmp_path_factory):
    """Return a function from a method and a family to a run that has moved far from its start."""
    made = {}

    def get(method, family="bert", model=None):
        key = (method, family, model)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / f"{method}-{family}"
            recipe = {
                "rounds": 3,
                "cohort": 3,
                "evaluate_every": 0,
                "model": {"name": str(model or base_of(family))},
                "data": {"train": str(train_csv), "test": str(test_csv), "max_train": 90, "max_test": 9},
                "task": {"max_length": 32},
                "method": METHODS[method],
                "partition": {"name": "iid", "clients": 3},
                "client": {"batch_size": 4, "lr": 0.003 if method == "ft" else 0.02, "precision": "fp32"},
                "engine": {"name": "serial", "threads": 1},
            }
            run(parse_config(recipe), made[key])
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        short_reports(patch)
        yield get


@pytest.fixture()
def own_run(trained, base_of, tmp_path):
    """Return a function from a method to a run, and a base model, that a test may spoil."""

    def get(method="federa"):
        base = shutil.copytree(base_of("bert"), tmp_path / "base")
        folder = shutil.copytree(trained(method), tmp_path / "run")
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(str(base_of("bert")), str(base)))
        return folder, base

    return get


def logits_of(model, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def expected_logits(folder, base_of, family="bert"):
    """Return the run's logits, having made sure that all that it trained has moved them."""
    predictor = load(folder)
    logits = torch.cat(list(predictor.outputs(TEXTS)))
    start = load_pretrained(
        ModelConfig(name=str(base_of(family))),
        "AutoModelForSequenceClassification",
        predictor.labels,
        seed=seed_for(0, "head"),
    )
    head_only = {n: p for n, p in predictor.model.named_parameters() if n in start.head}
    start.model.load_state_dict(head_only, strict=False)
    moved = (logits - logits_of(start.model, base_of(family))).abs().max()
    assert moved > 0.01, "the encoder's part has moved, not the head alone"
    return logits


# peft


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("federa-scaled", family) for family in FAMILIES),
        *((method, "bert") for method in ("federa", "federa-minor", "lora", "rslora", "dora", "frozen-head")),
        ("dora", "deberta-v2"),
        ("lora", "modernbert"),
    ],
)
def test_peft_opens_it_on_the_pristine_base(trained, base_of, tmp_path, method, family):
    peft = pytest.importorskip("peft")
    folder = trained(method, family)
    expected = expected_logits(folder, base_of, family)
    target = export(folder, tmp_path / "adapter", "peft")
    assert target == tmp_path / "adapter"

    base = transformers.AutoModelForSequenceClassification.from_pretrained(base_of(family), num_labels=3)
    model = peft.PeftModel.from_pretrained(base, target)
    torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)

    plain = model.merge_and_unload()
    torch.testing.assert_close(logits_of(plain, target), expected, atol=1e-4, rtol=0)


def test_auto_peft_finds_the_base_by_itself(trained, base_of, tmp_path):
    peft = pytest.importorskip("peft")
    target = export(trained("federa-scaled"), tmp_path / "adapter")
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(target, num_labels=3)
    expected = expected_logits(trained("federa-scaled"), base_of)
    torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)


def test_a_new_pooler_travels_in_the_adapter(trained, base_of, tmp_path):
    peft = pytest.importorskip("peft")
    bare = tmp_path / "bare"
    transformers.BertModel.from_pretrained(base_of("bert"), add_pooling_layer=False).save_pretrained(bare)
    transformers.AutoTokenizer.from_pretrained(base_of("bert")).save_pretrained(bare)
    folder = trained("federa-scaled", "bert", model=bare)
    target = export(folder, tmp_path / "adapter")
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    torch.manual_seed(99)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bare, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, target)
    expected = torch.cat(list(load(folder).outputs(TEXTS)))
    torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)


def test_a_pooler_that_was_trained_travels_in_the_adapter(trained, base_of, tmp_path):
    peft = pytest.importorskip("peft")
    folder = trained("federa-scaled")
    target = export(folder, tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(base_of("bert"), num_labels=3)
    before = base.bert.pooler.dense.weight.detach().clone()
    model = peft.PeftModel.from_pretrained(base, target)
    predictor = load(folder)
    assert (predictor.model.bert.pooler.dense.weight - before).abs().max() > 1e-3
    expected = torch.cat(list(predictor.outputs(TEXTS)))
    torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)


def test_the_adapter_of_federa_has_twice_the_rank_and_the_same_scale(trained, tmp_path):
    """s*B*A - s*B0*A0 as one product: [B | -B0] [A ; A0]."""
    for method, rank, alpha in (("federa-scaled", 8, 20), ("lora", 4, 10)):
        config = json.loads((export(trained(method), tmp_path / method) / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, alpha)
        assert config["modules_to_save"] == ["bert.pooler", "classifier"]


def test_a_plugin_with_lora_layers_is_exported_too(recipe, tmp_path):
    peft = pytest.importorskip("peft")
    examples = Path(__file__).parent.parent / "examples"
    raw = {**recipe, "method": {"name": "ffa_lora", "rank": 4}, "plugins": ["plugin_method.py"]}
    raw["client"] = {**recipe["client"], "lr": 0.05}
    try:
        run(parse_config(raw, examples), tmp_path / "run")
        target = export(tmp_path / "run", tmp_path / "adapter", "peft")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            recipe["model"]["name"], num_labels=3
        )
        expected = torch.cat(list(load(tmp_path / "run").outputs(TEXTS)))
        model = peft.PeftModel.from_pretrained(base, target)
        torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)
    finally:
        REGISTRY._classes.pop("ffa_lora", None)
        sys.modules.pop("federa_plugin_plugin_method", None)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert"])
def test_top_modules(base_of, family):
    loaded = load_pretrained(
        ModelConfig(name=str(base_of(family))), "AutoModelForSequenceClassification", ["a", "b"], seed=0
    )
    expected = {
        "bert": ["bert.pooler", "classifier"],
        "deberta-v2": ["pooler", "classifier"],
        "distilbert": ["pre_classifier", "classifier"],
        "modernbert": ["head", "classifier"],
    }
    assert _top_modules(loaded.model, loaded.head) == expected.get(family, ["classifier"])


# merged


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("federa-scaled", family) for family in FAMILIES),
        *((m, "bert") for m in ("federa-minor", "lora", "rslora", "dora", "bitfit", "ft", "frozen-head")),
    ],
)
def test_merged_is_a_plain_checkpoint(trained, base_of, tmp_path, method, family):
    folder = trained(method, family)
    target = export(folder, tmp_path / "merged", "merged")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        target, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__module__.startswith("transformers.")
    assert model.config.id2label == {0: "food", 1: "sport", 2: "tech"}
    expected = expected_logits(folder, base_of, family)
    torch.testing.assert_close(logits_of(model, target), expected, atol=1e-5, rtol=0)
    assert not [f.name for f in target.iterdir() if "adapter" in f.name]


def test_merged_works_in_a_pipeline(trained, tmp_path):
    folder = trained("federa-scaled")
    classify = transformers.pipeline(
        "text-classification", str(export(folder, tmp_path / "merged", "merged"))
    )
    ours = list(load(folder).predict(TEXTS))
    for theirs, answer in zip(classify(TEXTS), ours, strict=True):
        assert theirs["label"] == answer["label"]
        assert theirs["score"] == pytest.approx(answer["probability"], abs=1e-5)


# federa's own


def test_the_own_format_opens_with_federa_load(trained, tmp_path):
    folder = trained("adapter")
    target = export(folder, tmp_path / "own")
    expected, found = (torch.cat(list(load(f).outputs(TEXTS))) for f in (folder, target))
    assert torch.equal(found, expected)
    assert not (target / "metrics.jsonl").exists()
    again = export(target, tmp_path / "again")
    assert torch.equal(torch.cat(list(load(again).outputs(TEXTS))), expected)


def test_the_default_format_is_the_methods_first(trained, tmp_path):
    files = {
        "federa": "adapter_model.safetensors",
        "lora": "adapter_model.safetensors",
        "adapter": "init.safetensors",
        "bitfit": "model.safetensors",
        "ft": "model.safetensors",
        "probe": "model.safetensors",
    }
    for method, file in files.items():
        assert (export(trained(method), tmp_path / method) / file).is_file(), method


# What is refused


def refused(message, target, *args):
    before = sorted(p.name for p in target.parent.iterdir()) if target.parent.exists() else None
    with pytest.raises(FederaError, match=message) as error:
        export(*args[:1], target, *args[1:])
    assert "\n" not in str(error.value)
    after = sorted(p.name for p in target.parent.iterdir()) if target.parent.exists() else None
    assert before == after, "nothing is written"


@pytest.mark.parametrize(
    ("method", "format", "known"),
    [
        ("adapter", "peft", "federa"),
        ("adapter", "merged", "federa"),
        ("bitfit", "peft", "merged"),
        ("ft", "federa", "merged"),
        ("federa", "federa", "peft or merged"),
        ("lora", "onnx", "peft or merged"),
    ],
)
def test_formats_that_a_method_does_not_have(trained, tmp_path, method, format, known):
    name = METHODS[method]["name"]
    message = rf"^--format {format}: method '{name}' can be exported as {known}$"
    refused(message, tmp_path / "out", trained(method), format)


def test_a_target_that_is_not_empty(trained, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    refused(r"^--to .*out is not empty; give another folder$", target, trained("federa"))
    assert [f.name for f in target.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("keep")
    refused("is not empty", tmp_path / "file", trained("federa"))
    assert (tmp_path / "file").read_text() == "keep"


def test_an_empty_target_and_deep_ones_are_taken(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert (export(trained("federa"), target) / "adapter_config.json").is_file()
        assert [f.name for f in target.parent.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_failure_in_the_middle_leaves_nothing(trained, tmp_path, monkeypatch, format):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export(trained("federa"), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_local_heads_have_no_global_model(trained, tmp_path):
    refused("with method.head=local every client has its own head", tmp_path / "out", trained("local"))
    with pytest.raises(FederaError, match="there is no global model"):
        load(trained("local"))


def test_another_base_is_refused(own_run, tmp_path):
    folder, base = own_run()
    assert list(load(folder).outputs(TEXTS))
    model = transformers.AutoModel.from_pretrained(base)
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight[0, 0] += 1e-4
    model.save_pretrained(base)
    refused("is not the model that .* was started from", tmp_path / "out", folder)
    with pytest.raises(FederaError, match="the fingerprint of its weights differs"):
        load(folder)


def test_a_base_that_is_gone_is_refused(own_run, tmp_path):
    folder, base = own_run()
    shutil.rmtree(base)
    refused(r"^model\.name: the folder .* does not exist$", tmp_path / "out", folder)


def test_folders_that_are_no_finished_runs(own_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("is not a run directory", tmp_path / "out", empty)
    refused("is not a run directory", tmp_path / "out", tmp_path / "nowhere")
    folder, _ = own_run()
    (folder / "checkpoint" / "state.safetensors").unlink()
    refused("has no finished round yet; run it on with: federa run --resume", tmp_path / "out", folder)


@pytest.mark.parametrize("file", ["init.safetensors", "checkpoint/state.safetensors"])
def test_damaged_files_are_refused(own_run, tmp_path, file):
    folder, _ = own_run()
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    refused("is not a whole safetensors file", tmp_path / "out", folder)


# Predictions


def test_predictions_are_the_softmax_of_the_logits(trained):
    predictor = load(trained("federa-scaled"))
    logits = torch.cat(list(predictor.outputs(TEXTS, batch_size=2)))
    assert logits.shape == (5, 3)
    torch.testing.assert_close(logits, torch.cat(list(predictor.outputs(TEXTS))), atol=1e-5, rtol=0)
    for answer, row in zip(predictor.predict(TEXTS, batch_size=2), logits, strict=True):
        assert answer["label"] == ["food", "sport", "tech"][int(row.argmax())]
        assert answer["probability"] == pytest.approx(float(row.softmax(0).max()), abs=1e-5)
    assert list(predictor.predict([])) == []


@pytest.mark.parametrize("odd", [3, None, ["a", "b"], {"text": 3}, {"text": ["a"]}])
def test_an_example_of_another_kind_is_named(trained, odd):
    predictor = load(trained("federa-scaled"))
    with pytest.raises(FederaError, match=r"^example 1: ") as error:
        list(predictor.predict(["a text", odd]))
    assert "\n" not in str(error.value)


def test_a_line_is_a_text(tmp_path):
    texts = ["one\u2028two", "form\x0cfeed\x85", "three"]
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\r\n")
    assert read_examples(tmp_path / "texts.txt", ("text",)) == texts


def test_predictions_leave_gradients_and_modes_of_the_caller_alone(trained):
    predictor = load(trained("federa-scaled"))
    for _ in predictor.outputs(TEXTS, batch_size=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert not predictor.model.training


def test_predictions_are_those_that_the_run_measured(trained):
    """Evaluation inside the run and prediction from its folder: the same logits, the same order of labels."""
    folder = trained("federa-scaled")
    config = parse_config(read_yaml(folder / "config.yaml"))
    experiment = build_experiment(config, load_state(folder / "init.safetensors")[0])
    params = RunDirectory(folder).load_checkpoint().params
    rows = np.arange(len(experiment.evaluation))
    measured = torch.from_numpy(np.stack(next(experiment.predict(params, [rows]))))
    table = read_splits(config.data, config.task).evaluation
    predictor = load(folder)
    torch.testing.assert_close(
        torch.cat(list(predictor.outputs(list(table["text"])))), measured, atol=1e-5, rtol=0
    )
    assert [predictor.labels[i] for i in experiment.evaluation.targets["labels"]] == list(table["label"])


def test_a_text_longer_than_the_model_is_cut_as_in_training(own_run):
    """The recipe may ask for more tokens than the model has positions for."""
    folder, _ = own_run()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("max_length: 32", "max_length: 4096"))
    predictor = load(folder)
    assert predictor.task.max_length == 4096
    (logits,) = predictor.outputs(["goal " * 500])
    assert torch.isfinite(logits).all()


def test_pairs_of_texts(trained):
    predictor = load(trained("federa-scaled"))
    for wrong in ([("goal team", "soup cook")], [{"words": "goal"}], [3]):
        with pytest.raises(FederaError, match="example 0: this run reads text, got"):
            list(predictor.predict(wrong))
    data = predictor.data.model_copy(update={"text_pair_column": "second"})
    two = dataclasses.replace(predictor, columns=("text", "second"), data=data)
    (pairs,) = two.outputs([("goal team", "soup cook"), {"second": "bread", "text": "goal"}])
    (joined,) = predictor.outputs(["goal team [SEP] soup cook", "goal [SEP] bread"])
    assert pairs.shape == (2, 3)
    torch.testing.assert_close(pairs, joined, atol=1e-5, rtol=0)
