"""BitFit trains the biases and no more; full fine-tuning trains everything."""

import pytest
import torch

from federa.methods import BitFit, FullFineTuning
from federa.types import FederaError


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "electra"])
def test_bitfit_trains_every_bias_and_the_head(load, setup_for, batch, family):
    loaded = load(family)
    before = loaded.model(**batch).logits
    state = BitFit().prepare(loaded.model, setup_for(loaded))
    assert torch.equal(loaded.model(**batch).logits, before)
    parameters = dict(loaded.model.named_parameters())
    biases = {name for name in parameters if name.rsplit(".", 1)[-1] == "bias"}
    assert len(biases - loaded.head) >= 2 * 8, "six linear maps and two layer norms a layer"
    assert set(state) == biases | loaded.head
    assert {name for name, p in parameters.items() if p.requires_grad} == set(state)


def test_bitfit_on_an_encoder_without_biases_says_so(load, setup_for):
    loaded = load("modernbert")
    with pytest.raises(FederaError, match="method 'bitfit': this encoder has no biases"):
        BitFit().prepare(loaded.model, setup_for(loaded))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_ft_trains_everything(load, setup_for, batch, family):
    loaded = load(family)
    names = {name for name, _ in loaded.model.named_parameters()}
    before = loaded.model(**batch).logits
    state = FullFineTuning().prepare(loaded.model, setup_for(loaded))
    assert torch.equal(loaded.model(**batch).logits, before)
    assert set(state) == names
    assert all(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("method", [BitFit(), FullFineTuning()], ids=lambda m: m.name)
def test_merged_is_the_model_itself(load, setup_for, batch, method):
    loaded = load()
    method.prepare(loaded.model, setup_for(loaded))
    before = loaded.model(**batch).logits
    method.merge(loaded.model)
    assert torch.equal(loaded.model(**batch).logits, before)
