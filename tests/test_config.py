"""Recipes: what scripts rely on, defaults, overrides, YAML there and back, and what is refused."""

from pathlib import Path

import pytest
import yaml

from federa import FederaError, RunConfig, load_config
from federa.config import REGISTRIES, parse_config, parse_override, read_yaml, set_key

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "grid" not in read_yaml(path))
REQUIRED = {("partition", "natural"): {"column": "author"}}
COMPONENTS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]

# Names that scripts use, with their defaults; None where the default is another component's or none.
CONTRACT = {
    "seed": 0, "rounds": 15, "cohort": 5, "evaluate_every": 1, "final_mean_of": 1, "min_success": 0.5,
    "target": None, "track": (),
    "device": "auto",
    "model.name": "minilm",
    "data.train": "bbc_news", "data.validation": None, "data.test": None, "data.text_column": "text",
    "data.label_column": "label",
    "task.name": "classification", "task.max_length": 128,
    "method.name": "federa", "method.rank": 32, "method.alpha": None, "method.targets": ("query", "value"),
    "method.head": "train",
    "partition.name": "dirichlet", "partition.clients": 20, "partition.alpha": 0.5, "partition.min_examples": 1,
    "client.epochs": 1, "client.max_steps": None, "client.batch_size": 16, "client.lr": 3e-3, "client.head_lr": None,
    "client.optimizer": "adamw", "client.weight_decay": 0.0, "client.dropout": None, "client.precision": "auto",
    "aggregator.name": "mean", "server_optimizer.name": "sgd", "engine.name": "serial",
}  # fmt: skip


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", CONTRACT)
def test_keys_that_scripts_rely_on(key):
    assert value_of(RunConfig(), key) == CONTRACT[key]
    assert value_of(load_config(), key) == CONTRACT[key]


def test_engine_workers_is_a_key_of_processes():
    assert load_config(None, ["engine.name=processes", "engine.workers=2"]).engine.workers == 2


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids="-".join)
def test_every_component_survives_yaml(kind, name):
    fields = REQUIRED.get((kind, name), {})
    config = parse_config({kind: {"name": name, **fields}, "cohort": 2})
    assert getattr(config, kind).name == name
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config and again.to_yaml() == config.to_yaml()
    assert type(getattr(again, kind)) is type(getattr(config, kind)) is REGISTRIES[kind].get(name)
    if not fields:
        assert parse_config({kind: name, "cohort": 2}) == config, (
            "a bare name is the component with its defaults"
        )


def test_a_recipe_with_everything_changed_survives_yaml():
    raw = {
        "seed": 7, "rounds": 9, "cohort": 3, "evaluate_every": 0, "min_success": 0.9, "max_update_norm": 12.5,
        "target": 0.75, "track": ["tensorboard"], "device": "cpu", "evaluate_batch_size": 5,
        "model": {"name": "roberta-base", "revision": "abc"},
        "data": {"train": "a: b.csv", "test": "ü.csv", "text_column": "yes", "label_column": "1", "max_train": 10},
        "method": {"name": "lora", "rank": 3, "alpha": 6.5, "targets": "all-linear", "rslora": True, "head": "local"},
        "client": {"lr": 1e-5, "head_lr": 1e-3, "schedule": "cosine", "warmup_rounds": 2, "max_steps": 4,
                   "dropout": 0.0, "precision": "bf16", "optimizer": "sgd", "momentum": 0.9, "proximal": 0.1},
        "partition": {"name": "pathological", "clients": 8, "classes_per_client": 3, "min_examples": 2},
        "aggregator": {"name": "trimmed_mean", "trim": 0.2},
        "server_optimizer": {"name": "yogi", "lr": 0.5, "tau": 1e-4},
        "engine": {"name": "processes", "workers": 3, "threads": 1},
    }  # fmt: skip
    config = parse_config(raw)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    dumped = config.model_dump(mode="json")
    for key, value in raw.items():
        assert dumped[key] == value or value.items() <= dumped[key].items(), key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_of_the_repository_parse(recipe):
    config = load_config(recipe)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_numbers_that_yaml_reads_as_text(tmp_path):
    (tmp_path / "r.yaml").write_text("client:\n  lr: 1e-5\n  weight_decay: 1e-2\n")
    assert isinstance(read_yaml(tmp_path / "r.yaml")["client"]["lr"], str)
    config = load_config(tmp_path / "r.yaml", ["client.head_lr=2e-4"])
    assert (config.client.lr, config.client.weight_decay, config.client.head_lr) == (1e-5, 1e-2, 2e-4)


@pytest.mark.parametrize(
    ("method", "lr"), [("federa", 3e-3), ("lora", 3e-3), ("adapter", 3e-3), ("bitfit", 3e-3), ("ft", 1e-4)]
)
def test_the_learning_rate_is_the_methods_own_unless_it_is_given(method, lr):
    assert load_config(None, [f"method.name={method}"]).client.lr == lr
    assert load_config(None, [f"method.name={method}", "client.lr=0.5"]).client.lr == 0.5


