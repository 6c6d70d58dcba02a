"""A third party's method, partitioner and aggregator: one file each, outside the package, from a recipe."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from federa.aggregators import AGGREGATORS
from federa.config import load_config, parse_config
from federa.data.partition import PARTITIONERS, partition_examples
from federa.export import load
from federa.methods import METHODS, Setup
from federa.registry import load_plugins
from federa.run import run
from federa.testing import check_aggregator, check_method, check_partitioner
from federa.types import FederaError, Job, Update

EXAMPLES = Path(__file__).parent.parent / "examples"
PLUGINS = ("plugin_method.py", "plugin_partition.py", "plugin_aggregator.py")
PARTS = {
    "method": {"name": "ffa_lora", "rank": 4},
    "partition": {"name": "shards", "clients": 6, "per_client": 2},
    "aggregator": {"name": "tempered_mean", "power": 0.25},
}


@pytest.fixture(scope="module", autouse=True)
def _examples():
    """Register the examples for this module only: other tests look at every registered component."""
    load_plugins(PLUGINS, EXAMPLES)
    yield
    for registry, name in ((METHODS, "ffa_lora"), (PARTITIONERS, "shards"), (AGGREGATORS, "tempered_mean")):
        registry._classes.pop(name)
    for plugin in PLUGINS:
        sys.modules.pop(f"federa_plugin_{Path(plugin).stem}")


@pytest.fixture()
def write(tmp_path) -> Callable[[str, str], Path]:
    def to(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to


# The examples


def test_the_examples_keep_their_contracts():
    for fields in ({}, {"rank": 4, "head": "freeze"}, {"rank": 4, "head": "local"}):
        check_method(METHODS.parse({"name": "ffa_lora", **fields}))
    for fields in ({}, {"clients": 7, "per_client": 3, "min_examples": 9}):
        check_partitioner(PARTITIONERS.parse({"name": "shards", **fields}))
    for power in (0, 0.5, 1):
        check_aggregator(AGGREGATORS.parse({"name": "tempered_mean", "power": power}))


@pytest.mark.parametrize("plugin", PLUGINS)
def test_an_example_is_one_short_file(plugin):
    lines = (EXAMPLES / plugin).read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(lines) <= 42 and len(code) < 40


def test_ffa_lora_sends_b_only_and_freezes_a_seeded_a(encoder):
    def prepared(seed):
        torch.manual_seed(0)
        build = transformers.AutoModelForSequenceClassification.from_pretrained
        model = build(encoder("bert"), num_labels=3)
        head = frozenset({"classifier.weight", "classifier.bias"})
        return METHODS.parse(PARTS["method"]).prepare(model, Setup(head, seed)), model

    state, model = prepared(1)
    factors = {name for name in state if "classifier" not in name}
    assert len(factors) == 4 and all(name.endswith("lora_B") for name in factors)
    frozen = {name: p for name, p in model.named_parameters() if name.endswith("lora_A")}
    assert len(frozen) == 4 and all(p.abs().max() > 0 and not p.requires_grad for p in frozen.values())
    again, other = (dict(prepared(seed)[1].named_parameters()) for seed in (1, 2))
    assert all(torch.equal(again[name], p) and not torch.equal(other[name], p) for name, p in frozen.items())


def test_shards_give_each_client_equally_many_rows_of_few_labels():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    parts = partition_examples(PARTITIONERS.parse({"name": "shards", "clients": 30}), groups, seed=3)
    assert {len(part) for part in parts} == {20}
    assert max(len(set(groups[part])) for part in parts) == 2
    other = partition_examples(PARTITIONERS.parse({"name": "shards", "clients": 30}), groups, seed=4)
    assert not all(map(np.array_equal, parts, other))


def test_tempered_mean_by_hand():
    aggregator = AGGREGATORS.parse({"name": "tempered_mean", "power": 0.5})
    accumulator = aggregator.init({"w": torch.zeros(1)})
    for value, weight in ((1.0, 9.0), (5.0, 1.0)):
        update = Update(Job(1, 0, 0, 0.1), {"w": torch.tensor([value])}, weight, {})
        accumulator = aggregator.accumulate(accumulator, update)
    torch.testing.assert_close(aggregator.finish(accumulator)["w"], torch.tensor([(3 * 1.0 + 1 * 5.0) / 4]))


# From a recipe


def test_a_recipe_runs_them(recipe, tmp_path):
    raw = {**recipe, **PARTS, "plugins": [str(EXAMPLES / plugin) for plugin in PLUGINS]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    result = run(load_config(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert [r["round"] for r in result.records] == [1, 2, 3]
    assert all(r["rejected"] == 0 and np.isfinite(r["loss"]) for r in result.records)
    assert not [name for name in result.state.params if "lora_A" in name]
    assert any(tensor.any() for name, tensor in result.state.params.items() if "lora_B" in name)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: {k: stored[key][k] for k in part} for key, part in PARTS.items()} == PARTS
    assert stored["plugins"] == raw["plugins"]
    again = run(None, tmp_path / "run", resume=True)
    assert again.summary == result.summary


def test_a_run_directory_finds_its_plugin_again(recipe, tmp_path, monkeypatch):
    """A fresh process, in any working directory, knows the plugin by its absolute path alone."""
    raw = {**recipe, "rounds": 1, "method": PARTS["method"], "plugins": ["plugin_method.py"]}
    run(parse_config(raw, EXAMPLES), tmp_path / "run")
    METHODS._classes.pop("ffa_lora")
    sys.modules.pop("federa_plugin_plugin_method")
    monkeypatch.chdir("/")
    model = load(tmp_path / "run")
    assert sum("lora_A" in name for name, _ in model.model.named_parameters()) == 4
    assert next(model.predict(["cup goal"]))["label"] in ("food", "sport", "tech")


def test_a_relative_plugin_is_relative_to_the_recipe(recipe, write, monkeypatch, tmp_path):
    write("own.py", (EXAMPLES / "plugin_method.py").read_text().replace("ffa_lora", "own_lora"))
    path = write(
        "recipe.yaml", yaml.safe_dump({**recipe, "method": {"name": "own_lora"}, "plugins": ["own.py"]})
    )
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.plugins == (str(tmp_path / "own.py"),)
    assert config.method.name == "own_lora"
    METHODS._classes.pop("own_lora")


def test_a_plugin_is_loaded_once():
    module = sys.modules["federa_plugin_plugin_method"]
    load_plugins(PLUGINS, EXAMPLES)
    assert sys.modules["federa_plugin_plugin_method"] is module
    assert METHODS.get("ffa_lora") is module.FFALoRA


# What does not fit


def refused(message, plugins, folder=Path("/tmp")):
    with pytest.raises(FederaError, match=message) as error:
        parse_config({"plugins": plugins}, folder)
    assert "\n" not in str(error.value)


def test_plugins_that_are_not_there(tmp_path):
    refused(r"^plugins: .*nowhere\.py does not exist$", ["nowhere.py"], tmp_path)
    refused("^plugins: no module 'federa_nowhere' is installed", ["federa_nowhere"])
    refused("^plugins: expected a list", "plugin_method.py")


def test_a_plugin_that_fails_is_one_line_and_can_be_mended(write, tmp_path):
    write("mine.py", "import federa\nfederra.nothing\n")
    refused(r"^plugins: .*mine\.py fails: NameError: name 'federra' is not defined", ["mine.py"], tmp_path)
    write("mine.py", "class Broken(\n")
    refused(r"^plugins: .*mine\.py fails: SyntaxError", ["mine.py"], tmp_path)
    write("mine.py", "import federa\n")
    parse_config({"plugins": ["mine.py"]}, tmp_path)


def test_a_plugin_that_is_an_installed_module():
    assert parse_config({"plugins": ["json"]}).plugins == ("json",)


def test_two_plugins_of_one_name_are_told_apart(write, tmp_path):
    write("first.py", (EXAMPLES / "plugin_method.py").read_text().replace("ffa_lora", "taken"))
    write("second.py", (EXAMPLES / "plugin_method.py").read_text().replace("ffa_lora", "taken"))
    refused(
        "method 'taken' is registered already, by federa_plugin_first", ["first.py", "second.py"], tmp_path
    )
    METHODS._classes.pop("taken")


def test_an_unknown_component_names_the_nearest():
    with pytest.raises(FederaError, match=r"unknown method 'ffa_lor' \(did you mean 'ffa_lora'\?\)"):
        parse_config({"method": "ffa_lor"})
