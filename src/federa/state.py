"""Arithmetic and files of states (see `types.State`): copies, norms, fingerprints, safetensors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from federa.types import FederaError, State

CACHED = 1 << 16  # numbers


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a detached float32 copy, on the CPU, of named tensors."""
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in tensors.items()}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that `requires_grad`: what trains, and so what travels."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def norm(state: State) -> float:
    """Return the L2 norm over all tensors, summed in float64; NaN and Inf stay visible."""
    total = 0.0
    for tensor in state.values():
        for piece in pieces(tensor.contiguous()):
            wide = piece.double()
            total += float(torch.dot(wide, wide))
    return math.sqrt(total)


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a contiguous tensor as flat views that fit into a processor's cache.

    Arithmetic in float64 goes over them one by one: a float64 copy of a whole tensor is dear to make.
    """
    parts: tuple[Tensor, ...] = tensor.view(-1).split(CACHED)
    return parts


def num_parameters(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements."""
    return sum(t.numel() for t in tensors)


def num_bytes(state: State) -> int:
    """Return the size of a state on the wire, in bytes, headers apart."""
    return sum(t.numel() * t.element_size() for t in state.values())


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and bytes, independent of the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
    new = not path.parent.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for holder in (path.parent, path.parent.parent) if new else (path.parent,):
        folder = os.open(holder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, save(whole, metadata=dict(metadata) or None))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        FederaError: no such file, or one that is truncated or not safetensors.
    """
    if not path.is_file():
        raise FederaError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FederaError(f"{path} is not a whole safetensors file ({error})") from error
