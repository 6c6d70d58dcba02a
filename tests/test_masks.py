"""An accelerator's step: no look at any value on the way, and the numbers of transformers' own masks."""

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deberta_v2 import modeling_deberta_v2

from federa.types import Job
from running import as_on_an_accelerator, build, furthest

FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert")
LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique")


class Looks(TorchDispatchMode):
    """Notes every operation whose result an accelerator's host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in LOOKS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=FAMILIES)
def changes(request, encoder):
    return {
        "model__name": str(encoder(request.param)), "method__name": "lora", "client__dropout": 0.0,
        "client__proximal": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_no_step_waits(recipe, changes, monkeypatch, micro_batch):
    """Of a job, its last line alone: the mean of its losses."""
    as_on_an_accelerator(monkeypatch, ready=True)
    experiment = build(recipe, **changes, client__micro_batch=micro_batch)
    job = experiment.params, experiment.train, np.arange(24), Job(1, 0, 5, 1e-3)
    if "deberta" in changes["model__name"]:
        experiment.trainer.train(*job)  # what it keeps for a length is computed the first time
    with Looks() as looks:
        experiment.trainer.train(*job)
    assert looks.found == ["_local_scalar_dense"]


def test_a_wait_would_be_seen(recipe, monkeypatch):
    as_on_an_accelerator(monkeypatch, ready=False)
    experiment = build(recipe)
    with Looks() as looks:
        experiment.trainer.train(experiment.params, experiment.train, np.arange(24), Job(1, 0, 5, 1e-3))
    assert len(looks.found) == 1 + 3, "one a step beside the last"


@pytest.mark.parametrize("rows", [np.arange(24), np.zeros(8, dtype=np.int64)], ids=["padding", "none"])
def test_updates_are_those_of_transformers_masks(recipe, changes, monkeypatch, rows):
    outputs, deltas = [], []
    for ready in (False, True):
        as_on_an_accelerator(monkeypatch, ready=ready)
        experiment = build(recipe, **changes, client__optimizer="sgd", client__lr=0.1)
        outputs.append(
            np.stack([row for batch in experiment.predict(experiment.params, [rows]) for row in batch])
        )
        update, _ = experiment.trainer.train(experiment.params, experiment.train, rows, Job(1, 0, 5, 0.1))
        deltas.append(update.delta)
    np.testing.assert_allclose(*outputs, atol=1e-6)
    assert furthest(*deltas) < 1e-6 < max(float(t.abs().max()) for t in deltas[0].values())


def test_debertas_relative_positions_are_computed_once_a_length(recipe, encoder, monkeypatch):
    """First while predicting: training reads what is kept, though it was made in inference mode."""
    as_on_an_accelerator(monkeypatch, ready=True)
    experiment = build(recipe, model__name=str(encoder("deberta-v2")), method__name="lora")
    asked = []
    computed = modeling_deberta_v2.build_relative_position
    monkeypatch.setattr(
        modeling_deberta_v2,
        "build_relative_position",
        lambda *a, **k: (asked.append(1), computed(*a, **k))[1],
    )
    rows = np.arange(8)
    list(experiment.trainer.predict(experiment.params, experiment.train, [rows, rows]))
    experiment.trainer.train(experiment.params, experiment.train, rows, Job(1, 0, 5, 1e-3))
    assert len(asked) == 1
    longer = np.argsort(experiment.train.lengths())[-8:]
    assert experiment.train.lengths()[longer].max() != experiment.train.lengths()[rows].max()
    list(experiment.trainer.predict(experiment.params, experiment.train, [longer]))
    assert len(asked) == 2
