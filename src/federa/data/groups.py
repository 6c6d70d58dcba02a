"""What a partition skews on: a task's own groups, a column, or clusters of sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from federa.types import FederaError, FloatArray, IntArray

CLUSTERS = "clusters"
UNKNOWN = -1  # the group of an evaluation example whose group no training example has
MAX_TOKENS = 64  # of a text that is embedded


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a run's examples.

    Attributes:
        names: in the order of their ids.
        train: `(num_train_examples,)` ids.
        evaluation: `(num_evaluation_examples,)` ids, `UNKNOWN` where the group does not occur in training.
    """

    names: list[str]
    train: IntArray
    evaluation: IntArray


def numbered(train: Sequence[str], evaluation: Sequence[str], first: Sequence[str] = ()) -> Groups:
    """Return groups by name as groups by number: some names first, all others sorted behind them."""
    names = [*first, *sorted(set(train) - set(first))]
    ids = {name: i for i, name in enumerate(names)}
    return Groups(
        names,
        np.array([ids[name] for name in train], dtype=np.int64),
        np.array([ids.get(name, UNKNOWN) for name in evaluation], dtype=np.int64),
    )


def column_values(table: Any, column: str, what: str) -> list[str]:
    """Return a column's values as words.

    Raises:
        FederaError: no such column.
    """
    if column not in table.column_names:
        raise FederaError(
            f"{what}: the table has no column {column!r}; it has {', '.join(table.column_names)}"
        )
    return [str(value) for value in table[column]]


def clustered(train: FloatArray, evaluation: FloatArray, clusters: int, seed: int) -> Groups:
    """Return k-means clusters (FedNLP's groups for tasks without a label) as groups.

    Args:
        train: `(num_train_examples, width)` embeddings, on which the centres are found.
        evaluation: `(num_evaluation_examples, width)`; each joins the nearest centre.
        clusters: how many.
        seed: of the first centres.

    Raises:
        FederaError: fewer examples than clusters.
    """
    if len(train) < clusters:
        raise FederaError(f"task.clusters: {clusters} clusters of {len(train)} training examples")
    from sklearn.cluster import KMeans  # half a second of every start

    with threadpool_limits(1):  # a sum's last bits depend on the number of threads, and a border on them
        found = KMeans(clusters, n_init=1, random_state=seed).fit(train)
        ids = found.predict(evaluation) if len(evaluation) else np.zeros(0)
    width = len(str(clusters - 1))
    names = [f"cluster {i:0{width}d}" for i in range(clusters)]
    return Groups(names, found.labels_.astype(np.int64), ids.astype(np.int64))


def embeddings(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> FloatArray:
    """Return the mean of the encoder's last hidden states of every text, of length one, `(texts, width)`.

    Args:
        model: a pretrained transformers model; its encoder is used, as it is, without dropout.
        tokenizer: its own.
        texts: cut at 64 tokens.
        batch_size: texts at a time; texts of like length go together.
    """
    encoder = model.base_model
    training, threads = encoder.training, torch.get_num_threads()
    encoder.eval()
    torch.set_num_threads(1)  # a partition must not depend on how many there are
    order = np.argsort([len(text) for text in texts], kind="stable")
    width = min(MAX_TOKENS, tokenizer.model_max_length)
    out = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=width, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        out[rows] = mean.numpy()
    encoder.train(training)
    torch.set_num_threads(threads)
    return out
