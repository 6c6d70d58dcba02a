"""How the updates of a round lie to each other: their directions, their lengths, and what averaging loses.

The question is why one method bears skewed clients better than another. For a low-rank method the updates are
compared as changes of the whole matrix, dW_k = s (B_k A_k - B A), so that methods with other factors can be
set side by side; without forming any of them: inner products of products of thin matrices are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federa.types import Record, State

A, B = ".lora_A", ".lora_B"
MAGNITUDE = ".magnitude"  # of DoRA, whose update is no product; its trained tensors are compared as they are


@dataclass(frozen=True, slots=True)
class _Module:
    """One module's part: inner products of the clients' updates, and the squared error of averaging factors.

    Attributes:
        gram: `(clients, clients)` float64.
        lost: the squared norm of s (mean of B_k A_k - mean B mean A); None where nothing is factored.
    """

    gram: Tensor
    lost: float | None


def diagnose(
    params: State,
    deltas: Sequence[State],
    weights: Sequence[float],
    head: frozenset[str],
    scales: Mapping[str, float],
) -> Record:
    """Return how the updates of one round lie to each other.

    Args:
        params: the state that was sent.
        deltas: the updates that count, one a client; two at least.
        weights: of the clients in the mean.
        head: names of the head's parameters, which are left out: the question is about the encoder. A method
            that trains the head alone is measured on it.
        scales: of the low-rank products, by module.

    Returns:
        `clients`; over all modules together and, in `layers`, for each of them: `cosine` (mean over clients
        of the cosine between a client's update and the mean update), `norm_mean` (of the clients' updates,
        mean), `norm_spread` (their standard deviation over their mean), `aggregation_error` (the norm of what
        averaging factors instead of products loses, over the norm of the mean update; None for methods
        without factors). Means are weighted as the weighted mean of updates is.
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    names = [name for name in params if name not in head] or list(params)
    modules = {
        key: _factored(params, deltas, share, key, scales.get(key, 1.0))
        if f"{key}{A}" in params and f"{key}{MAGNITUDE}" not in params
        else _plain(deltas, [name for name in names if _module_of(name) == key])
        for key in dict.fromkeys(_module_of(name) for name in names)
    }
    lost = [module.lost for module in modules.values() if module.lost is not None]
    gram = torch.stack([module.gram for module in modules.values()]).sum(0)
    whole = _Module(gram, sum(lost) if lost else None)
    layers = {name: _figures(module, share) for name, module in modules.items()}
    return {"clients": len(deltas), **_figures(whole, share), "layers": layers}


def _module_of(name: str) -> str:
    """Return the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _plain(deltas: Sequence[State], names: Sequence[str]) -> _Module:
    rows = torch.stack([torch.cat([delta[name].flatten() for name in names]) for delta in deltas])
    return _Module((rows @ rows.T).double(), None)


def _factored(params: State, deltas: Sequence[State], share: Tensor, key: str, scale: float) -> _Module:
    """Measure dW_k = s (dB_k A_k + B dA_k) = s [dB_k, B] [A_k; dA_k]; nothing large cancels in it."""
    a, b = (params[key + part].double() for part in (A, B))
    da, db = (torch.stack([delta[key + part] for delta in deltas]).double() for part in (A, B))
    left = torch.cat([db, b.expand_as(db)], dim=2)  # (clients, out, 2 rank)
    right = torch.cat([a + da, da], dim=1)  # (clients, 2 rank, in)
    clients, rank = len(deltas), left.shape[2]
    gram = scale**2 * _block_sums(_products(left.mT), _products(right), clients, rank)
    off_b, off_a = (d - torch.einsum("k,kij->ij", share, d) for d in (db, da))
    pairs = _block_sums(_products(off_b.mT), _products(off_a), clients, off_a.shape[1])
    lost = scale**2 * float(share @ pairs @ share)
    return _Module(gram, max(lost, 0.0))


def _products(thin: Tensor) -> Tensor:
    """Return all inner products of the rows of thin matrices, `(clients * rank, clients * rank)`."""
    rows = thin.flatten(0, 1)
    return rows @ rows.T


def _block_sums(one: Tensor, other: Tensor, clients: int, rank: int) -> Tensor:
    """Return <P_k Q_k, P_l Q_l> = sum of (P_k' P_l) * (Q_k Q_l') for all pairs, `(clients, clients)`."""
    return (one * other).view(clients, rank, clients, rank).sum(dim=(1, 3))


def _figures(module: _Module, share: Tensor) -> dict[str, float | None]:
    lengths = module.gram.diagonal().clamp(min=0).sqrt()
    mean = float((share @ module.gram @ share).clamp(min=0).sqrt())
    cosines = (module.gram @ share) / (lengths * mean).clamp(min=1e-300)
    usual = float(lengths.mean())
    return {
        "cosine": float(cosines.mean()) if mean else 0.0,
        "norm_mean": usual,
        "norm_spread": float(lengths.std(correction=0)) / usual if usual else 0.0,
        "aggregation_error": None if module.lost is None else (module.lost**0.5 / mean if mean else 0.0),
    }
