"""DeBERTa's attention along diagonals: what transformers' own computes, of the positions that a text has."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    build_relative_position,
)

from federa.cpu import disentangled, speed_up
from federa.cpu.disentangled import (
    DisentangledAttention,
    FastDisentangledSelfAttention,
    attend_along_diagonals,
    on_diagonals,
    positions_of,
)

CPU = torch.device("cpu")


def attention(**changes):
    """One attention whose every part counts."""
    config = transformers.DebertaV2Config(
        **{
            "hidden_size": 24,
            "num_attention_heads": 3,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "position_buckets": 8,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **changes,
        }
    )
    torch.manual_seed(0)
    module = DisentangledSelfAttention(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module, length):
    torch.manual_seed(1)
    texts = torch.randn(2, length, 24, requires_grad=True)
    rows = torch.randn(2 * module.pos_ebd_size, 24, requires_grad=True)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    mask[1, :, length // 2 + 1 :], mask[1, :, :, length // 2 + 1 :] = False, False
    relative = build_relative_position(
        texts, texts, bucket_size=module.position_buckets, max_position=module.max_relative_positions
    )
    return texts, rows, mask, relative


def test_a_table_by_distance_is_read_along_its_diagonals():
    table = torch.arange(2 * 3 * 5.0).view(2, 3, 5)
    found = on_diagonals(table[1:])
    assert found.shape == (1, 3, 3)
    for i in range(3):
        for j in range(3):
            assert found[0, i, j] == table[1, i, j - i + 2]


@pytest.mark.parametrize("length", [1, 2, 5, 17, 63])
@pytest.mark.parametrize(
    "changes", [{}, {"share_att_key": False}, {"position_buckets": -1}, {"position_buckets": 32}], ids=str
)
def test_outputs_and_gradients_are_those_of_transformers(changes, length):
    found = {}
    for fast in (False, True):
        module = attention(**changes)
        if fast:
            attend_along_diagonals(module)
            assert type(module) is FastDisentangledSelfAttention
        texts, rows, mask, relative = inputs(module, length)
        out = module(texts, mask, relative_pos=relative, rel_embeddings=rows)[0]
        seen = mask.any(-1)[:, 0, :, None]  # nothing reads what stands in the place of padding
        (out * seen * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found[fast] = {"out": out, "texts": texts.grad, "rows": rows.grad, **grads}
    assert found[True].keys() == found[False].keys()
    for name, expected in found[False].items():
        assert torch.allclose(found[True][name], expected, atol=1e-4, rtol=1e-4), name


def test_only_positions_that_a_text_has_are_projected():
    held, keys, queries = positions_of(5, buckets=256, furthest=512, span=256, device=CPU)
    assert held == slice(252, 261)
    assert keys.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0] and queries.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    held, keys, _ = positions_of(400, buckets=256, furthest=512, span=256, device=CPU)
    assert len(keys) == 799 and held.stop - held.start < 512


@pytest.mark.parametrize("kinds", [["c2p"], ["p2c"], []])
def test_an_attention_of_other_terms_stays_what_it_is(kinds):
    module = attention(pos_att_type=kinds)
    attend_along_diagonals(module)
    assert type(module) is DisentangledSelfAttention


def test_weights_that_are_asked_for_come_from_the_original():
    module = attention()
    attend_along_diagonals(module)
    texts, rows, mask, relative = inputs(module, 6)
    out, weights = module(texts, mask, True, relative_pos=relative, rel_embeddings=rows)
    assert weights.shape == (2, 3, 6, 6)
    fast, none = module(texts, mask, relative_pos=relative, rel_embeddings=rows)
    assert none is None and torch.allclose(fast, out, atol=1e-5)


def test_a_sped_up_model_has_it_everywhere(encoder):
    model = transformers.AutoModel.from_pretrained(encoder("deberta-v2"))
    speed_up(model)
    found = [type(m) for m in model.modules() if isinstance(m, DisentangledSelfAttention)]
    assert found == [FastDisentangledSelfAttention] * 2


def test_a_length_that_was_predicted_first_trains():
    module = attention()
    attend_along_diagonals(module)
    positions_of.cache_clear()
    texts, rows, mask, relative = inputs(module, 9)
    with torch.inference_mode():
        module(texts.detach(), mask, relative_pos=relative, rel_embeddings=rows.detach())
    module(texts, mask, relative_pos=relative, rel_embeddings=rows)[0].sum().backward()
    assert texts.grad is not None


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def test_dropout_drops_at_its_rate_and_its_gradient_is_of_what_it_kept():
    length, shape = 8, (3, 4, 8, 5)
    q, k, v = (draws(*shape), draws(*shape) + 1, draws(*shape) - 1)
    p, r = draws(3, 2 * length - 1, 5), draws(3, 2 * length - 1, 5) + 0.1
    mask = torch.zeros(1, 4, length, length)
    tensors = [t.requires_grad_() for t in (q, k, v, p, r)]
    weights = draws(*shape)

    def value(*changed):
        torch.manual_seed(5)
        return (DisentangledAttention.apply(*changed, mask, 0.3) * weights).sum()

    grads = torch.autograd.grad(value(*tensors), tensors)
    for i, grad in enumerate(grads):
        step = draws(*grad.shape) * 1e-2
        ends = [[t + sign * step if i == j else t for j, t in enumerate(tensors)] for sign in (1, -1)]
        slope = (value(*ends[0]) - value(*ends[1])) / 2
        assert (grad * step).sum().item() == pytest.approx(slope.item(), rel=2e-2, abs=2e-4)
    ones = torch.ones(50, 4, length, 1)
    flat = torch.zeros(50, 2 * length - 1, 5)
    zeros = torch.zeros(50, 4, length, 5)
    out = DisentangledAttention.apply(zeros, zeros, ones, flat, flat, mask, 0.25)
    assert float(out.mean()) == pytest.approx(1, abs=0.03) and float(out.std()) > 0.1


@pytest.mark.parametrize("whole", [False, True], ids=["a part at a time", "all groups at once, as on a GPU"])
def test_clients_side_by_side_are_clients_one_by_one(monkeypatch, whole):
    length = 6
    masks = torch.zeros(4, 1, 2, length, length)
    for c in range(4):
        masks[c, ..., c % 2, 2 + c :] = torch.finfo(torch.float32).min
    monkeypatch.setattr(disentangled, "TABLE_BYTES", 2 * 2 * length * (2 * length - 1) * 4)  # two groups
    parts = disentangled._parts
    each = [
        [draws(3, 2, length, 5) + c for _ in range(3)] + [draws(3, 11, 5) * (1 + c), draws(3, 11, 5) - c]
        for c in range(4)
    ]
    stacked = [torch.stack(column).requires_grad_() for column in zip(*each, strict=True)]
    alone = torch.stack(
        [DisentangledAttention.apply(*own, mask, 0.0) for own, mask in zip(each, masks, strict=True)]
    )
    if whole:
        monkeypatch.setattr(disentangled, "_parts", lambda q: iter([slice(None)]))
    together = torch.func.vmap(lambda mask, *t: DisentangledAttention.apply(*t, mask, 0.0))(masks, *stacked)
    assert torch.allclose(together, alone, atol=1e-5)
    together.square().sum().backward()
    monkeypatch.setattr(disentangled, "_parts", parts)
    for c, own in enumerate(each):
        leaves = [t.clone().requires_grad_() for t in own]
        DisentangledAttention.apply(*leaves, masks[c], 0.0).square().sum().backward()
        for leaf, whole in zip(leaves, stacked, strict=True):
            assert torch.allclose(leaf.grad, whole.grad[c], atol=1e-4, rtol=1e-4)
