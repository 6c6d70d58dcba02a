"""The last layer of a classifier works for its first token alone, wherever that is all the head reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from federa.cpu import speed_up
from federa.cpu.first_token import FirstTokenAttention, FirstTokenOutput
from federa.seeds import torch_seeded

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


def test_a_head_that_reads_the_last_token_gets_every_token(encoder: Callable[[str], Path]) -> None:
    class Last(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.tanh(hidden[:, -1])

    model = loaded(encoder("bert"))
    model.bert.pooler = Last()
    speed_up(model)
    assert spared(model) == []


def test_hidden_states_that_are_asked_for_are_whole(encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder("bert"))
    model.config.output_hidden_states = True
    speed_up(model)
    assert spared(model) == []


def test_a_head_that_says_the_same_of_everything_tells_nothing(encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder("bert"))
    torch.nn.init.zeros_(model.classifier.weight)
    speed_up(model)
    assert spared(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dropout_of_the_last_layer_meets_its_rate(dtype: torch.dtype, encoder: Callable[[str], Path]) -> None:
    """Only the last layer drops out: the logits of many passes have the spread of the model as it was."""
    made = loaded(encoder("bert"))
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(5)
    spreads = []
    for fast in (False, True):
        model = copy.deepcopy(made)
        if fast:
            speed_up(model)
            assert len(spared(model)) == 2
        model.to(dtype).train().requires_grad_(requires_grad=False)
        last = f"layer.{model.config.num_hidden_layers - 1}.attention"
        for name, module in model.named_modules():
            if hasattr(module, "p"):
                module.p = 0.4 if last in name else 0.0
        ids = torch.randint(5, 30, (1, 9), generator=torch.Generator().manual_seed(1))
        with torch_seeded(2):
            spreads.append(model(input_ids=ids.expand(2000, 9)).logits.float().std(0))
    assert (spreads[0] > 0.01).all()
    assert torch.allclose(*spreads, rtol=0.12)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool, encoder: Callable[[str], Path]) -> None:
    model = loaded(encoder("bert")).train(training)
    speed_up(model)
    assert all(module.training == training for module in model.modules())
