"""The local loop, against training written out with plain torch."""

import csv
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from federa import run
from federa.client import ClientConfig, measured_precision, scheduled_lr
from federa.cpu import native
from federa.data.batches import training_batches
from federa.flat_parameters import FlatParameters
from federa.seeds import generator
from federa.server import make_jobs
from federa.types import Job
from running import build, configure, copy, furthest, same

SGD = {"client__optimizer": "sgd", "client__clip_norm": 0.0, "client__schedule": "constant"}
ONE_STEP = {"client__max_steps": 1, "client__dropout": 0.0}


def train(experiment, job=None, rows=None, params=None):
    job = job or Job(1, 0, 11, experiment.config.client.lr)
    rows = experiment.parts[job.client_id] if rows is None else rows
    update, _ = experiment.trainer.train(params or experiment.params, experiment.train, rows, job)
    return update


def batches_of(experiment, rows, job):
    """The batches of a job, one list an epoch."""
    config, lengths = experiment.config.client, experiment.train.lengths()
    return [
        list(training_batches(rows, lengths, config.batch_size, generator(job.seed, "batches", epoch)))
        for epoch in range(config.epochs)
    ]


def plain(experiment, rows, job, params, *, head_lr=None):
    """Train with torch alone: its optimizers over single parameters, its clipping, the penalty in the loss."""
    config, model = experiment.config.client, experiment.trainer.model
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in params.items():
            named[name].copy_(tensor)
    head = {n for n in named if "pooler" in n or n.startswith("classifier")}
    groups = [
        {
            "params": [p for n, p in named.items() if (p.ndim > 1) == decays and (n in head) == is_head],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": (head_lr or job.lr) if is_head else job.lr,
        }
        for decays in (True, False)
        for is_head in (True, False)
    ]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups)
    model.train()
    steps = [rows for epoch in batches_of(experiment, rows, job) for rows in epoch][: config.max_steps]
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        for batch in steps:
            optimizer.zero_grad()
            loss = model(**experiment.train.batch(batch, torch.device("cpu"))).loss
            penalty = sum((p - params[n]).square().sum() for n, p in named.items())
            (loss + config.proximal / 2 * penalty).backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(named.values(), config.clip_norm)
            optimizer.step()
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"method__name": "federa", "client__optimizer": "adamw", "client__weight_decay": 0.1},
        {"method__name": "ft", "client__optimizer": "sgd", "client__lr": 0.05, "client__momentum": 0.5},
    ],
    ids=["federa-adamw", "ft-sgd"],
)
def test_one_client_with_all_data_is_centralised_training(recipe, changes):
    """Two rounds, two epochs each, with the model's own dropout and with clipping that bites."""
    changes = {
        "partition": {"name": "iid", "clients": 1}, "cohort": 1, "rounds": 2, "evaluate_every": 0,
        "client__epochs": 2, "client__batch_size": 16, "client__clip_norm": 0.1, "client__schedule": "linear",
        **changes,
    }  # fmt: skip
    config = configure(recipe, **changes)
    result = run(config)

    twin = build(recipe, **changes)
    params, rows = copy(twin.params), np.arange(240)
    for number in (1, 2):
        (job,) = make_jobs(config, number, [240])
        params = plain(twin, rows, job, params)
    assert furthest(result.state.params, params) < 1e-5, (
        "AdamW makes steps of rounding: 4e-6 on some processors"
    )
    assert furthest(result.state.params, twin.params) > 1e-3, "something was learned at all"


