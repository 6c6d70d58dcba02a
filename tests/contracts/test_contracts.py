"""Every registered component keeps its contract, and the contract tests notice components that do not."""

import numpy as np
import pytest
import torch
import transformers

from federa.aggregators import AGGREGATORS, Mean
from federa.data.datasets import DataConfig, Table
from federa.data.partition import PARTITIONERS, Iid
from federa.methods import METHODS, LoRA, Probe
from federa.methods.lora import merge_lora
from federa.server_optimizers import SERVER_OPTIMIZERS, Sgd
from federa.tasks import TASKS, Classification
from federa.testing import (
    check_aggregator,
    check_method,
    check_partitioner,
    check_server_optimizer,
    check_task,
    check_wire,
)
from federa.wires import WIRES

REQUIRED = {"natural": {"column": "author"}}


def component(registry, name, **fields):
    return registry.parse({"name": name, **REQUIRED.get(name, {}), **fields})


@pytest.mark.parametrize("fields", [{}, {"clients": 7, "min_examples": 9}], ids=["defaults", "min_examples"])
@pytest.mark.parametrize("name", PARTITIONERS.names())
def test_partitioners(name, fields):
    check_partitioner(component(PARTITIONERS, name, **fields))


@pytest.mark.parametrize("name", AGGREGATORS.names())
def test_aggregators(name):
    check_aggregator(component(AGGREGATORS, name))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS.names())
def test_server_optimizers(name):
    check_server_optimizer(component(SERVER_OPTIMIZERS, name))


@pytest.mark.parametrize("name", WIRES.names())
def test_wires(name):
    check_wire(component(WIRES, name))


METHOD_FIELDS = {
    "federa": [{"rank": 4, "alpha": 6, "components": "random"}, {"rank": 2, "targets": "all-linear"}],
    "lora": [{"rank": 4, "alpha": 6, "rslora": True}, {"rank": 4, "dora": True}],
    "adapter": [{"placement": "houlsby", "width": 8}],
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for name in METHODS.names() for fields in ({}, *METHOD_FIELDS.get(name, []))],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value.values())) or "defaults",
)
def test_methods(name, fields):
    check_method(component(METHODS, name, **fields))


@pytest.mark.parametrize("head", ["freeze", "local"])
@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "probe"])
def test_methods_in_every_mode_of_the_head(name, head):
    check_method(component(METHODS, name, head=head))


TASK_ROWS = {
    "classification": [{"text": f"goal team {i}", "label": ["a", "b"][i % 2]} for i in range(9)],
    "ner": [{"tokens": ["goal"] * (i + 1), "tags": ["B-x", *["I-x"] * i]} for i in range(30)],
    "qa": [
        {
            "question": "goal",
            "context": "team " * (i + 1) + "cup",
            "answers": {"text": ["cup"], "answer_start": [5 * (i + 1)]},
        }
        for i in range(30)
    ],
}


@pytest.mark.parametrize(
    "fields", [{"overlap": 20}, {"max_length": 16, "overlap": 3}], ids=["whole", "windows"]
)
@pytest.mark.parametrize("name", TASKS.names())
def test_tasks(name, fields, encoder):
    known = {key: value for key, value in fields.items() if key in TASKS.get(name).model_fields}
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    check_task(component(TASKS, name, **known), Table.from_list(TASK_ROWS[name]), DataConfig(), tokenizer)


class Skips(Classification):
    def decode(self, outputs, encoded, examples):
        return super().decode(outputs, encoded, examples)[1:]


class Peeks(Classification):
    def encode(self, table, data, tokenizer, labels):
        if labels is not None:
            table = table.map(lambda row: {"text": row["text"] + " " + row["label"]})
        return super().encode(table, data, tokenizer, labels)


