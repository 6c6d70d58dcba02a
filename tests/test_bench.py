"""`federa bench`: figures of the right kind, the fastest chosen, and the recipe changed only on request."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml

from federa import bench as module
from federa.bench import Bench, Timing, bench, lines, possible_changes
from federa.config import parse_config
from federa.types import FederaError
from running import build, configure, federa, jobs_of
from small import sentences, small_recipe, write_csv

ENGINE_KEYS = {
    "processes": {"engine.name": "processes", "engine.workers": 2, "engine.threads": 1},
    "serial": {"engine.name": "serial", "engine.threads": 2},
    "stacked": {"engine.name": "stacked", "engine.threads": 2},
}


@pytest.fixture()
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"# mine\n{yaml.safe_dump(recipe)}")
    return path


def measured(engine, best="serial"):
    """What a bench found of a recipe with an engine: bf16 and the one called best are the fastest."""
    result = Bench(2, "cpu", "fused", engine, step_flops=1e9, step_seconds=0.1)
    for precision, rate in (("fp32", 1.0), ("bf16", 2.0)):
        result.peaks.append(Timing(precision, {}, (1e10 * rate,)))
        result.precisions.append(Timing(precision, {"client.precision": precision}, (rate,)))
    result.engines = [Timing(name, keys, (1.0 + (name == best),)) for name, keys in ENGINE_KEYS.items()]
    return result


def test_the_share_is_that_of_the_product_in_the_same_turn():
    result = Bench(2, "cpu", "fused", "serial", step_flops=1e9, step_seconds=0.5)
    result.peaks = [Timing("bf16", {}, (4e9, 8e9, 4e9))]
    result.precisions = [Timing("bf16", {}, (10.0, 20.0, 20.0))]  # half a second is of the median: 10 a step
    assert result.shares("bf16") == [0.25, 0.25, 0.5]


def stub(monkeypatch, best="serial"):
    monkeypatch.setattr(module, "bench", lambda config, *_: measured(config.engine.name, best))


def test_everything_is_measured_and_written_on_request(recipe_file, capsys):
    before = recipe_file.read_text()
    assert federa("bench", recipe_file, "--repeats", 1) == 0
    out = capsys.readouterr().out
    assert recipe_file.read_text() == before
    for word in (
        "GFLOP/s",
        "of that product's pace",
        "engine serial",
        "engine stacked",
        "batch of 8",
        "fastest: client",
    ):
        assert word in out
    assert ("engine processes" in out) == (module.available_cores() > 1)
    assert federa("bench", recipe_file, "--repeats", 1, "--write") == 0
    after, out = recipe_file.read_text(), capsys.readouterr().out
    assert after.startswith("# mine")
    changed = yaml.safe_load(after)
    for title, chosen in (
        ("precision", changed["client"]["precision"]),
        ("engine", changed["engine"]["name"]),
    ):
        assert re.search(rf"^{title} {chosen}.*<- fastest$", out, re.MULTILINE)
    parse_config(changed)  # and it is still a recipe


def test_the_fastest_batch_size_is_written_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    def found(config, *_):
        result = measured(config.engine.name)
        sizes = zip((8, 16, 32), (1.0, 3.0, 2.0), strict=True)
        result.batches = [Timing(str(n), {"client.batch_size": n}, (rate,)) for n, rate in sizes]
        return result

    monkeypatch.setattr(module, "bench", found)
    path = tmp_path / "recipe.yaml"
    path.write_text("client: {batch_size: 64}\n")
    assert federa("bench", path, "--write") == 0
    assert yaml.safe_load(path.read_text())["client"]["batch_size"] == 64
    assert "so it stays (--batch)" in capsys.readouterr().out
    assert federa("bench", path, "--write", "--batch") == 0
    assert yaml.safe_load(path.read_text())["client"]["batch_size"] == 16
    assert federa("bench", path, "--batch") == 2
    assert "needs --write" in capsys.readouterr().err


def test_engines_are_timed_on_clients_of_a_round(recipe, monkeypatch):
    """Of all their sizes, for that is what `stacked` gains or loses by."""
    given = []
    opened = module.Stacked.open

    @contextmanager
    def watched(self, experiment):
        with opened(self, experiment) as session:
            train = session.train
            session.train = lambda params, jobs: given.append(jobs) or train(params, jobs)
            yield session

    monkeypatch.setattr(module.Stacked, "open", watched)
    bench(configure(recipe, cohort=5), lambda what: None, repeats=1)
    experiment = build(recipe, cohort=5)
    assert [job.client_id for job in given[0]] == [job.client_id for job in jobs_of(experiment)]


def test_slow_steps_are_of_fewer_clients_but_two_a_core(recipe, monkeypatch):
    asked = []

    def jobs(config, *_):
        asked.append(config.cohort)
        raise StopIteration

    monkeypatch.setattr(module, "make_jobs", jobs)
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    experiment = build(recipe, partition={"name": "iid", "clients": 40}, cohort=40, device="cpu")
    for seconds in (0.01, 0.5, 60.0):
        with pytest.raises(StopIteration):
            module._engines(experiment, 1, seconds)
    assert asked == [16, 8, 4]


@pytest.mark.parametrize("best", ENGINE_KEYS)
@pytest.mark.parametrize(
    "engine",
    [
        "serial",
        "{name: processes, workers: 2}",
        "{name: stacked, clients: 8}",
        "\n  name: stacked\n  clients: 8",
    ],
)
def test_the_fastest_engine_is_written_without_the_others_keys(tmp_path, monkeypatch, best, engine):
    stub(monkeypatch, best)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"engine: {engine}\nseed: 1\n")
    assert federa("bench", path, "--write") == 0
    config = parse_config(yaml.safe_load(path.read_text()))
    assert config.client.precision == "bf16" and config.seed == 1
    found = {f"engine.{k}": v for k, v in config.engine.model_dump(exclude_none=True).items()}
    assert {k: v for k, v in found.items() if k != "engine.clients"} == ENGINE_KEYS[best]


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\n...\n",
        "client:\n  precision: |-\n    fp32\n  lr: 1.0e-3\n",
        "engine: &e {}\npartition: *e\n",
    ],
)
def test_a_recipe_that_cannot_be_edited_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, text
):
    monkeypatch.setattr(module, "bench", lambda *_: pytest.fail("it measures"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert federa("bench", path, "--write") == 2
    assert "cannot be edited in place; measure without it" in capsys.readouterr().err
    assert path.read_text() == text


def test_an_engine_that_was_not_measured_is_not_rewritten(tmp_path, monkeypatch):
    stub(monkeypatch)
    path = tmp_path / "recipe.yaml"
    path.write_text("engine: {name: ray, workers: 9, address: auto}\nclient: {precision: fp32}\n")
    assert federa("bench", path, "--write") == 0
    assert path.read_text() == ("engine: {name: ray, workers: 9, address: auto}\nclient: {precision: bf16}\n")


@pytest.mark.parametrize(("load", "warns"), [(1.9, False), (2.0, False), (2.5, True)])
def test_a_machine_that_others_keep_busy_is_warned_of(recipe_file, monkeypatch, capsys, load, warns):
    stub(monkeypatch)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert federa("bench", recipe_file) == 0
    said = "warning: the load average is 2.5 on 2 cores: other jobs decide what is measured here\n"
    assert capsys.readouterr().err == (said if warns else "")


def test_what_can_be_chosen(monkeypatch):
    """On a CPU those that fork come first; an accelerator has no use for them."""

    def names(config):
        return list(dict.fromkeys(keys.get("engine.name") for keys in possible_changes(config)))

    monkeypatch.setattr(module, "available_cores", lambda: 4)
    config = parse_config({"device": "cpu"})
    assert names(config) == ["processes", "serial", "stacked"]
    assert {"client.precision": "bf16", **ENGINE_KEYS["processes"], "engine.threads": 2} in possible_changes(
        config
    )
    assert names(config.replace(engine="ray")) == [None]
    own = config.replace(engine={"name": "stacked", "clients": 3})
    assert [keys for keys in possible_changes(own) if keys.get("engine.clients") == 3]
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    assert names(config) == ["serial", "stacked"]
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
    assert names(config) == ["serial", "stacked"]


@pytest.mark.parametrize("fails", ["_try_out", "train_together"])
def test_an_engine_that_refuses_is_left_out_and_why_is_said(recipe, monkeypatch, fails):
    experiment = build(recipe)

    def refuse(*_):
        raise FederaError("not with this model")

    monkeypatch.setattr(f"federa.engines.stacked.{fails}", refuse)
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    result = measured("serial")
    result.engines, result.left_out = module._engines(experiment, 1, 0.01)
    assert [timing.changes["engine.name"] for timing in result.engines] == ["serial"]
    said = dict(lines(result, experiment.config))
    assert said["engine stacked (threads 1)"] == "left out: not with this model"
    monkeypatch.setattr(experiment.config, "__dict__", {**experiment.config.__dict__, "engine": own("ray")})
    _, left_out = module._engines(experiment, 1, 0.01)
    assert "not measured here" in left_out["ray"]


def own(name):
    return parse_config({"engine": name}).engine


def test_the_fastest_by_median_is_chosen():
    result = Bench(2, "cpu", "fused", "serial")
    result.precisions = [
        Timing("fp32", {"client.precision": "fp32"}, (1, 9, 2)),
        Timing("bf16", {"client.precision": "bf16"}, (3, 3, 3)),
    ]
    result.engines = [
        Timing("serial", {"engine.name": "serial"}, (5, 5, 6)),
        Timing("processes", {"engine.name": "processes", "engine.workers": 2}, (4, 4, 100)),
    ]
    assert result.best() == {"client.precision": "bf16", "engine.name": "serial"}


def test_mistakes(recipe_file, capsys):
    assert federa("bench", "--write") == 2
    assert "RECIPE.yaml" in capsys.readouterr().err
    with pytest.raises(FederaError, match="repeats"):
        bench(parse_config(yaml.safe_load(recipe_file.read_text())), print, 0)


def test_freed_memory_is_kept_from_the_first_timing_on(recipe, monkeypatch):
    done = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: done.append("kept"))

    def stop(*_):
        done.append("timed")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_interleaved", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(configure(recipe), print, 1)
    assert done == ["kept", "timed"]


RANK, HIDDEN, WIDE, LAYERS, LABELS = 16, 32, 64, 2, 3
METHODS = {
    "lora": {"name": "lora", "rank": RANK},
    "ft": {"name": "ft"},
    "probe": {"name": "probe"},
}


def flops(method, rows, tokens):
    """Of a step of small BERT: two for every weight that a token (or an example, at the head) meets.

    Of the last layer, keys and values alone are of all tokens: the head reads what it says of the first.
    """
    n, mlp = rows * tokens, 2 * HIDDEN * WIDE
    linear = 2 * n * (4 * HIDDEN**2 + mlp) * (LAYERS - 1)
    linear += 2 * n * 2 * HIDDEN**2 + 2 * rows * (2 * HIDDEN**2 + mlp)
    attention = 2 * 2 * n * HIDDEN * (tokens * (LAYERS - 1) + 1)  # scores, and the mean of values
    head = 2 * rows * HIDDEN * (HIDDEN + LABELS)
    forward = linear + attention + head
    if method == "probe":  # the gradient ends at the head
        return forward + head
    backward = linear + 2 * attention + 2 * head
    if method == "ft":
        return forward + backward + linear
    # No gradient reaches the embeddings, so none is passed on by the first layer's query, key and value.
    backward -= 2 * n * 3 * HIDDEN**2
    all_tokens, first = 2 * n * HIDDEN * RANK, 2 * rows * HIDDEN * RANK
    # Query's and value's factors: two products forward; B's, A's and two on the way back.
    factors = 6 * (2 * (LAYERS - 1) * all_tokens + first + all_tokens)
    return forward + backward + factors - 2 * all_tokens


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_a_step_are_those_of_its_matrices(recipe, method):
    """Of the steps that are timed: batches of like lengths, with less to pad than those in any order."""
    experiment = build(recipe, method=METHODS[method], task__max_length=64)
    lengths = experiment.train.lengths()
    trainer, rows = experiment.trainer, np.arange(3 * 8)
    with module._client(experiment, experiment.config.client.model_copy(update={"max_steps": 3})):
        batches = list(trainer.batches(experiment.train, rows, module._job(experiment.config)))
    expected = np.mean([flops(method, len(batch), lengths[batch].max()) for batch in batches])
    found, examples = module._step(experiment)
    assert found == pytest.approx(expected, rel=0.01)
    assert examples == 8
    assert expected < 0.95 * flops(method, 8, lengths[:8].max()), "the test has no batch to pad"


def test_a_few_rows_are_enough(encoder, test_csv, tmp_path):
    """No batch of eight to time, and a short last batch: a step is what it is on the average."""
    train = write_csv(tmp_path / "train.csv", sentences(7))
    config = configure(
        small_recipe(encoder("bert"), train, test_csv), cohort=2, partition={"name": "iid", "clients": 2}, client__batch_size=4
    )  # fmt: skip
    result = bench(config, lambda what: None, 1)
    assert [timing.name for timing in result.batches] == ["4"], "the recipe's own"
    examples = result.step_seconds * max(timing.rate for timing in result.precisions)
    assert any(examples == pytest.approx(sum(sizes) / 3) for sizes in ((4, 3, 4), (4, 3, 3)))
    assert dict(lines(result, config))["cores"] == str(result.cores)
