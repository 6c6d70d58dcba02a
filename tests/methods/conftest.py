"""What the tests of methods share: small pretrained classifiers, a batch with padding, and an exact comparison."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from federa.methods import Setup
from federa.models import ModelConfig, Pretrained, load_pretrained

LABELS = ("food", "sport", "tech")


@pytest.fixture()
def load(encoder: Callable[[str], Path]) -> Callable[..., Pretrained]:
    """Return a function from a family's name to its small checkpoint, loaded afresh with a seeded head.

    Its matrices are made ten times larger and its biases random: fresh ones are so small, or zero, that logits
    hardly depend on the encoder, and a comparison to 1e-5 would pass whatever a method does.
    """

    def get(family: str = "bert", seed: int = 1, **settings) -> Pretrained:
        config = ModelConfig(name=str(encoder(family)))
        loaded = load_pretrained(config, "AutoModelForSequenceClassification", LABELS, seed=seed, **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in loaded.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.mul_(10)
                    if module.bias is not None:
                        module.bias.normal_(std=0.2, generator=generator)
        loaded.model.eval()
        return loaded

    return get


@pytest.fixture()
def setup_for() -> Callable[..., Setup]:
    """Return a function from a loaded checkpoint to the setup of a run that starts with it."""

    def get(loaded: Pretrained, seed: int = 5, **fields) -> Setup:
        return Setup(head=loaded.head, seed=seed, base=loaded.fingerprint, **fields)

    return get


@pytest.fixture()
def batch() -> dict[str, torch.Tensor]:
    """Four rows of 2 to 12 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([12, 5, 2, 9])
    mask = (torch.arange(12)[None, :] < lengths[:, None]).long()
    ids = torch.randint(5, 40, (4, 12), generator=generator) * mask
    labels = torch.tensor([0, 1, 2, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