def test_sections_whose_keys_are_all_commented_out(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\nclient:\n  # lr: 1\nmethod:\ndata:\npartition:\n")
    assert load_config(tmp_path / "r.yaml") == RunConfig(seed=1)
    (tmp_path / "r.yaml").write_text("method:\n  rank: 8\npartition:\n  clients: 9\n")
    config = load_config(tmp_path / "r.yaml")
    assert (config.method.name, config.method.rank) == ("federa", 8)
    assert (config.partition.name, config.partition.clients) == ("dirichlet", 9)


# overrides

LORA = {
    "method": {"name": "lora", "rank": 8, "alpha": 4, "rslora": True, "head": "local"},
    "client": {"lr": 0.01},
}


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (["method.name=bitfit"], {"name": "bitfit", "head": "local"}),
        (["method=bitfit"], {"name": "bitfit", "head": "local"}),
        (["method.name=federa"], {"name": "federa", "rank": 8, "alpha": 4.0, "head": "local"}),
        (
            ["method.name=federa", "method.rank=2"],
            {"name": "federa", "rank": 2, "alpha": 4.0, "head": "local"},
        ),
        (
            ["method.rank=2", "method.name=federa"],
            {"name": "federa", "rank": 2, "alpha": 4.0, "head": "local"},
        ),
        (["method.width=3", "method.name=adapter"], {"name": "adapter", "width": 3, "head": "local"}),
        (["method.name=lora"], {"name": "lora", "rank": 8, "alpha": 4.0, "rslora": True, "head": "local"}),
        (["method.head=freeze"], {"name": "lora", "rank": 8, "rslora": True, "head": "freeze"}),
    ],
    ids=" ".join,
)
def test_a_new_name_keeps_the_keys_that_both_know(tmp_path, overrides, method):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(LORA))
    config = load_config(tmp_path / "r.yaml", overrides)
    found = config.method.model_dump()
    assert method.items() <= found.items()
    default = type(config.method)().model_dump()
    assert {k: v for k, v in found.items() if k not in method and k != "alpha"} == {
        k: v for k, v in default.items() if k not in method and k != "alpha"
    }, "nothing else was changed"
    assert config.client.lr == 0.01


def test_a_key_that_the_new_name_does_not_know_is_refused_if_it_was_typed(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(LORA))
    with pytest.raises(FederaError, match=r"unknown key 'method.rank'; known: name, head"):
        load_config(tmp_path / "r.yaml", ["method.name=bitfit", "method.rank=4"])


def test_a_bare_model_or_data_set_is_its_name():
    config = load_config(None, ["model=roberta-base", "data=ag_news"])
    assert (config.model.name, config.data.train) == ("roberta-base", "ag_news")


def test_paths_that_exist_become_absolute_from_the_recipes_folder_or_the_current_one(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text("text,label")
    (tmp_path / "here" / "only.csv").write_text("text,label")
    (tmp_path / "there" / "r.yaml").write_text(
        "data: {train: train.csv, test: only.csv}\nmodel: {name: minilm}\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(Path("../there/r.yaml"))
    assert config.data.train == str(tmp_path / "there" / "train.csv"), "beside the recipe first"
    assert config.data.test == str(tmp_path / "here" / "only.csv"), "else from where we are"
    assert config.model.name == "minilm" and RunConfig().data.train == "bbc_news"
    typed = load_config(Path("../there/r.yaml"), ["data.train=train.csv"])
    assert typed.data.train == str(tmp_path / "here" / "train.csv"), (
        "what is typed means what the shell means"
    )
    assert load_config(None, ["data.train=nowhere.csv"]).data.train == "nowhere.csv"


def test_partition_keys_follow_the_same_rule():
    config = load_config(None, ["partition.name=iid", "partition.clients=7"])
    assert config.partition.model_dump() == {"clients": 7, "min_examples": 1, "name": "iid"}


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("rounds=30", ("rounds", 30)),
        (" rounds =30", ("rounds", 30)),
        ("method.targets=[query, key]", ("method.targets", ["query", "key"])),
        ("data.train=a=b.csv", ("data.train", "a=b.csv")),
        ("target=", ("target", None)),
        ("client.dropout=null", ("client.dropout", None)),
        ("model.name='1'", ("model.name", "1")),
    ],
)
def test_overrides_are_yaml(text, pair):
    assert parse_override(text) == pair


def test_replace_is_a_validated_copy():
    config = RunConfig()
    other = config.replace(**{"method.name": "lora", "rounds": 3, "partition.alpha": 0.1})
    assert (other.method.name, other.rounds, other.partition.alpha) == ("lora", 3, 0.1)
    assert (config.method.name, config.rounds, config.partition.alpha) == ("federa", 15, 0.5)
    with pytest.raises(FederaError, match="rounds: input should be greater"):
        config.replace(rounds=0)
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