@pytest.mark.parametrize(
    ("broken", "message"), [(Skips, "a prediction an example"), (Peeks, "depends on the answers")]
)
def test_a_broken_task_is_noticed(broken, message, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    with pytest.raises(AssertionError, match=message):
        check_task(broken(), Table.from_list(TASK_ROWS["classification"]), DataConfig(), tokenizer)


REGISTRIES = [PARTITIONERS, AGGREGATORS, SERVER_OPTIMIZERS, METHODS, TASKS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_no_registered_class_builds_on_another(registry):
    classes = [registry.get(name) for name in registry.names()]
    assert classes
    assert not [cls for cls in classes if set(cls.__mro__[1:]) & set(classes)]


class Loses(Iid):
    def assign(self, groups, rng):
        first, *others = super().assign(groups, rng)
        return [first[1:], *others]


class Doubles(Iid):
    def assign(self, groups, rng):
        first, *others = super().assign(groups, rng)
        return [np.append(first, others[0][0]), *others]


class Unseeded(Iid):
    def assign(self, groups, rng):
        return super().assign(groups, np.random.default_rng())


class Scribbles(Iid):
    def assign(self, groups, rng):
        groups[:] = 0
        return super().assign(groups, rng)


class TooMany(Iid):
    def assign(self, groups, rng):
        return np.array_split(np.arange(len(groups)), self.clients + 1)


class Unregistered(Iid):
    name: str = "nobody"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Loses, "not exactly the rows"),
        (Doubles, "held twice"),
        (Unseeded, "same seed"),
        (Scribbles, "in place"),
        (TooMany, "21 clients, not 20"),
        (Unregistered, "not registered"),
    ],
)
def test_wrong_partitioners_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_partitioner(cls())


class Sums(Mean):
    def finish(self, accumulator):
        return {name: total.float() for name, total in accumulator.total.items()}


class RawWeights(Mean):
    def finish(self, accumulator):
        w = accumulator.weight
        return {name: (t / w * (1 if w < 100 else 2)).float() for name, t in accumulator.total.items()}


class LastCounts(Mean):
    def accumulate(self, accumulator, update):
        accumulator = self.init(update.delta) if update.job.client_id == 2 else accumulator
        return super().accumulate(accumulator, update)


class Remembers(Mean):
    def init(self, params):
        return vars(self).setdefault("_kept", super().init(params))


class Clobbers(Mean):
    def accumulate(self, accumulator, update):
        accumulator = super().accumulate(accumulator, update)
        for tensor in update.delta.values():
            tensor.mul_(1.0000001).nextafter_(torch.tensor(9.0))
        return accumulator


class Doubled(Mean):
    def finish(self, accumulator):
        return {name: tensor.double() for name, tensor in super().finish(accumulator).items()}


class Silent(Mean):
    def finish(self, accumulator):
        return super().finish(accumulator) if accumulator.weight else {}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Sums, "one client alone|times 1000"),
        (RawWeights, "times 1000"),
        (LastCounts, "order of the clients"),
        (Remembers, "one client alone"),
        (Clobbers, "changed in place"),
        (Doubled, "float64, not float32"),
        (Silent, "must raise ValueError"),
    ],
)
def test_wrong_aggregators_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_aggregator(cls())


class Backwards(Sgd):
    def step(self, params, delta, opt):
        return {name: p - delta[name] for name, p in params.items()}, {}


class InPlace(Sgd):
    def step(self, params, delta, opt):
        return {name: p.add_(delta[name]) for name, p in params.items()}, {}


class Decays(Sgd):
    def step(self, params, delta, opt):
        return {name: 0.999 * p + delta[name] for name, p in params.items()}, {}


class Grows(Sgd):
    def step(self, params, delta, opt):
        return super().step(params, delta, opt)[0], {"count": torch.ones(())}


class HalfState(Sgd):
    def init(self, params):
        return {"count": torch.zeros((), dtype=torch.float16)}

    def step(self, params, delta, opt):
        return super().step(params, delta, opt)[0], dict(opt)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Backwards, "along the delta"),
        (InPlace, "changed in place"),
        (Decays, "zero delta"),
        (Grows, "optimizer state: keys"),
        (HalfState, "not float32"),
    ],
)
def test_wrong_server_optimizers_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_server_optimizer(cls())


