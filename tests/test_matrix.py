"""Every backbone family x task x method: trains, resumes, is exported, and says the same where it is opened again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from families import FAMILIES, build_family, build_with_spm
from federa.checkpoint import RunDirectory
from federa.config import parse_config
from federa.data.datasets import Table
from federa.experiment import build_experiment
from federa.export import export, load
from federa.methods.targets import find_targets
from federa.run import Observer, run
from federa.types import FederaError
from running import same, short_reports
from small import TASKS, write_task

METHODS = {
    "federa": {"name": "federa", "rank": 4, "alpha": 6},
    "lora": {"name": "lora", "rank": 4, "targets": "all-linear"},
    "adapter": {"name": "adapter", "width": 8},
    "bitfit": {"name": "bitfit"},
    "ft": {"name": "ft"},
}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = build_family(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    made = {}

    def get(task):
        if task not in made:
            made[task] = write_task(tmp_path_factory.mktemp("data") / task, task)
        return made[task]

    return get


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch):
    short_reports(monkeypatch)


class Stop(Observer):
    """Ends a run after its first round, as Ctrl-C would."""

    def finished_round(self, record):
        raise KeyboardInterrupt


def outputs_of(model, encoded):
    """What a transformers model says of every row, at the places that are no padding."""
    with torch.no_grad():
        inputs = encoded.batch(np.arange(len(encoded)), torch.device("cpu"), labels=False)
        out = model.eval()(**inputs)
    logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)
    if logits.ndim == 2:
        return logits
    return logits * inputs["attention_mask"][:, :, None]


def recipe_of(base, data, task, method, precision="fp32"):
    return parse_config(
        {
            "rounds": 2,
            "cohort": 2,
            "evaluate_every": 0,
            "model": {"name": str(base)},
            "data": {"train": str(data)},
            "task": TASKS[task],
            "method": METHODS[method],
            "partition": {"name": "dirichlet", "clients": 3},
            "client": {
                "batch_size": 4,
                "max_steps": 2,
                "lr": 2e-3 if method == "ft" else 2e-2,
                "precision": precision,
            },
            "engine": {"name": "serial", "threads": 1},
        }
    )


def goes_all_the_way(config, tmp_path):
    """Run, stop, resume, export, and open again; return the folder of the export."""
    base, data, method = config.model.name, Path(config.data.train), config.method.name
    whole = run(config)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", observer=Stop())
    resumed = run(None, tmp_path / "run", resume=True)
    assert same(resumed.state.params, whole.state.params)
    assert whole.summary["metric"] == config.task.primary and 0 <= whole.summary["final"] <= 1

    predictor = load(tmp_path / "run")
    table = Table.from_parquet(str(data / "test.parquet"))
    encoded = config.task.encode(table, config.data, predictor.tokenizer, None)
    expected = outputs_of(predictor.model, encoded)
    assert len(list(predictor.predict([dict(row) for row in table]))) == len(table)

    target = export(tmp_path / "run", tmp_path / "out")
    auto = getattr(transformers, config.task.auto_class)
    pristine = auto.from_pretrained(base, num_labels=len(predictor.labels))
    if method in ("federa", "lora"):
        peft = pytest.importorskip("peft")
        opened = peft.PeftModel.from_pretrained(pristine, target)
    elif method == "adapter":
        opened = load(target).model
    else:
        opened = auto.from_pretrained(target)
        assert opened.config.id2label == dict(enumerate(predictor.labels))
    torch.testing.assert_close(outputs_of(opened, encoded), expected, atol=1e-5, rtol=1e-5)
    # A run that left the encoder where it was would pass all of the above.
    head = {n: p for n, p in predictor.model.named_parameters() if n in predictor_head(config, predictor)}
    untrained = auto.from_pretrained(base, num_labels=len(predictor.labels))
    untrained.load_state_dict(head, strict=False)
    assert (outputs_of(untrained, encoded) - expected).abs().max() > 1e-3
    return target


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_resumes_leaves_and_says_the_same(family_of, data_of, tmp_path, family, task, method):
    config = recipe_of(family_of(family), data_of(task), task, method)
    if (family, method) == ("modernbert", "bitfit"):
        with pytest.raises(FederaError, match="no biases"):
            run(config)
        return
    goes_all_the_way(config, tmp_path)


@pytest.mark.parametrize("method", ["federa", "ft"])
@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_so_does_what_computes_in_bf16(family_of, data_of, tmp_path, family, method):
    """What is opened again, in float32, is what trained, but for the rounding of bf16."""
    config = recipe_of(family_of(family), data_of("classification"), "classification", method, "bf16")
    goes_all_the_way(config, tmp_path)
    experiment, params = build_experiment(config), RunDirectory(tmp_path / "run").load_checkpoint().params
    batches = experiment.batches(np.arange(len(experiment.evaluation)))
    trained = torch.from_numpy(np.concatenate(list(experiment.predict(params, batches)))).float()
    opened = outputs_of(load(tmp_path / "run").model, experiment.evaluation)[np.concatenate(batches)]
    gap = (trained - opened).abs().max()
    assert 0 < gap < 2**-5 * opened.abs().max()


@pytest.mark.parametrize("task", TASKS)
def test_so_does_a_tokenizer_that_is_spm_model_alone(data_of, tmp_path, task):
    """The layout of the published DeBERTaV3."""
    base = build_with_spm(tmp_path / "base")
    assert sorted(f.name for f in base.iterdir() if "token" in f.name or "spm" in f.name) == [
        "spm.model",
        "tokenizer_config.json",
    ]
    config = recipe_of(base, data_of(task), task, "federa")
    assert goes_all_the_way(config, tmp_path).is_dir()
    tokenizer = load(tmp_path / "run").tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("goal")["input_ids"])[:2] == ["[CLS]", "\u2581"]
    assert tokenizer.unk_token_id not in tokenizer("the goal of the team")["input_ids"]


@pytest.mark.parametrize("method", ["federa", "ft"])
def test_a_masked_language_model_is_a_start(family_of, data_of, tmp_path, method):
    """Its output layer, tied to the token embeddings, stays behind; the embeddings are there once, as they were."""
    masked = transformers.BertForMaskedLM.from_pretrained(family_of("bert"))
    assert masked.get_output_embeddings().weight is masked.get_input_embeddings().weight
    base = tmp_path / "base"
    masked.save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(family_of("bert")).save_pretrained(base)
    pretrained = masked.get_input_embeddings().weight.detach().clone()

    config = recipe_of(base, data_of("classification"), "classification", method)
    experiment = build_experiment(config)
    model = experiment.trainer.model
    tables = [n for n, p in model.named_parameters() if p.shape[0] == len(pretrained)]
    assert tables == ["bert.embeddings.word_embeddings.weight"]
    assert torch.equal({**dict(model.named_parameters()), **experiment.params}[tables[0]], pretrained)
    assert not any(name.startswith("cls.") for name, _ in model.named_parameters())

    target = goes_all_the_way(config, tmp_path)
    written = load_file(target / ("adapter_model.safetensors" if method == "federa" else "model.safetensors"))
    sizes = [tensor.shape for tensor in written.values() if len(pretrained) in tensor.shape]
    assert sizes == ([] if method == "federa" else [pretrained.shape]), "and left once, if it trained"


def predictor_head(config, predictor):
    """The parameters outside the encoder, and its pooler's."""
    prefix = predictor.model.base_model_prefix + "."
    return {n for n, _ in predictor.model.named_parameters() if not n.startswith(prefix) or ".pooler." in n}