def test_set_key_makes_sections():
    raw = {"method": "lora"}
    set_key(raw, "method.rank", 3)
    set_key(raw, "client.lr", 1.0)
    assert raw == {"method": {"name": "lora", "rank": 3}, "client": {"lr": 1.0}}


# refusals

REFUSED = [
    (["cohrt=3"], "unknown key 'cohrt' (did you mean 'cohort'?); known: plugins, seed, rounds, cohort,"),
    (["method.rnak=3"], "unknown key 'method.rnak' (did you mean 'rank'?); known: name, head, rank,"),
    (["client.learning_rate=3"], "unknown key 'client.learning_rate'"),
    (["client.batchsize=3"], "unknown key 'client.batchsize' (did you mean 'batch_size'?)"),
    (["data.text=3"], "unknown key 'data.text' (did you mean 'test'?)"),
    (["method.name=lroa"], "unknown method 'lroa' (did you mean 'lora'?); known: adapter, bitfit, federa,"),
    (["method.name=[lora]"], "unknown method ['lora']"),
    (["engine.name=spark"], "unknown engine 'spark'"),
    (["aggregator=krum"], "unknown aggregator 'krum'"),
    (["track=wandbb"], "track: unknown tracker 'wandbb'"),
    (
        ["final_mean_of=4", "evaluate_every=5"],
        "final_mean_of: expected at most 3, the evaluations that rounds=15 and evaluate_every=5 make, got 4",
    ),
    (["final_mean_of=2", "evaluate_every=0"], "final_mean_of: expected at most 1"),
    (["cohort=21"], "cohort: 21 clients a round, but partition.clients is 20"),
    (["partition.name=natural"], "partition.column: a value is needed"),
    (["rounds=0"], "rounds: input should be greater than or equal to 1, got 0"),
    (["rounds=few"], "rounds: input should be a valid integer"),
    (["client.lr=-1"], "client.lr: input should be greater than 0, got -1"),
    (["client.lr=.nan"], "client.lr: input should be a finite number, got nan"),
    (["client.precision=fp16"], "client.precision: input should be 'auto', 'fp32' or 'bf16', got 'fp16'"),
    (["target=.nan"], "target: input should be a finite number"),
    (["device=gpu"], "device: input should be 'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"),
    (["method.targets=query"], "method.targets: input should be a list, got 'query'"),
    (["engine.threads=0"], "engine.threads: input should be greater than or equal to 1"),
    (["seed.x=1"], "seed: input should be a valid integer"),
    (["rounds=1", "rounds.x=1"], "override rounds.x: 'rounds' is a value, not a section"),
    (["rounds=[1"], "override 'rounds=[1': the value is not YAML"),
    (["=3"], "override '=3': expected key=value"),
    (["plugins=mine.py"], "plugins: expected a list of file or module names"),
    (["plugins=[3]"], "plugins: expected a list of file or module names"),
    (["client=3"], "client: input should be"),
    (["model=7"], "model: input should be"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(FederaError) as raised:
        load_config(None, overrides)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["3", "- a", "a: [", "\t", "", "a: b: c", "\x00"])
def test_files_that_are_no_recipes(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FederaError) as raised:
        load_config(tmp_path / "r.yaml")
    assert str(raised.value).startswith(f"recipe: {tmp_path}/r.yaml") and "\n" not in str(raised.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(FederaError, match="recipe: "):
            load_config(tmp_path / name)
    with pytest.raises(FederaError, match="keys should be strings"):
        parse_config({1: 2})
    with pytest.raises(FederaError, match="a recipe is a mapping"):
        parse_config([1])


def test_plugins_are_loaded_before_the_names_that_they_bring(tmp_path, monkeypatch):
    (tmp_path / "my_median.py").write_text(
        "from typing import Literal\nfrom federa.aggregators import AGGREGATORS, Aggregator\n"
        "@AGGREGATORS.register\nclass Mine(Aggregator):\n    '''Mine.'''\n    name: Literal['mine'] = 'mine'\n    a: int = 1\n"
        "    def init(self, params): ...\n    def accumulate(self, accumulator, update): ...\n"
        "    def finish(self, accumulator): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["aggregator.a=3", "aggregator.name=mine", "plugins=[my_median.py]"])
    assert (config.aggregator.name, config.aggregator.a) == ("mine", 3)
    assert config.plugins == (str(tmp_path / "my_median.py"),), (
        "absolute, so that the run directory can be moved"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text("plugins: [../my_median.py]\naggregator: mine\n")
    assert load_config(Path("sub/r.yaml")).plugins == config.plugins, "relative to the recipe"


def test_another_method_gets_its_own_default_rate_unless_one_was_given():
    from federa import RunConfig

    default = RunConfig()
    assert default.replace(**{"method.name": "ft"}).client.lr == 1e-4 != default.client.lr
    given = RunConfig(client={"lr": 7e-3})
    assert given.replace(**{"method.name": "ft"}).client.lr == 7e-3
    assert default.replace(**{"method.name": "ft", "client.lr": 2e-4}).client.lr == 2e-4
