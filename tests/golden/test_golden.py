"""Three rounds of every method on a small model, written down: any change of arithmetic shows here."""

import pytest

from federa import run
from running import configure

# Losses of three rounds, and the accuracy after the last, of the recipe in conftest.py without dropout.
GOLDEN: dict[str, tuple[list[float], float]] = {}


@pytest.mark.parametrize("method", GOLDEN)
def test_losses(recipe, method):
    losses, accuracy = GOLDEN[method]
    result = run(configure(recipe, method__name=method, client__dropout=0.0, client__lr=0.01, evaluate_every=0))
    assert [record["loss"] for record in result.records] == pytest.approx(losses, abs=1e-4)
    assert result.summary["final"] == pytest.approx(accuracy, abs=0.012), "one sentence of 90 may fall either way"
