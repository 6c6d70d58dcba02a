"""Three rounds of every method on a small model, written down: any change of arithmetic shows here.

The tolerance is far above what rounding does (changing every weight by one part in a million moves no loss by
more than 1e-6), and far below what a lost client, a wrong sign or another order of batches does.
"""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from federa import run
from running import configure, steady

RECIPE = {
    "seed": 3, "rounds": 3, "cohort": 6, "evaluate_every": 0, "partition__alpha": 5.0, "method__rank": 4,
    "client__batch_size": 8, "client__schedule": "linear", "client__weight_decay": 0.01, "client__clip_norm": 1.0,
    "client__dropout": 0.0, "model__train_pooler": False,
}  # fmt: skip
GOLDEN = {  # learning rate, loss of each round, accuracy after the last
    "federa": (0.03, [1.080115, 1.068678, 0.986818], 0.6667),
    "lora": (0.03, [1.081040, 1.086254, 1.060984], 0.5778),
    "adapter": (0.03, [1.087416, 1.096332, 1.081794], 0.4778),
    "bitfit": (0.03, [1.086517, 1.097307, 1.080933], 0.4111),
    "ft": (0.003, [1.085646, 1.037775, 0.915701], 0.9667),
}


@pytest.fixture(scope="module")
def lively(encoder, tmp_path_factory):
    """The small BERT with matrices ten times larger: with those as they are drawn, methods hardly differ."""
    folder = shutil.copytree(encoder("bert"), tmp_path_factory.mktemp("model") / "lively")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim == 2 and "layer" in name and "LayerNorm" not in name:
            weights[name] = 10 * tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", GOLDEN)
def test_losses(recipe, lively, method):
    lr, losses, accuracy = GOLDEN[method]
    fields = {k: v for k, v in RECIPE.items() if k != "method__rank" or method in ("federa", "lora")}
    config = configure(
        recipe, **{"method__name": method, **fields, "client__lr": lr, "model__name": str(lively)}
    )
    result = run(config)
    assert [record["loss"] for record in result.records] == pytest.approx(losses, abs=1e-4)
    assert result.summary["final"] == pytest.approx(accuracy, abs=0.012), (
        "one sentence of 90 may fall either way"
    )
    assert [record["examples"] for record in steady(result.records)] == [240, 240, 240]
