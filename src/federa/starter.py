"""`federa init`: a commented recipe for one's own data."""

from __future__ import annotations

from pathlib import Path

import yaml

from federa.data.datasets import read_table
from federa.registry import nearest
from federa.state import write_atomically
from federa.types import FederaError

_TEXT_NAMES = ("text", "sentence", "document", "review", "content", "body", "message", "description")
_LABEL_NAMES = ("label", "label_name", "class", "category", "target", "topic", "intent")
_TOKEN_NAMES, _TAG_NAMES = ("tokens", "words"), ("tags", "ner_tags", "labels")
_QA_NAMES = ("question", "context", "answers")

TEMPLATE = """\
# A federa recipe. Run it with:  federa run {name}
# Change a key for one run with: federa run {name} method.name=lora rounds=30
# See who would hold what with:  federa run {name} --dry-run
# `federa list` shows every method, partition, aggregator and engine with its keys.

seed: 0                 # of everything random
rounds: 20              # of federated training
cohort: {cohort}               # clients drawn for each round
evaluate_every: 1       # rounds; 0 evaluates at the end only
# final_mean_of: 5      # evaluations, the last ones, whose mean is the final score
# target: 0.9           # stop when the metric reaches this

model:
  name: {model}          # a local folder, a hub name (roberta-base, microsoft/deberta-v3-base), or minilm

data:
  train: {train}
{test}{columns}
task:
  name: {task}
  max_length: {length}       # tokens; longer texts are {longer}

method:
  name: federa          # federa, lora, adapter, bitfit or ft
  rank: 32              # of the low-rank factors
  targets: [query, value]   # or all-linear
  head: train           # train (averaged), freeze, or local (each client keeps its own)

partition:              # how the rows are dealt out in this simulation
  name: dirichlet       # iid, dirichlet, fednlp, quantity, pathological, natural
  clients: {clients}
  alpha: 0.5            # smaller is more skewed

client:
  epochs: 1             # passes over a client's rows in a round
  batch_size: 16
  # micro_batch: 4      # examples in memory at once, where a batch does not fit; the step is the same
  # lr: 1e-3            # the method's own default if left out
  weight_decay: 0.0
  precision: auto       # auto, fp32 or bf16

aggregator: mean        # mean, median, trimmed_mean, clipped_mean
server_optimizer: sgd   # sgd (plain averaging), momentum, adam, yogi
engine: processes       # processes (one worker a core) or serial
"""
NO_TEST = "  # test: test.csv      # without one, a fifth of train is held out\n"


def write_recipe(
    to: Path,
    *,
    train: str,
    test: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    model: str = "minilm",
    clients: int = 20,
) -> Path:
    """Write a commented recipe whose columns are those of the data.

    Args:
        to: the file, which must not exist.
        train: the training file.
        test: the test file, if there is one.
        text_column: found by its name if not given.
        label_column: likewise.
        model: the encoder.
        clients: of the simulated federation.

    Raises:
        FederaError: the file exists, or columns that are not there or cannot be told apart.
    """
    if to.exists():
        raise FederaError(f"{to} exists; give another name, or remove it")
    table = read_table(train, "--train")
    columns: list[str] = list(table.column_names)
    if test is not None:
        read_table(test, "--test")
    if clients < 1:
        raise FederaError(f"--clients {clients}: at least one is needed")
    for given in (text_column, label_column):
        if given is not None and given not in columns:
            hint = nearest(given, columns)
            raise FederaError(f"{train} has no column {given!r}{hint}; it has {', '.join(columns)}")
    task, chosen = _task(train, columns, text_column, label_column)
    content = TEMPLATE.format(
        name=to.name,
        model=_scalar(_absolute(model) if Path(model).expanduser().is_dir() else model),
        train=_scalar(_absolute(train)),
        test=f"  test: {_scalar(_absolute(test))}\n" if test else NO_TEST,
        columns="".join(f"  {key}: {_scalar(column)}\n" for key, column in chosen.items()),
        task=task,
        length=384 if task == "qa" else 128,
        longer="cut" if task == "classification" else "split into windows",
        clients=clients,
        cohort=min(5, clients),
    )
    write_atomically(to, content.encode())
    return to


def _task(train: str, columns: list[str], text: str | None, label: str | None) -> tuple[str, dict[str, str]]:
    """Return the task that the columns are of, and which column holds what.

    Raises:
        FederaError: the columns do not tell.
    """
    if text is None and label is None:
        tokens, tags = (
            next((c for c in names if c in columns), None) for names in (_TOKEN_NAMES, _TAG_NAMES)
        )
        if tokens is not None and tags is not None:
            return "ner", {"tokens_column": tokens, "tags_column": tags}
        if all(name in columns for name in _QA_NAMES):
            return "qa", {f"{name}_column": name for name in _QA_NAMES}
    text = text or next((c for c in _TEXT_NAMES if c in columns), None)
    label = label or next((c for c in _LABEL_NAMES if c in columns), None)
    if text is None or label is None:
        missing = "--text-column" if text is None else "--label-column"
        raise FederaError(
            f"cannot tell which column of {train} is which; give {missing} ({', '.join(columns)})"
        )
    return "classification", {"text_column": text, "label_column": label}


def _scalar(text: str) -> str:
    """Return a word as YAML that reads back as this very word: as it is, or in quotes."""
    return yaml.safe_dump([text], allow_unicode=True, width=10**6)[2:].rstrip()


def _absolute(path: str) -> str:
    """Return a path as the recipe gives it: absolute, so that the recipe runs from anywhere."""
    return str(Path(path).expanduser().resolve())
