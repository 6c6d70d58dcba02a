"""The last layer of a classifier works for its first token alone, wherever that is all the head reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from federa.cpu import speed_up
from federa.cpu.first_token import FirstTokenAttention, FirstTokenOutput

SPARED = ["bert", "roberta", "electra"]


def loaded(folder: Path, kind: type = transformers.AutoModelForSequenceClassification) -> torch.nn.Module:
    return kind.from_pretrained(folder, num_labels=3)


def spared(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if type(m) in {FirstTokenAttention, FirstTokenOutput}]


@pytest.mark.parametrize("family", SPARED)
def test_the_last_layer_alone_is_spared(family: str, encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder(family))
    assert model.training == loaded(encoder(family)).training
    speed_up(model)
    last = model.config.num_hidden_layers - 1
    names = spared(model)
    assert len(names) == 2
    assert all(f"layer.{last}.attention" in name for name in names)


@pytest.mark.parametrize("family", SPARED)
def test_a_head_that_reads_every_token_gets_them(family: str, encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder(family), transformers.AutoModelForTokenClassification).eval()
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        speed_up(model)
        assert spared(model) == []
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)


def test_a_head_that_reads_the_mean_gets_every_token(encoder: Callable[[str], Path]) -> None:
    class Mean(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.tanh(hidden.mean(1))

    model = loaded(encoder("bert"))
    model.bert.pooler = Mean()
    speed_up(model)
    assert spared(model) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool, encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder("bert")).train(training)
    speed_up(model)
    assert all(module.training == training for module in model.modules())
