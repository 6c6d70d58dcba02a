"""From a recipe to everything that a process needs to play its part: the one builder for all of them."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from federa import gpu
from federa.client import Trainer, measured_precision
from federa.config import RunConfig
from federa.cpu import speed_up
from federa.cpu.frozen import pack_all
from federa.data.batches import Encoded, Ragged, evaluation_batches
from federa.data.datasets import Splits, read_splits
from federa.data.groups import CLUSTERS, Groups, clustered, column_values, embeddings, numbered
from federa.data.partition import group_counts, partition_examples
from federa.data.tokenised import tokenised
from federa.engines.base import give_back_freed_memory
from federa.kept import KeptStates
from federa.masks import use_ready_masks
from federa.methods import Setup
from federa.models import Pretrained, load_pretrained, pick_device, require_base
from federa.seeds import generator, seed_for
from federa.server import make_jobs
from federa.state import num_bytes, num_parameters
from federa.types import FederaError, FloatArray, IntArray, Job, RoundFailedError, State, Update

CLIENT_TEST_EXAMPLES = 200  # at most so many evaluation examples stand for one client


@dataclass(frozen=True, slots=True)
class Experiment:
    """A run's fixed parts; what changes from round to round is in `ServerState`.

    Attributes:
        config: the recipe, resolved.
        trainer: the resident model.
        train: the training set; a client's part of it is `parts[client]`.
        evaluation: what the server evaluates on.
        parts: row numbers of each client, of whole examples.
        params: the round-0 state that travels.
        kept: what clients keep for themselves.
        remainders: what rounding took away from their updates, where they keep that.
        labels: label names.
        groups: what the partition skews on.
        trained_on: how many evaluation examples read like a training example to the model; None where the
            training data are elsewhere.
        fingerprint: of the pretrained encoder.
        tokenizer: the model's.
        counts: examples by client and group, `(clients, groups)`.
        sizes: counts of parameters: `total_parameters`, `trainable_parameters`, `travelling_parameters`,
            `head_parameters`, `start_bytes` (what a client must be sent once beside the current state).
        seconds: what the parts of the start took.
    """

    config: RunConfig
    trainer: Trainer
    train: Encoded
    evaluation: Encoded
    parts: list[IntArray]
    params: State
    kept: KeptStates
    remainders: KeptStates
    labels: list[str]
    groups: Groups
    trained_on: int | None
    fingerprint: str
    tokenizer: Any
    counts: IntArray
    sizes: dict[str, int]
    seconds: dict[str, float]

    def train_client(self, params: State, job: Job) -> Update:
        """Return a client's update; what it keeps for itself is put away.

        Raises:
            RoundFailedError: the client failed; says which, and in what round.
        """
        try:
            rows = self.parts[job.client_id]
            update, kept = self.trainer.train(params, self.train, rows, job, self.kept.load(job))
        except FederaError:
            raise
        except Exception as error:
            text = f"round {job.round}: client {job.client_id} failed: {type(error).__name__}: {error}"
            raise RoundFailedError(f"{text}. The last good state is kept") from error
        self.kept.save(job, kept)
        return update

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """Yield outputs for batches of evaluation rows; with a job, those of its client's own head."""
        local = self.kept.load(job) if job is not None else self.kept.start
        return self.trainer.predict(params, self.evaluation, batches, local)

    def trained_clients(self, rounds: int) -> list[int]:
        """Return the clients that any cohort of the first rounds held."""
        sizes = [len(part) for part in self.parts]
        drawn = {j.client_id for r in range(1, rounds + 1) for j in make_jobs(self.config, r, sizes)}
        return sorted(drawn)

    def data_fingerprint(self, parts: bool = True) -> str:
        """Return a SHA-256 of all examples, labels and the partition: a resumed run must find the same.

        Without the parts it is the same for every seed and skew.
        """
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for data in (self.train, self.evaluation):
            for held in (*data.features.values(), *data.targets.values(), data.example):
                arrays = [held.values, held.offsets] if isinstance(held, Ragged) else [held]
                for array in arrays if held is not None else ():
                    digest.update(np.ascontiguousarray(array).data)
        for part in self.parts if parts else ():
            digest.update(part.data)
        return digest.hexdigest()

    def client_examples(self, client: int) -> IntArray:
        """Return evaluation examples that stand for a client: drawn at random with its mix of groups.

        The global evaluation set has no clients, so a client's test set is drawn to have the shares of groups
        that its training examples have (at most 200, none twice).
        """
        groups = self.groups.evaluation
        share = self.counts[client] / max(1, self.counts[client].sum())
        available = np.bincount(groups[groups >= 0], minlength=len(share))
        held = (share > 0) & (available > 0)
        if not held.any():
            return np.zeros(0, dtype=np.int64)
        # As many examples as keep the mix without using one twice, but one at least.
        total = max(1, min(CLIENT_TEST_EXAMPLES, int(np.min(available[held] / share[held]))))
        wanted = np.where(held, np.minimum(np.rint(share * total).astype(np.int64), available), 0)
        if not wanted.any():
            wanted[np.argmax(np.where(held, share, 0))] = 1
        rng = generator(self.config.seed, "client-test", client)
        chosen = [
            rng.choice(np.flatnonzero(groups == g), wanted[g], replace=False) for g in np.flatnonzero(wanted)
        ]
        return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)

    def batches(self, rows: IntArray) -> list[IntArray]:
        """Return batches of evaluation rows."""
        return evaluation_batches(rows, self.evaluation.lengths(), self.config.evaluate_batch_size)