# The real ones: shapes and counts of published configurations, without their weights

PUBLISHED = {
    # family, hidden, layers, intermediate, heads, vocabulary, positions; parameters of the encoder without a pooler
    "roberta-base": ("roberta", 768, 12, 3072, 12, 50265, 514, 124_055_040),
    "roberta-large": ("roberta", 1024, 24, 4096, 16, 50265, 514, 354_310_144),
    "deberta-v3-base": ("deberta-v2", 768, 12, 3072, 12, 128100, 512, 183_831_552),
    "deberta-v3-large": ("deberta-v2", 1024, 24, 4096, 16, 128100, 512, 434_012_160),
}


def published(name):
    family, hidden, layers, intermediate, heads, vocabulary, positions, _ = PUBLISHED[name]
    usual = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }
    if family == "roberta":
        return transformers.RobertaConfig(**usual, type_vocab_size=1, pad_token_id=1)
    return transformers.DebertaV2Config(
        **usual,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_counts_and_targets(name):
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(published(name))
    hidden, layers, intermediate, count = (PUBLISHED[name][i] for i in (1, 2, 3, 7))
    assert sum(p.numel() for p in model.base_model.parameters()) == count
    chosen = find_targets(model, ["query", "value"])
    assert len(chosen) == 2 * layers
    assert all(tuple(m.weight.shape) == (hidden, hidden) for m in chosen.values())
    everything = find_targets(model, "all-linear")
    assert len(everything) == 6 * layers
    wide = [m for m in everything.values() if intermediate in m.weight.shape]
    assert len(wide) == 2 * layers


def test_the_recipe_of_the_matrix_is_what_people_write(tmp_path):
    """The YAML of a run of another task reads back as it was."""
    config = parse_config({"task": {"name": "qa", "overlap": 32, "group_by": "title"}})
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