def test_a_job_is_what_transformers_does_with_the_same_texts(recipe, train_csv, encoder):
    """Nothing of federa but the starting head: own reading, own tokens, own padding, own model."""
    changes = {**SGD, "method__name": "ft", "client__lr": 0.1, "client__dropout": 0.0}
    experiment = build(recipe, **changes)
    job, rows = Job(1, 0, 5, 0.1), np.arange(48)
    update = train(experiment, job, rows)

    with train_csv.open(newline="") as file:
        table = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in table})
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder("bert"), num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.load_state_dict(experiment.params, strict=False)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for batch in batches_of(experiment, rows, job)[0]:
        tokens = tokenizer([table[i]["text"] for i in batch], padding=True, return_tensors="pt")
        truth = torch.tensor([labels.index(table[i]["label"]) for i in batch])
        loss = nn.functional.cross_entropy(model(**tokens).logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = {name: p.detach() for name, p in model.named_parameters()}
    assert furthest({n: experiment.params[n] + d for n, d in update.delta.items()}, after) < 1e-5
    assert update.metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert update.weight == update.metrics["examples"] == 48
    assert update.metrics["steps"] == 6


def test_delta_is_local_minus_global(recipe):
    experiment = build(recipe, **SGD, **ONE_STEP)
    trainer, data = experiment.trainer, experiment.train
    job, rows = Job(1, 0, 5, 0.5), experiment.parts[0]
    update = train(experiment, job)
    ended = copy(trainer.flat.read(trainer.flat.master, trainer.shared))
    assert same(update.delta, {n: ended[n] - p for n, p in experiment.params.items()})

    def loss(params):
        outputs = np.concatenate([np.stack(o) for o in trainer.predict(params, data, [rows])])
        return float(
            nn.functional.cross_entropy(
                torch.from_numpy(outputs), torch.from_numpy(data.targets["labels"][rows])
            )
        )

    for sign, better in ((1, True), (-1, False)):
        moved = {n: p + sign * 0.05 * update.delta[n] for n, p in experiment.params.items()}
        assert (loss(moved) < loss(experiment.params)) is better


def test_one_sgd_step_is_lr_times_gradient_and_head_lr_is_the_heads(recipe):
    changes = {**SGD, **ONE_STEP, "client__lr": 0.2, "client__head_lr": 0.6}
    experiment, twin = build(recipe, **changes), build(recipe, **changes)
    for factor in (1.0, 0.5):  # the schedule halves both
        job = Job(1, 0, 5, 0.2 * factor)
        update = train(experiment, job)
        expected = plain(twin, twin.parts[0], job, twin.params, head_lr=0.6 * factor)
        assert furthest(update.delta, {n: expected[n] - p for n, p in twin.params.items()}) < 1e-7
    even = train(build(recipe, **{**changes, "client__head_lr": None}), job)
    for name, delta in even.delta.items():
        times = 3.0 if "pooler" in name or name.startswith("classifier") else 1.0
        assert torch.allclose(update.delta[name], times * delta, rtol=1e-4, atol=1e-8), name


def test_clipping_bounds_the_gradient_over_all_parameters_together(recipe):
    changes = {**SGD, **ONE_STEP, "client__lr": 1.0}
    free = train(build(recipe, **changes)).delta
    length = float(torch.cat([d.flatten() for d in free.values()]).norm())
    assert length > 0.02
    tight = train(build(recipe, **{**changes, "client__clip_norm": 0.01})).delta
    assert furthest(tight, {n: d * 0.01 / length for n, d in free.items()}) < 1e-6
    loose = train(build(recipe, **{**changes, "client__clip_norm": 2 * length})).delta
    assert same(loose, free)


def test_proximal_term_pulls_back_to_the_global_parameters(recipe):
    changes = {**SGD, "client__max_steps": 4, "client__lr": 0.3, "client__dropout": 0.0}
    rows, job = np.arange(240), Job(1, 0, 5, 0.3)
    free = train(build(recipe, **changes), job, rows).delta
    near = train(build(recipe, **{**changes, "client__proximal": 1.0}), job, rows).delta
    twin = build(recipe, **{**changes, "client__proximal": 1.0})
    expected = plain(twin, rows, job, twin.params)
    assert furthest(near, {n: expected[n] - p for n, p in twin.params.items()}) < 1e-6
    one, other = (sum(float(d.square().sum()) for d in delta.values()) for delta in (near, free))
    assert one < 0.8 * other
    first = {**changes, "client__max_steps": 1}
    without = train(build(recipe, **first), job, rows).delta
    with_it = train(build(recipe, **{**first, "client__proximal": 1.0}), job, rows).delta
    assert same(with_it, without), "at the first step there is nothing to pull back from"


def test_weight_decay_shrinks_matrices_only(recipe):
    changes = {**ONE_STEP, "method__name": "ft", "client__lr": 1e-3, "client__clip_norm": 0.0}
    experiment = build(recipe, **changes)
    without = train(experiment).delta
    decayed = train(build(recipe, **{**changes, "client__weight_decay": 0.5})).delta
    kinds = {False: 0, True: 0}
    for name, start in experiment.params.items():
        matrix = start.ndim > 1
        kinds[matrix] += 1
        expected = without[name] - (1e-3 * 0.5 * start if matrix else 0)
        assert torch.allclose(decayed[name], expected, rtol=0, atol=1e-7), name
        assert matrix or torch.equal(decayed[name], without[name]), name
    assert min(kinds.values()) > 5


SCHEDULES = [
    ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
    ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
    ({"schedule": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
    ({"schedule": "constant", "warmup_rounds": 2}, [1 / 3, 2 / 3, 1.0, 1.0]),
    ({"schedule": "linear", "warmup_rounds": 2}, [1 / 3, 2 / 3, 1.0, 0.5]),
    ({"schedule": "linear", "warmup_rounds": 9}, [0.1, 0.2, 0.3, 0.4]),
]


@pytest.mark.parametrize(("fields", "expected"), SCHEDULES, ids=lambda v: "-".join(map(str, v)))
def test_schedules(fields, expected):
    config = ClientConfig(lr=2e-3, **fields)
    rates = [scheduled_lr(config, number, 4) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([2e-3 * share for share in expected], rel=1e-5)


def test_steps_and_epochs(recipe):
    rows = np.arange(24)
    seen = {}
    for epochs, max_steps, steps in ((1, None, 3), (2, None, 6), (2, 4, 4), (1, 9, 3)):
        experiment = build(recipe, client__epochs=epochs, client__max_steps=max_steps)
        data, log = experiment.train, []
        batch = type(data).batch

        def spy(self, chosen, device, *, labels=True, log=log, batch=batch):
            log.append(chosen)
            return batch(self, chosen, device, labels=labels)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(data), "batch", spy)
            update = train(experiment, rows=rows)
        assert (update.metrics["steps"], update.metrics["examples"]) == (steps, 8 * steps)
        assert update.weight == 24, "the weight is what the client holds, not how often it saw it"
        seen[epochs, max_steps] = log
    first, second = seen[2, None][:3], seen[2, None][3:]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(rows), "an epoch sees every row once"
    assert [list(b) for b in first] != [list(b) for b in second]
    assert [list(b) for b in first] == [list(b) for b in seen[1, None]]


def test_dropout_follows_the_jobs_seed_and_leaves_the_generator_alone(recipe):
    experiment = build(recipe)
    assert experiment.trainer.model.config.hidden_dropout_prob == 0.1
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rows = np.arange(8)  # one batch: only dropout and its order can differ
    one = train(experiment, Job(1, 0, 5, 1e-3), rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(train(experiment, Job(1, 0, 5, 1e-3), rows).delta, one.delta)
    assert not same(train(experiment, Job(1, 0, 6, 1e-3), rows).delta, one.delta)
    dry = build(recipe, client__dropout=0.0)
    assert same(train(dry, Job(1, 0, 5, 1e-3), rows).delta, train(dry, Job(1, 0, 5, 1e-3), rows).delta)
    assert not same(train(dry, Job(1, 0, 5, 1e-3), rows).delta, one.delta)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_order_of_clients_does_not_matter_to_the_bit(recipe, precision):
    experiment = build(recipe, client__precision=precision)
    jobs = [Job(1, client, 100 + client, 3e-3) for client in range(4)]
    forth = {job.client_id: train(experiment, job) for job in jobs}
    list(experiment.predict(experiment.params, [np.arange(5)]))
    with torch.no_grad():  # whatever the resident model is left in
        experiment.trainer.flat.master.fill_(7.0)
        experiment.trainer.flat.gradient.fill_(float("nan"))
    back = {job.client_id: train(experiment, job) for job in reversed(jobs)}
    for client in forth:
        assert same(forth[client].delta, back[client].delta)
        assert forth[client].metrics["loss"] == back[client].metrics["loss"]
    assert not same(forth[0].delta, forth[1].delta)


def test_input_is_untouched_and_deltas_are_fresh(recipe):
    experiment = build(recipe)
    params = copy(experiment.params)
    first = train(experiment, Job(1, 0, 1, 3e-3), params=params)
    kept = copy(first.delta)
    second = train(experiment, Job(1, 1, 2, 3e-3), params=params)
    assert same(params, experiment.params)
    assert same(first.delta, kept), "a later job wrote into an earlier delta"
    storages = {t.untyped_storage().data_ptr() for t in first.delta.values()}
    for others in (second.delta.values(), params.values(), experiment.trainer.model.parameters()):
        assert not storages & {t.untyped_storage().data_ptr() for t in others}
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in first.delta.values())


def test_bf16_is_close_to_fp32_and_keeps_float32_masters(recipe):
    changes = {**SGD, "client__dropout": 0.0, "client__lr": 0.1}
    rows, job = np.arange(64), Job(1, 0, 3, 0.1)
    exact = train(build(recipe, **changes), job, rows)
    experiment = build(recipe, **changes, client__precision="bf16")
    rough = train(experiment, job, rows)
    assert {p.dtype for p in experiment.trainer.model.parameters()} == {torch.bfloat16}
    assert experiment.trainer.flat.master.dtype == torch.float32
    assert rough.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)
    assert rough.metrics["loss"] != exact.metrics["loss"]
    one, other = (torch.cat([d.flatten() for d in u.delta.values()]) for u in (exact, rough))
    assert float(nn.functional.cosine_similarity(one, other, dim=0)) > 0.99
    assert float((one - other).norm() / one.norm()) < 0.1
    # A step far below bfloat16's resolution of the parameters still counts.
    small = train(experiment, Job(1, 0, 3, 1e-5), rows).delta["classifier.weight"]
    assert 0 < float(small.abs().max()) < 1e-4


@pytest.mark.parametrize("kernels", [nullcontext, native.without], ids=["kernels", "no kernels"])
def test_a_bf16_step_is_that_of_a_float64_model(recipe, encoder, kernels):
    """Parameter by parameter, with padding, in a model through all of which gradients flow.

    Fresh matrices are so small that the head's gradient hides what the attention does: they are made larger.
    """
    changes = {**SGD, "method__name": "ft", "client__lr": 1.0, "client__dropout": 0.0}
    experiment = build(recipe, **changes, client__precision="bf16", client__batch_size=16)
    model, rows = experiment.trainer.model, np.arange(16)
    experiment.trainer.flat.load_(experiment.params)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(10)
                module.bias.normal_(std=0.2)
    start = {n: p.detach().float() for n, p in model.named_parameters()}

    truth = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder("bert"), num_labels=3, attn_implementation="eager"
    )
    truth.load_state_dict(start, strict=False)
    truth = truth.double().eval()
    batch = experiment.train.batch(rows, torch.device("cpu"))
    assert not batch["attention_mask"].all(), "some rows are padded"
    loss = truth(**batch).loss
    loss.backward()

    with kernels():
        update = train(experiment, Job(1, 0, 3, 1.0), rows, {n: start[n] for n in experiment.params})
    assert update.metrics["steps"] == 1
    assert update.metrics["loss"] == pytest.approx(loss.item(), rel=0.01)
    gradients = {n: p.grad for n, p in truth.named_parameters()}
    largest = max(float(gradients[n].norm()) for n in update.delta)
    for name, delta in update.delta.items():
        if name.endswith("key.bias"):  # moves all scores of a query alike: its gradient is truly zero
            assert delta.norm() < 1e-3 * largest, name
            continue
        assert gradients[name].norm() > 1e-3 * largest, f"{name} does not count"
        assert (delta + gradients[name]).norm() < 0.08 * gradients[name].norm(), name


# Less memory


@pytest.mark.parametrize("size", [1, 3, 8, 99])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_over_micro_batches_is_the_whole_batchs(recipe, size, precision):
    """Adaptive moments and clipping see the sum, not its parts; batches of 8, the last one shorter."""
    changes = {
        "client__dropout": 0.0,
        "client__clip_norm": 0.05,
        "client__proximal": 0.1,
        "client__precision": precision,
    }
    rows, job = np.arange(27), Job(1, 0, 5, 1e-3)
    whole = train(build(recipe, **changes, client__optimizer="sgd"), job, rows)
    parts = train(build(recipe, **changes, client__optimizer="sgd", client__micro_batch=size), job, rows)
    one, other = (torch.cat([d.flatten() for d in u.delta.values()]) for u in (whole, parts))
    assert float((one - other).norm() / one.norm()) < (1e-4 if precision == "fp32" else 0.05)
    assert parts.metrics["loss"] == pytest.approx(
        whole.metrics["loss"], rel=1e-5 if precision == "fp32" else 0.01
    )
    for key in ("steps", "examples"):
        assert parts.metrics[key] == whole.metrics[key]
    if size >= 8:
        assert same(parts.delta, whole.delta), "nothing to sum"


def test_micro_batches_are_no_larger_than_asked(recipe, monkeypatch):
    experiment = build(recipe, client__micro_batch=3)
    sizes, loss = [], experiment.trainer.task.__class__.loss

    def spy(task, output, inputs):
        sizes.append(len(inputs["input_ids"]))
        return loss(task, output, inputs)

    monkeypatch.setattr(experiment.trainer.task.__class__, "loss", spy)
    train(experiment, rows=np.arange(11))
    assert sorted(sizes) == [2, 3, 3, 3], "batches of 8 and of 3"


def test_gradients_of_parts_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    model = nn.Linear(1, 1, bias=False)
    flat = FlatParameters(model, frozenset(), bf16=True)
    for i in range(300):
        flat.backward_(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), add=i > 0)
    assert float(flat.gradient) == 300
    flat.backward_(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    assert float(flat.gradient) == 1


def gradient_with_dropout(experiment, rows):
    """One batch's gradient, and how often the first layer was computed for it."""
    model, flat = experiment.trainer.model, experiment.trainer.flat
    flat.load_(experiment.params)
    first = next(m for n, m in model.named_modules() if ".0." in n and isinstance(m, nn.Linear))
    calls = []
    hook = first.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        experiment.trainer.gradient_(experiment.train, rows)
        after = torch.rand(1)
    hook.remove()
    return flat.gradient.clone(), len(calls), after


@pytest.mark.parametrize("kernels", [nullcontext, native.without], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradient_with_dropout(recipe, encoder, family, precision, kernels):
    """The same masks the second time, whatever the family, and whoever draws them."""
    changes = {"model__name": str(encoder(family)), "method__name": "ft", "client__dropout": 0.3}
    changes["client__precision"] = precision
    with kernels():
        plain_one, once, after = gradient_with_dropout(build(recipe, **changes), np.arange(8))
        lean, twice, after_lean = gradient_with_dropout(
            build(recipe, **changes, client__checkpointing=True), np.arange(8)
        )
    assert twice == 2 * once > 0
    assert torch.equal(after, after_lean), "what is drawn later does not depend on it"
    assert float(plain_one.norm()) > 0.01
    assert float((plain_one - lean).norm() / plain_one.norm()) < 1e-6


def test_checkpointing_trains_low_rank_factors_alike(recipe):
    """Two steps of a client with the model's own dropout, over micro batches as well."""
    rows, job = np.arange(16), Job(1, 0, 5, 1e-3)
    for micro in (None, 2):
        plain_one, lean = (
            train(build(recipe, client__micro_batch=micro, client__checkpointing=on), job, rows)
            for on in (False, True)
        )
        assert furthest(plain_one.delta, lean.delta) < 1e-6
        assert lean.metrics["loss"] == pytest.approx(plain_one.metrics["loss"], rel=1e-6)


def test_predictions_are_those_of_the_state_that_is_given(recipe):
    experiment = build(recipe)
    rows = np.arange(10)
    (before,) = experiment.predict(experiment.params, [rows])
    train(experiment)
    (after,) = experiment.predict(experiment.params, [rows])
    assert np.array_equal(before, after)
    other = {**experiment.params, "classifier.bias": experiment.params["classifier.bias"] + 2.0}
    (moved,) = experiment.predict(other, [rows])
    assert np.allclose(np.stack(moved), np.stack(before) + 2.0, atol=1e-6)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    steps = experiment.predict(experiment.params, [rows[:5], rows[5:]])
    next(steps)
    assert not torch.is_inference_mode_enabled(), "the consumer between two batches is not in inference mode"


# Precision


def test_measured_precision_is_one_of_two():
    assert measured_precision(torch.device("cpu")) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.2, "fp32"), (1.0, "fp32"), (1.45, "fp32"), (1.55, "bf16"), (16.0, "bf16")]
)
def test_bfloat16_is_taken_where_its_product_is_faster_by_half(monkeypatch, gain, expected):
    """On a machine whose clock goes by its products alone; one in three takes ten times as long."""
    now, products = [0.0], itertools.count()

    def product(one, other):
        seconds = {torch.float32: 3e-3, torch.bfloat16: 3e-3 / gain}[one.dtype]
        assert one.dtype == other.dtype
        now[0] += seconds * (10 if next(products) % 3 == 0 else 1)
        return torch.zeros(1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr("federa.client.time.perf_counter", lambda: now[0])
    assert measured_precision(torch.device("cpu")) == expected