def resolve(config: RunConfig) -> RunConfig:
    """Return the recipe with what `auto` stands for on this machine; a resumed run keeps it."""
    changes: dict[str, str] = {}
    if config.device == "auto":
        changes["device"] = pick_device("auto").type
    if config.client.precision == "auto":
        changes["client.precision"] = measured_precision(pick_device(config.device))
    return config.replace(**changes) if changes else config


def load_model(config: RunConfig, labels: Sequence[str]) -> Pretrained:
    """Return the recipe's pretrained model with a head for its task, on the CPU, in float32."""
    on_cpu = config.device == "cpu" or (config.device == "auto" and pick_device("auto").type == "cpu")
    return load_pretrained(
        config.model,
        config.task.auto_class,
        labels,
        seed=seed_for(config.seed, "head"),
        dropout=config.client.dropout,
        attention="eager" if on_cpu else None,
        added_tokens=config.task.added_tokens,
    )


def build_experiment(
    config: RunConfig,
    init: State | None = None,
    kept: Path | None = None,
    *,
    base: str | None = None,
    cache: Path | None = None,
) -> Experiment:
    """Read, tokenise, partition, load and prepare all that a recipe names.

    Args:
        config: the recipe, resolved.
        init: the round-0 state where there is one already; None computes it.
        kept: the folder for what clients keep; None for a temporary one.
        base: the fingerprint that the pretrained encoder must have; None where there is none yet.
        cache: a folder for computed starts; None to keep nothing.

    Raises:
        FederaError: anything in the recipe that does not fit the data, the model or this machine.
    """
    pick_device(config.device)  # a device that is not there is said before anything is read
    seconds, began = {}, time.perf_counter()
    splits = read_splits(config.data, config.task)
    with splits.training.named():
        labels = config.task.labels(splits.train, config.data)
    seconds["read"] = time.perf_counter() - began
    began = time.perf_counter()
    loaded = load_model(config, labels)
    if base is not None:
        require_base(loaded, base, config.model.name)
    seconds["load"] = time.perf_counter() - began
    began = time.perf_counter()
    with splits.training.named():
        train = encoded(config, splits.train, loaded.tokenizer, labels)
    with splits.evaluated.named():
        evaluation = encoded(config, splits.evaluation, loaded.tokenizer, labels)
    seconds["tokenise"] = time.perf_counter() - began
    began = time.perf_counter()
    groups = group_examples(config, splits, loaded, labels)
    held = _partition(config, splits.train, groups.train)
    parts = [train.rows_of(examples) for examples in held]
    seconds["partition"] = time.perf_counter() - began
    if config.method.head == "local":
        _require_known_groups(groups)
    began = time.perf_counter()
    ready = prepare(config, loaded, init, cache)
    seconds["prepare"] = time.perf_counter() - began
    return Experiment(
        config=config,
        trainer=ready.trainer,
        train=train,
        evaluation=evaluation,
        parts=parts,
        params=ready.params,
        kept=KeptStates(kept, ready.local),
        remainders=remainders(config, ready.params, kept),
        labels=labels,
        groups=groups,
        trained_on=evaluation.num_among(train),
        fingerprint=loaded.fingerprint,
        tokenizer=loaded.tokenizer,
        counts=group_counts(held, groups.train, len(groups.names)),
        sizes=ready.sizes,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to train, and where it starts.

    Attributes:
        trainer: has the model, on the recipe's device.
        params: the round-0 state that travels.
        local: the round-0 state that clients keep for themselves.
        sizes: as in `Experiment`.
    """

    trainer: Trainer
    params: State
    local: State
    sizes: dict[str, int]


def prepare(config: RunConfig, loaded: Pretrained, init: State | None, cache: Path | None = None) -> Prepared:
    """Let the recipe's method prepare a pretrained model.

    Args:
        config: the recipe, resolved.
        loaded: the pretrained model; it is changed.
        init: the round-0 state where there is one already; None computes it.
        cache: a folder for computed starts; None to keep nothing.

    Raises:
        FederaError: the method does not fit the model, or the state does not fit the method.
    """
    setup = Setup(loaded.head, seed_for(config.seed, "start"), init, loaded.fingerprint, cache)
    start = config.method.prepare(loaded.model, setup)
    local = frozenset(loaded.head if config.method.head == "local" else ())
    params = {name: t for name, t in start.items() if name not in local}
    sizes = _sizes(config, loaded, start, params)
    device = pick_device(config.device)
    if device.type == "cpu":
        speed_up(loaded.model)
    elif device.type == "cuda":
        gpu.speed_up(loaded.model)
    else:
        use_ready_masks(loaded.model)
    model = loaded.model.to(device)
    trainer = Trainer(model, loaded.head, local, config.task, config.client)
    pack_all(model)
    give_back_freed_memory()
    return Prepared(trainer, params, {name: t for name, t in start.items() if name in local}, sizes)


def remainders(config: RunConfig, params: State, kept: Path | None) -> KeptStates:
    """Return where clients keep what rounding takes away from their updates: zeros at first."""
    start = {n: torch.zeros_like(t) for n, t in params.items()} if config.wire.remembers else {}
    return KeptStates(kept and kept / "wire", start)


def encoded(config: RunConfig, table: Any, tokenizer: Any, labels: Sequence[str]) -> Encoded:
    """Return a table as the recipe's task encodes it; the same content is encoded once.

    Raises:
        FederaError: a row that the task cannot use.
    """
    task, data = config.task, config.data
    encode = functools.partial(task.encode, table, data, tokenizer, labels)
    return tokenised(encode, table, tokenizer, task, data, labels)


def _require_known_groups(groups: Groups) -> None:
    """Raise unless evaluation examples can stand for clients, on which alone local heads are measured."""
    if not np.isin(groups.evaluation, groups.train).any():
        raise FederaError(
            "method.head=local: no client's group has evaluation examples, so no head could be measured; "
            "set task.group_by to a column whose values the evaluation set has too"
        )


def _sizes(config: RunConfig, loaded: Pretrained, start: State, travelling: State) -> dict[str, int]:
    """Return the counts of `Experiment.sizes` for a prepared model."""
    factors = {n: t for n, t in travelling.items() if n not in loaded.head}
    return {
        "total_parameters": num_parameters(loaded.model.parameters()),
        "trainable_parameters": num_parameters(start.values()),
        "travelling_parameters": num_parameters(travelling.values()),
        "head_parameters": num_parameters(p for n, p in loaded.model.named_parameters() if n in loaded.head),
        "start_bytes": num_bytes(factors) if config.method.moves_base else 0,
    }


def group_examples(config: RunConfig, splits: Splits, loaded: Pretrained, labels: Sequence[str]) -> Groups:
    """Return what the recipe's partition skews on, for training and evaluation examples.

    Raises:
        FederaError: a column that is not there, or more clusters than examples.
    """
    task, tables = config.task, (splits.train, splits.evaluation)
    by = task.group_by
    if by is None:
        own, others = (task.groups(table, config.data) for table in tables)
        if own is not None and others is not None:
            return numbered(own, others, labels if {*own} <= {*labels} else ())
        by = getattr(config.partition, "column", None)  # no need to cluster what is parted by a column
    if by is not None and by != CLUSTERS:
        key = "task.group_by" if task.group_by is not None else "partition.column"
        train = column_values(splits.train, by, key)
        test = by in splits.evaluation.column_names
        return numbered(
            train,
            column_values(splits.evaluation, by, "task.group_by") if test else [""] * len(splits.evaluation),
        )
    if by is None and not config.partition.skews:  # nobody asks for clusters, which cost a pass of the model
        return numbered(["all"] * len(splits.train), ["all"] * len(splits.evaluation))
    one, other = (embeddings(loaded.model, loaded.tokenizer, task.texts(t, config.data)) for t in tables)
    return clustered(one, other, task.clusters, seed_for(config.seed, "clusters") % 2**32)


def _partition(config: RunConfig, table: Any, groups: IntArray) -> list[IntArray]:
    """Split the training examples, by their groups or by the column that the partitioner names."""
    column = getattr(config.partition, "column", None)
    if column is not None:
        values = column_values(table, column, "partition.column")
        groups = np.unique(values, return_inverse=True)[1].astype(np.int64)
    parts = partition_examples(config.partition, groups, config.seed)
    if config.cohort > len(parts):
        raise FederaError(
            f"cohort: {config.cohort} clients a round, but the partition has {len(parts)} clients"
        )
    return parts
