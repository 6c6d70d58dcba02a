"""Scores of clients: whose they are, and whom there is nothing to measure on."""

import numpy as np
import pytest

from federa.config import parse_config
from federa.engines import Serial
from federa.evaluation import Evaluator
from federa.experiment import Experiment, build_experiment
from federa.types import FederaError, RoundFailedError
from running import build
from small import TASKS, write_task


def evaluator(experiment, session):
    return Evaluator(experiment, session, lambda done, of: None)


def test_a_clients_score_is_that_of_its_own_examples(recipe):
    """Checked against the predictions of all, example by example."""
    experiment = build(recipe)
    with Serial(threads=1).open(experiment) as session:
        found = evaluator(experiment, session)
        predictions = found.predictions(experiment.params)
        truth = experiment.evaluation.targets["labels"]
        right = [
            np.mean([predictions[e][0] == truth[e] for e in experiment.client_examples(client)])
            for client in range(len(experiment.parts))
        ]
        scores = found.per_client(experiment.params, range(6))
    assert scores == {
        "mean": pytest.approx(np.mean(right)),
        "p10": pytest.approx(np.percentile(right, 10)),
        "worst": pytest.approx(min(right)),
    }


@pytest.fixture()
def tagging(encoder, tmp_path):
    """A recipe whose third client has no entity in the examples that stand for it."""
    return {
        "model": {"name": str(encoder("bert"))},
        "data": {"train": str(write_task(tmp_path / "data", "ner"))},
        "task": TASKS["ner"],
        "cohort": 2,
        "partition": {"name": "iid", "clients": 3},
        "engine": {"name": "serial", "threads": 1},
    }


def test_clients_without_an_entity_to_find_have_no_score(tagging, monkeypatch):
    """Nobody can do better than F1 0 there: as a score of 0 it would be the worst client's for ever."""
    experiment = build_experiment(parse_config(tagging))
    task, examples = experiment.config.task, np.arange(experiment.evaluation.num_examples)
    assert task.scorable(experiment.evaluation, examples)
    reference = experiment.evaluation.reference
    bare = [np.zeros_like(tags) if number < 5 else tags for number, tags in enumerate(reference.truth)]
    reference.truth = bare
    assert not task.scorable(experiment.evaluation, examples[:5])
    assert task.scorable(experiment.evaluation, examples[4:6])
    parts = {0: examples[:5], 1: examples[5:], 2: examples}
    monkeypatch.setattr(Experiment, "client_examples", lambda _, client: parts[client])
    with Serial(threads=1).open(experiment) as session:
        found = evaluator(experiment, session)
        truth = [(words, tags) for words, tags in zip(reference.words, reference.truth, strict=True)]
        found._last = (experiment.params, truth)  # a model that finds all
        assert found.per_client(experiment.params, range(3)) == {"mean": 1.0, "p10": 1.0, "worst": 1.0}


def test_local_heads_that_nothing_can_measure_are_refused(recipe, tmp_path, train_csv):
    """The groups are a column that the evaluation set does not have."""
    lines = train_csv.read_text().splitlines()
    path = tmp_path / "train.csv"
    path.write_text("\n".join([lines[0] + ",site", *(f"{line},{i % 4}" for i, line in enumerate(lines[1:]))]))
    recipe["data"] = {**recipe["data"], "train": str(path)}
    changes = {"task__group_by": "site", "method__head": "local"}
    with pytest.raises(FederaError, match=r"^method\.head=local: no client's group has evaluation examples"):
        build(recipe, **changes)
    build(recipe, task__group_by="site")


def test_a_round_whose_clients_cannot_be_measured_fails_with_a_word(recipe, monkeypatch):
    experiment = build(recipe, method__head="local")
    monkeypatch.setattr(Experiment, "client_examples", lambda *_: np.array([], dtype=np.int64))
    with (
        Serial(threads=1).open(experiment) as session,
        pytest.raises(RoundFailedError, match="no client that has trained has evaluation examples"),
    ):
        evaluator(experiment, session).score(experiment.params, [0, 1])
