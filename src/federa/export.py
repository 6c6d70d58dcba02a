"""From a finished run to files that the rest of the ecosystem opens, and to predictions."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from federa.checkpoint import RunDirectory
from federa.config import RunConfig, parse_config, read_yaml
from federa.data.batches import Encoded
from federa.data.datasets import DataConfig, read_table, require_columns
from federa.experiment import load_model
from federa.methods import Setup
from federa.methods.base import ExportFormat
from federa.methods.lora import lora_layers
from federa.models import require_base, resolve_model
from federa.seeds import seed_for
from federa.state import load_state
from federa.tasks import Task
from federa.types import FederaError, State

Example: TypeAlias = str | Sequence[str] | Mapping[str, Any]
Table = datasets.Dataset
KINDS = ("text", "a list of words")
FORMATS: tuple[ExportFormat, ...] = ("peft", "merged", "federa")
_FOLDER_FILES = ("config.yaml", "labels.json", "init.safetensors", "checkpoint/state.safetensors")


def _kind(cell: Any) -> str:
    """Return what a cell of an example is, as `KINDS` or else."""
    if isinstance(cell, str):
        return "text"
    words = isinstance(cell, (list, tuple)) and all(isinstance(word, str) for word in cell)
    return "a list of words" if words else type(cell).__name__


@dataclass(frozen=True, slots=True)
class Predictor:
    """A trained model ready to use.

    Attributes:
        model: float32, in evaluation mode, on the CPU.
        tokenizer: its tokenizer.
        labels: label names, in the order of their ids.
        task: what it was trained for.
        columns: the columns of the run's data that a prediction needs: a text, a question and its context.
    """

    model: nn.Module
    tokenizer: Any
    labels: list[str]
    task: Task
    columns: tuple[str, ...]
    data: DataConfig

    def table(self, examples: Sequence[Example]) -> Any:
        """Return examples as a table with the run's columns.

        Raises:
            FederaError: an example that is not of the run's kind; it names it.
        """
        rows = [self._cells(example, row) for row, example in enumerate(examples)]
        for i, name in enumerate(self.columns):
            kinds = [_kind(row[i]) for row in rows]
            odd = next((row for row, kind in enumerate(kinds) if kind not in KINDS or kind != kinds[0]), None)
            if odd is not None:
                raise FederaError(
                    f"example {odd}: {name}: expected {kinds[0] if kinds[0] in KINDS else 'text'}, "
                    f"got {rows[odd][i]!r:.80}"
                )
        return Table.from_dict({name: [row[i] for row in rows] for i, name in enumerate(self.columns)})

    def _cells(self, example: Example, row: int) -> Sequence[Any]:
        width = len(self.columns)
        if isinstance(example, Mapping) and all(column in example for column in self.columns):
            return [example[column] for column in self.columns]
        if width == 1 and isinstance(example, str):
            return [self.task.from_text(example)]
        if width == 1 and isinstance(example, list):
            return [example]
        if width > 1 and isinstance(example, (tuple, list)) and len(example) == width:
            return example
        raise FederaError(f"example {row}: this run reads {' and '.join(self.columns)}, got {example!r:.80}")

    def _encoded(self, examples: Sequence[Example]) -> Encoded:
        return self.task.encode(self.table(examples), self.data, self.tokenizer, None)

    def _forward(self, encoded: Encoded, batch_size: int) -> Iterator[Tensor]:
        for first in range(0, len(encoded), batch_size):
            rows = np.arange(first, min(first + batch_size, len(encoded)))
            with torch.inference_mode():  # not while the caller has the word
                outputs = self.task.outputs(self.model(**encoded.batch(rows, torch.device("cpu"))))
            yield outputs

    def outputs(self, examples: Sequence[Example], batch_size: int = 32) -> Iterator[Tensor]:
        """Yield the model's outputs batch by batch: the logits, `(batch, num_labels)`, of a classifier."""
        if len(examples):
            yield from self._forward(self._encoded(examples), batch_size)

    def predict(self, examples: Sequence[Example], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Yield a prediction for every example, as `Task.show` gives it: `label` and `probability` of a text.

        Args:
            examples: texts, pairs of texts (tuples, in the order of `columns`), lists of words, or mappings
                with the run's columns.
            batch_size: rows at a time.

        Raises:
            FederaError: an example that is not of the run's kind; it names it.
        """
        if not len(examples):
            return
        encoded = self._encoded(examples)
        waiting: list[Any] = []  # rows of the examples from `done` on
        done = 0
        for outputs in self._forward(encoded, batch_size):
            waiting.extend(outputs.float().numpy())
            whole = encoded.num_whole(len(encoded.rows_of(np.arange(done))) + len(waiting))
            ready = np.arange(done, whole)
            rows = len(encoded.rows_of(ready))
            for one in self.task.decode(waiting[:rows], encoded, ready) if len(ready) else ():
                yield self.task.show(one, self.labels)
            waiting, done = waiting[rows:], whole


def read_examples(file: Path | None, columns: tuple[str, ...], first: str | None = None) -> list[Example]:
    """Return what to predict: the rows of a table, or the lines of a file or of standard input.

    Args:
        file: a table (.csv, .jsonl, .parquet, .conll, ...), a text file (.txt, or of no ending), or None.
        columns: what a prediction needs.
        first: the table's column that stands for the first of them.

    Raises:
        FederaError: a file or column that is not there, or lines where more than one column is needed.
    """
    if file is not None and file.suffix.lower() not in ("", ".txt"):
        table = read_table(str(file), "predict")
        found = (first or columns[0], *columns[1:])
        require_columns(table, str(file), found)
        values = zip(*(table[column] for column in found), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]
    if len(columns) > 1:
        raise FederaError(f"this run reads {' and '.join(columns)}; give a table with these columns")
    if file is not None and not file.is_file():
        raise FederaError(f"{file} does not exist")
    try:
        content = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FederaError(f"{file or 'standard input'} is not text in UTF-8") from error
    # A line ends at a newline and nowhere else: texts may hold form feeds and Unicode's separators.
    content = content.removeprefix("\ufeff").rstrip()
    lines = [line.removesuffix("\r") for line in content.split("\n")] if content else []
    blank = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
    if blank is not None:
        raise FederaError(f"line {blank} of {file or 'standard input'} is blank; give one text a line")
    return lines


@dataclass(frozen=True, slots=True)
class _Restored:
    config: RunConfig
    labels: list[str]
    model: Any
    tokenizer: Any
    head: frozenset[str]
    init: State


def _restore(folder: Path) -> _Restored:
    """Rebuild a run's trained model in float32.

    Raises:
        FederaError: not a run directory, no checkpoint yet, another base, or heads that only clients have.
    """
    run = RunDirectory(folder)
    run.require()
    config = parse_config(read_yaml(run.config))
    if config.method.head == "local":
        raise FederaError(
            f"{folder}: with method.head=local every client has its own head; there is no global model"
        )
    stored = run.read_json("labels.json")
    if stored is None or not run.state.is_file():
        raise FederaError(
            f"{folder} has no finished round yet; run it on with: federa run --resume --out {folder}"
        )
    init, metadata = load_state(run.init)
    loaded = load_model(config, stored["labels"])
    require_base(loaded, metadata.get("fingerprint"), config.model.name)
    setup = Setup(loaded.head, seed_for(config.seed, "start"), init, loaded.fingerprint)
    config.method.prepare(loaded.model, setup)
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, tensor in run.load_checkpoint().params.items():
            parameters[name].copy_(tensor)
    loaded.model.eval()
    return _Restored(config, stored["labels"], loaded.model, loaded.tokenizer, loaded.head, init)


def load(folder: Path | str) -> Predictor:
    """Return the trained model of a run directory, or of an export in federa's own format.

    Raises:
        FederaError: the folder is neither, or its base model is not to be had.
    """
    restored = _restore(Path(folder))
    task, data = restored.config.task, restored.config.data
    columns = tuple(task.inputs(data))
    return Predictor(restored.model, restored.tokenizer, restored.labels, task, columns, data)


def export(folder: Path | str, to: Path | str, format: ExportFormat | None = None) -> Path:
    """Write a run's trained model for others to open.

    Args:
        folder: the run directory.
        to: the folder to write, which must not exist or be empty.
        format: `peft` (LoRA and FeDeRA: opens with `PeftModel.from_pretrained` on the pristine base),
            `merged` (a plain checkpoint for the transformers auto classes), `federa` (opens with
            `federa.load`); None for the first that the method has.

    Raises:
        FederaError: a format that the method does not have, or a folder that is not empty.
    """
    target = Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FederaError(f"--to {target} is not empty; give another folder")
    run = RunDirectory(Path(folder))
    run.require()
    method = parse_config(read_yaml(run.config)).method
    chosen: ExportFormat = format or method.export_formats[0]
    if chosen not in method.export_formats:
        raise FederaError(
            f"--format {chosen}: method {method.name!r} can be exported as "
            f"{' or '.join(method.export_formats)}"
        )
    restored = _restore(run.path)
    if chosen == "peft" and restored.config.task.added_tokens:
        raise FederaError(
            "--format peft: with task.added_tokens the base is not the pristine one; use --format merged"
        )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if chosen == "peft":
            _write_peft(restored, partial)
        elif chosen == "merged":
            method.merge(restored.model)
            restored.model.save_pretrained(partial)
            restored.tokenizer.save_pretrained(partial)
        else:
            for name in _FOLDER_FILES:
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(run.path / name, partial / name)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_peft(restored: _Restored, to: Path) -> None:
    """Write an adapter folder that PEFT opens on the pristine checkpoint.

    Where the base was moved to W - s*B0*A0, as FeDeRA's is, the change to W is
    s*(B*A - B0*A0) = s*[B | -B0] [A ; A0]: a plain LoRA of twice the rank.
    """
    method, model = restored.config.method, restored.model
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if method.moves_base:
            a = torch.cat([a, restored.init[f"{name}.lora_A"]], dim=0)
            b = torch.cat([b, -restored.init[f"{name}.lora_B"]], dim=1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        if layer.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude.detach().contiguous()
    for name in sorted(restored.head):
        tensors[f"base_model.model.{name}"] = model.get_parameter(name).detach().contiguous()
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    (to / "adapter_config.json").write_text(json.dumps(_peft_config(restored), indent=2) + "\n")
    restored.tokenizer.save_pretrained(to)
    (to / "README.md").write_text(
        f"# {method.name} adapter\n\nTrained with federa on {restored.config.model.name}. "
        f"Labels, in order: {', '.join(restored.labels)}.\n\n"
        f"```python\nbase = {restored.config.task.auto_class}.from_pretrained("
        f'"{_base_of(restored)}", num_labels={len(restored.labels)})\n'
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")\n```\n'
    )


def _base_of(restored: _Restored) -> str:
    """Return what the transformers auto classes find the pristine checkpoint by."""
    return resolve_model(restored.config.model.name)


def _peft_config(restored: _Restored) -> dict[str, Any]:
    """Return the content of `adapter_config.json` (the fields of peft's LoraConfig that are not defaults).

    rsLoRA needs no flag: its scale is in `lora_alpha`.
    """
    layers = dict(lora_layers(restored.model))
    first = next(iter(layers.values()))
    rank = len(first.lora_A) * (2 if restored.config.method.moves_base else 1)
    return {
        "peft_type": "LORA",
        "task_type": restored.config.task.peft_type,
        "base_model_name_or_path": _base_of(restored),
        "r": rank,
        "lora_alpha": first.scale * rank,
        "use_dora": first.magnitude is not None,
        "target_modules": list(layers),
        "modules_to_save": _top_modules(restored.model, restored.head),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _top_modules(model: nn.Module, names: frozenset[str]) -> list[str]:
    """Return the largest modules all of whose parameters are among the names, by their full names."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{p}" for p, _ in module.named_parameters()]
        if name and own and all(p in names for p in own) and not any(name.startswith(f + ".") for f in found):
            found.append(name)
    return found
