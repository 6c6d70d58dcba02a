"""What a GPU's model is made of, tried on the CPU: the numbers that transformers' own gives, in fewer passes."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from federa import gpu
from federa.cpu.disentangled import FastDisentangledSelfAttention
from federa.cpu.first_token import FirstTokenAttention
from federa.seeds import torch_seeded

FAMILIES = ("bert", "roberta", "electra", "distilbert", "deberta-v2")
SPARED = ("bert", "roberta", "electra")


def loaded(folder, kind=transformers.AutoModelForSequenceClassification):
    return kind.from_pretrained(folder, num_labels=3).eval()


def texts():
    with torch_seeded(3):
        ids, mask = torch.randint(5, 30, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind", [transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification]
)
def test_a_model_says_and_learns_the_same(family, kind, encoder):
    model = loaded(encoder(family), kind)
    fast = copy.deepcopy(model)
    gpu.speed_up(fast)
    assert any(type(m) is gpu.SharedLinear for m in fast.modules())
    said = [m(**texts()).logits for m in (model, fast)]
    if kind is transformers.AutoModelForTokenClassification:  # nobody reads what is said of padding
        said = [logits[texts()["attention_mask"].bool()] for logits in said]
    assert torch.allclose(*said, atol=1e-5) and said[0].std() > 0
    for one in said:
        one.square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), fast.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_a_classifier_works_for_its_first_token(family, encoder):
    model = loaded(encoder(family))
    gpu.speed_up(model)
    found = [name for name, m in model.named_modules() if isinstance(m, FirstTokenAttention)]
    assert len(found) == (family in SPARED)
    assert all(f"layer.{model.config.num_hidden_layers - 1}." in name for name in found)
    assert any(isinstance(m, FastDisentangledSelfAttention) for m in model.modules()) == (
        family == "deberta-v2"
    )


def test_a_model_that_is_asked_for_hidden_states_keeps_them(encoder):
    model = loaded(encoder("bert"))
    model.config.output_hidden_states = True
    gpu.speed_up(model)
    assert not any(isinstance(m, FirstTokenAttention) for m in model.modules())


class Passes(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def layer(kind, *, bias=True):
    with torch_seeded(1):
        made = nn.Linear(6, 5, bias=bias)
    made.__class__ = kind
    return made.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_clients_meet_a_frozen_map_in_one_product(bias, dim):
    with torch_seeded(2):
        x, up = torch.randn(3, 2, 4, 6).movedim(0, dim), torch.randn(3, 2, 4, 5)
    found = []
    for kind in (nn.Linear, gpu.SharedLinear):
        rows = x.clone().requires_grad_()
        with Passes() as passes:
            y = vmap(layer(kind, bias=bias), in_dims=dim)(rows)
        (y * up).sum().backward()
        found.append((y, rows.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert ("aten::addmm" if bias else "aten::mm") in passes.found and "aten::add.Tensor" not in passes.found


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_what_each_client_trains_is_its_own(name):
    found = []
    for kind in (nn.Linear, gpu.SharedLinear):
        one = layer(kind)
        own = torch.stack([getattr(one, name) + i for i in range(3)]).requires_grad_()
        x = torch.linspace(-1, 1, 3 * 4 * 6).view(3, 4, 6)
        y = vmap(lambda p, rows, one=one: functional_call(one, {name: p}, rows))(own, x)
        y.square().sum().backward()
        found.append((y, own.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_which_families_are_recorded(encoder):
    assert gpu.recordable(loaded(encoder("bert"))) and gpu.recordable(loaded(encoder("deberta-v2")))
    assert not gpu.recordable(nn.Linear(2, 2))