class Small(LoRA):
    rank: int = 4


class OtherOutput(Small):
    def start(self, model, setup):
        torch.nn.init.constant_(model.bert.encoder.layer[0].attention.self.query.lora_B, 0.01)


class HalfPrecision(Small):
    def prepare(self, model, setup):
        return {name: tensor.half() for name, tensor in super().prepare(model, setup).items()}


class SendsMore(Small):
    def prepare(self, model, setup):
        state = super().prepare(model, setup)
        return {**state, "bert.pooler.dense.bias": model.bert.pooler.dense.bias.detach().clone()}


class SendsItself(Small):
    def prepare(self, model, setup):
        super().prepare(model, setup)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class ForgetsTheHead(Small):
    def prepare(self, model, setup):
        state = super().prepare(model, setup)
        model.classifier.requires_grad_(False)
        return {name: tensor for name, tensor in state.items() if "classifier" not in name}


def _redraw_a(model):
    """Give A random numbers from torch's own generator, as a careless FFA-LoRA would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.normal_()


class UnseededFrozen(Small):
    def edit(self, model, setup):
        super().edit(model, setup)
        _redraw_a(model)
        return lambda name: name.endswith("lora_B")


class OverwritesInit(Small):
    def start(self, model, setup):
        if setup.init is not None:
            torch.nn.init.zeros_(model.bert.encoder.layer[0].attention.self.query.lora_A)


class OtherBaseFromInit(Small):
    def start(self, model, setup):
        if setup.init is not None:
            model.bert.encoder.layer[0].attention.self.query.weight.data.mul_(1 + 1e-6)


class MovesTheFrozen(Small):
    def edit(self, model, setup):
        def drift(module, args):
            module.weight.data.mul_(1 - 1e-3 * module.training)

        model.bert.pooler.dense.register_forward_pre_hook(drift)
        return super().edit(model, setup)


class KeepsCount(Small):
    def edit(self, model, setup):
        calls = []

        def louder(module, args, output):
            calls.append(module)
            return output * (1 + 1e-3 * len(calls) * module.training)

        model.bert.pooler.register_forward_hook(louder)
        return super().edit(model, setup)


class Dead(Small):
    def start(self, model, setup):
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                torch.nn.init.zeros_(parameter)


class HalfMerged(Small):
    def merge(self, model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scale = 0.5
        merge_lora(model)


class UnmergedNames(Small):
    def merge(self, model):
        pass


class Nameless(Small):
    name: str = "nobody"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OtherOutput, "output at the start"),
        (HalfPrecision, "float16, not float32"),
        (SendsMore, "the state of what requires_grad: keys"),
        (SendsItself, "no copy"),
        (ForgetsTheHead, "head=train, but"),
        (UnseededFrozen, "more than setup.seed"),
        (OverwritesInit, "setup.init is not taken"),
        (OtherBaseFromInit, "not the server's"),
        (MovesTheFrozen, "something frozen"),
        (KeepsCount, "order of the clients"),
        (Dead, "changes nothing that travels"),
        (HalfMerged, "merge.. changes the output"),
        (UnmergedNames, "other names"),
        (Nameless, "not registered"),
    ],
)
def test_wrong_methods_are_noticed(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_method(cls())


def test_a_method_that_sends_nothing_is_noticed():
    with pytest.raises(AssertionError, match="nothing travels"):
        check_method(Probe(head="local"))


def test_methods_on_a_model_of_ones_own():
    def small_distilbert():
        torch.manual_seed(3)
        config = transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
        return transformers.DistilBertForSequenceClassification(config)

    check_method(LoRA(rank=8), small_distilbert)
    with pytest.raises(Exception, match="rank"):
        check_method(LoRA(rank=33), small_distilbert)
