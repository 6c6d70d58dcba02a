"""From a finished run to files that the rest of the ecosystem opens, and to predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from federa.checkpoint import RunDirectory
from federa.config import RunConfig, parse_config, read_yaml
from federa.experiment import load_model
from federa.methods import Setup
from federa.methods.base import ExportFormat
from federa.methods.lora import lora_layers
from federa.models import require_base, resolve_model
from federa.seeds import seed_for
from federa.state import load_state
from federa.types import FederaError, State

Text: TypeAlias = str | tuple[str, str]
FORMATS: tuple[ExportFormat, ...] = ("peft", "merged", "federa")
_FOLDER_FILES = ("config.yaml", "labels.json", "init.safetensors", "checkpoint/state.safetensors")


@dataclass(frozen=True, slots=True)
class Predictor:
    """A trained model ready to use.

    Attributes:
        model: float32, in evaluation mode, on the CPU.
        tokenizer: its tokenizer.
        labels: label names, in the order of their ids.
        max_length: tokens that a text is cut at.
        columns: the run's text column, and the second one of a run on pairs.
    """

    model: nn.Module
    tokenizer: Any
    labels: list[str]
    max_length: int
    columns: tuple[str, ...] = ("text",)

    def logits(self, texts: Sequence[Text], batch_size: int = 32) -> Iterator[Tensor]:
        """Yield logits for each batch of texts (or pairs of texts), `(batch, num_labels)`."""
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                logits: Tensor = self.model(**batch).logits
            yield logits

    def predict(self, texts: Sequence[Text], batch_size: int = 32) -> Iterator[tuple[str, float]]:
        """Yield the most likely label of each text (or pair of texts), and its probability."""
        for logits in self.logits(texts, batch_size):
            best = logits.softmax(dim=-1).max(dim=-1)
            for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                yield self.labels[label], probability


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
    longest = min(restored.config.task.max_length, restored.tokenizer.model_max_length)
    data = restored.config.data
    columns = (data.text_column, *([data.text_pair_column] if data.text_pair_column else []))
    return Predictor(restored.model, restored.tokenizer, restored.labels, longest, columns)


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
        "```python\nbase = AutoModelForSequenceClassification.from_pretrained("
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
        "task_type": "SEQ_CLS",
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
