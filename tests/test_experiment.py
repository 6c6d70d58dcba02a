"""The one builder: sizes, what clients keep, the rows that stand for a client, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from federa.experiment import CLIENT_TEST_EXAMPLES, build_experiment, resolve
from federa.kept import KeptStates
from federa.machine import cache_folder
from federa.server import make_jobs
from federa.types import FederaError, Job
from running import build, configure, same


def test_sizes_are_counted_by_hand(recipe):
    """Hidden 32, rank 4, query and value of two layers, a pooler and a classifier of three labels."""
    sizes = build(recipe).sizes
    factors, head = 2 * 2 * (4 * 32 + 32 * 4), (32 * 32 + 32) + (32 * 3 + 3)
    model = sum(p.numel() for p in build(recipe).trainer.model.parameters())
    assert sizes == {
        "total_parameters": model,
        "trainable_parameters": factors + head,
        "travelling_parameters": factors + head,
        "head_parameters": head,
        "start_bytes": 4096,
    }
    local = build(recipe, method__head="local").sizes
    assert (local["trainable_parameters"], local["travelling_parameters"]) == (factors + head, factors)
    frozen = build(recipe, method__head="freeze").sizes
    assert frozen["trainable_parameters"] == frozen["travelling_parameters"] == factors


def test_what_requires_grad_is_what_travels(recipe):
    experiment = build(recipe)
    trains = {n for n, p in experiment.trainer.model.named_parameters() if p.requires_grad}
    assert trains == set(experiment.params) == set(experiment.trainer.shared)
    assert all(t.dtype == torch.float32 for t in experiment.params.values())


def test_the_partition_is_disjoint_exhaustive_and_counted(recipe):
    experiment = build(recipe)
    assert sorted(np.concatenate(experiment.parts)) == list(range(240))
    for part, counts in zip(experiment.parts, experiment.counts, strict=True):
        assert list(counts) == [
            int(np.sum(experiment.train.targets["labels"][part] == group)) for group in range(3)
        ]
    assert experiment.groups.names == experiment.labels == ["food", "sport", "tech"]


def test_a_client_builds_the_same_model_from_what_it_was_sent(recipe):
    """Updates, not outputs: a frozen random part that differs shows only in training."""
    for method in ("federa", "lora", "adapter"):
        server = build(recipe, method__name=method)
        client = build_experiment(configure(recipe, method__name=method), server.params)
        assert same(client.params, server.params) and client.fingerprint == server.fingerprint
        job = Job(1, 2, 9, 3e-3)
        moved = {n: p + 0.01 for n, p in server.params.items()}
        assert same(client.train_client(moved, job).delta, server.train_client(moved, job).delta)


def test_the_seed_draws_head_and_partition_but_not_the_test_set(recipe):
    one, other = build(recipe, seed=1), build(recipe, seed=2)
    assert not torch.equal(one.params["classifier.weight"], other.params["classifier.weight"])
    assert [list(p) for p in one.parts] != [list(p) for p in other.parts]
    assert np.array_equal(one.evaluation.targets["labels"], other.evaluation.targets["labels"])
    name = "bert.encoder.layer.0.attention.self.query.lora_A"
    assert torch.equal(one.params[name], other.params[name]), "principal components are no matter of chance"


# rows that stand for a client


def with_counts(experiment, counts):
    counts = np.asarray(counts, dtype=np.int64)
    object.__setattr__(experiment, "counts", counts)
    return experiment


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1, 1], [30, 30, 30]),  # the whole test set: 90 rows, 30 of each group
        ([10, 0, 0], [30, 0, 0]),
        ([3, 1, 0], [30, 10, 0]),
        ([1, 3, 0], [10, 30, 0]),
        ([2, 1, 1], [30, 15, 15]),
        ([1000, 1, 0], [30, 0, 0]),
    ],
)
def test_rows_that_stand_for_a_client_have_its_mix(recipe, counts, expected):
    experiment = with_counts(build(recipe), [counts] * 6)
    rows = experiment.client_examples(4)
    assert np.bincount(experiment.evaluation.targets["labels"][rows], minlength=3).tolist() == expected
    assert len(set(rows)) == len(rows) and list(rows) == sorted(rows)
    assert list(experiment.client_examples(4)) == list(rows)
    if len(rows) < 90 and expected != [30, 0, 0]:
        assert list(experiment.client_examples(3)) != list(rows), "every client draws its own"


def test_at_most_so_many_rows_stand_for_a_client(recipe, monkeypatch):
    monkeypatch.setattr("federa.experiment.CLIENT_TEST_EXAMPLES", 12)
    experiment = with_counts(build(recipe), [[1, 1, 2]] * 6)
    rows = experiment.client_examples(0)
    assert np.bincount(experiment.evaluation.targets["labels"][rows], minlength=3).tolist() == [3, 3, 6]
    assert CLIENT_TEST_EXAMPLES == 200


def test_a_client_without_rows_to_stand_for_it_has_none(recipe, tmp_path, test_csv):
    only = [line for line in test_csv.read_text().splitlines() if not line.endswith("tech")]
    (tmp_path / "test.csv").write_text("\n".join(only) + "\n")
    experiment = with_counts(build(recipe, data__test=str(tmp_path / "test.csv")), [[0, 0, 9], [1, 1, 2]])
    assert len(experiment.client_examples(0)) == 0
    rows = experiment.client_examples(1)
    assert set(experiment.evaluation.targets["labels"][rows]) == {0, 1}


def test_evaluation_batches_hold_every_row_once_the_longest_first(recipe):
    experiment = build(recipe, evaluate_batch_size=16)
    batches = experiment.batches(np.arange(90))
    assert [len(batch) for batch in batches] == [16, 16, 16, 16, 16, 10]
    assert sorted(np.concatenate(batches)) == list(range(90))
    lengths = experiment.evaluation.lengths()[np.concatenate(batches)]
    assert list(lengths) == sorted(lengths, reverse=True)


# what clients keep


def test_kept_states_are_those_from_before_the_round(tmp_path):
    start = {"head": torch.zeros(2)}
    kept = KeptStates(tmp_path / "clients", start)

    def job(number, client=1):
        return Job(number, client, 0, 0.1)

    assert kept.load(job(5)) == start
    for number in (2, 5, 9):
        kept.save(job(number), {"head": torch.full((2,), float(number))})
    kept.save(job(5, client=11), {"head": torch.full((2,), 11.0)})
    values = {n: float(kept.load(job(n))["head"][0]) for n in (6, 9, 10, 99)}
    assert values == {6: 5.0, 9: 5.0, 10: 9.0, 99: 9.0}
    assert float(kept.load(job(6, client=11))["head"][0]) == 11.0
    assert kept.load(job(6, client=2)) == start
    names = sorted(str(f.relative_to(tmp_path / "clients")) for f in tmp_path.glob("clients/*/*"))
    assert names == [
        "client-000001/round-000005.safetensors", "client-000001/round-000009.safetensors",
        "client-000011/round-000005.safetensors",
    ]  # fmt: skip


def test_a_clients_kept_states_cost_the_same_among_however_many(tmp_path, monkeypatch):
    kept, looked = KeptStates(tmp_path / "clients", {"head": torch.zeros(2)}), []
    for client in range(20):
        kept.save(Job(1, client, 0, 0.1), kept.start)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, words: looked.append(self.name) or glob(self, words))
    kept.load(Job(2, 7, 0, 0.1))
    kept.save(Job(2, 7, 0, 0.1), kept.start)
    assert set(looked) == {"client-000007"}


def test_what_an_earlier_version_kept_is_not_passed_over(tmp_path):
    (tmp_path / "client-000001-round-000005.safetensors").touch()
    with pytest.raises(FederaError, match="earlier version"):
        KeptStates(tmp_path, {"head": torch.zeros(2)})


def test_nothing_is_kept_where_heads_travel(tmp_path):
    kept = KeptStates(tmp_path / "clients", {})
    kept.save(Job(1, 0, 0, 0.1), {})
    assert kept.load(Job(2, 0, 0, 0.1)) == {} and not (tmp_path / "clients").exists()


# resolution and refusals


def test_auto_is_resolved_once_and_kept(recipe):
    config = configure(recipe, client__precision="auto")
    resolved = resolve(config)
    assert resolved.client.precision in ("fp32", "bf16")
    assert resolve(resolved) is resolved
    assert resolved.device == "cpu"
    assert resolved == config.replace(**{"client.precision": resolved.client.precision, "device": "cpu"})


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDERA_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FEDERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "federa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": {"name": "natural", "column": "author"}}, "no column 'author'; it has text, label"),
        ({"partition": {"name": "natural", "column": "label"}, "cohort": 4}, "cohort: 4 clients a round, but the partition has 3"),
        ({"partition": {"name": "iid", "clients": 241}}, "fewer rows than clients need: 240 rows, 241 clients"),
        ({"partition": {"name": "iid", "clients": 10, "min_examples": 25}}, "fewer rows than clients need"),
        ({"method__rank": 33}, "method.rank: 33 is larger than the smaller side of"),
        ({"method__targets": ["quary"]}, "method.targets: 'quary' fits no linear map"),
        ({"device": "cuda"}, "device: cuda is not available"),
        ({"method": {"name": "probe", "head": "freeze"}}, "probe"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_data_model_or_machine(recipe, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(FederaError) as raised:
        build(recipe, **changes)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_trained_clients_are_those_of_the_cohorts_so_far(recipe):
    experiment = build(recipe, cohort=2)
    sizes = [len(part) for part in experiment.parts]
    drawn = [{job.client_id for job in make_jobs(experiment.config, n, sizes)} for n in (1, 2, 3)]
    assert experiment.trained_clients(0) == []
    assert experiment.trained_clients(1) == sorted(drawn[0])
    assert experiment.trained_clients(3) == sorted(set().union(*drawn))


def test_the_datas_fingerprint_knows_every_word_label_and_client(recipe, tmp_path, train_csv):
    first = build(recipe).data_fingerprint()
    assert build(recipe, client__lr=1.0, method__name="ft").data_fingerprint() == first
    assert build(recipe, partition__alpha=0.6).data_fingerprint() != first
    header, line, *lines = train_csv.read_text().splitlines()
    words, label = line.rsplit(",", 1)
    other = {"food": "tech", "tech": "sport", "sport": "food"}[label]
    for changed in (f"{words} goal,{label}", f"{words},{other}"):
        (tmp_path / "train.csv").write_text("\n".join([header, changed, *lines]) + "\n")
        assert build(recipe, data__train=str(tmp_path / "train.csv")).data_fingerprint() != first


def test_natural_clients_hold_the_values_of_a_column(recipe):
    experiment = build(recipe, partition={"name": "natural", "column": "label"}, cohort=2)
    assert experiment.counts.tolist() == [[80, 0, 0], [0, 80, 0], [0, 0, 80]]


@pytest.mark.parametrize("name", ["iid", "quantity", "dirichlet"])
def test_clusters_are_found_for_a_partition_that_asks_for_them(recipe, monkeypatch, name):
    """They cost a pass of the encoder over all texts."""
    config = configure(recipe, partition={"name": name})
    monkeypatch.setattr(type(config.task), "groups", lambda *_: None)
    asked = []
    monkeypatch.setattr(
        "federa.experiment.embeddings",
        lambda *_: asked.append(1) or np.random.default_rng(0).random((240, 4)),
    )
    groups = build(recipe, partition={"name": name}).groups
    assert len(asked) == (2 if name == "dirichlet" else 0)
    assert len(groups.names) == (config.task.clusters if name == "dirichlet" else 1)
