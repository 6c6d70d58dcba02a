"""The server's part of a round: draw the cohort, check every update, aggregate what counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from federa.client import scheduled_lr
from federa.seeds import generator, seed_for
from federa.state import norm
from federa.types import Absence, Job, RoundFailedError, ServerState, State, Update

if TYPE_CHECKING:
    from federa.config import RunConfig

OK = "ok"


def make_jobs(config: RunConfig, round_number: int, sizes: Sequence[int]) -> list[Job]:
    """Return the jobs of a round: a cohort that (seed, round) settles, the largest clients first.

    Largest first, because that is the order that keeps several workers busy to the end; it is also the order
    in which updates are summed, so that every engine adds the same numbers in the same order.

    Args:
        config: the recipe.
        round_number: counted from 1.
        sizes: the number of examples of every client.
    """
    drawn = generator(config.seed, "cohort", round_number).choice(len(sizes), config.cohort, replace=False)
    lr = scheduled_lr(config.client, round_number, config.rounds)
    return [
        Job(round_number, client, seed_for(config.seed, "client", round_number, client), lr)
        for client in sorted((int(c) for c in drawn), key=lambda c: (-sizes[c], c))
    ]


def verdict(update: Update, params: State, max_norm: float, max_weight: float = math.inf) -> str:
    """Return `ok`, or the first reason why an update must not count."""
    return next(_faults(update, params, max_norm, max_weight), OK)


def _faults(update: Update, params: State, max_norm: float, max_weight: float) -> Iterator[str]:
    """Yield what is wrong with an update; a check may rely on those before it having found nothing.

    A key, shape or type that does not fit, a weight that is no weight, numbers that are none, and a step too
    long to be honest training.
    """
    if set(update.delta) != set(params):
        strange = sorted(set(update.delta) ^ set(params))[0]
        yield f"wrong keys ({strange!r:.100} is {'missing' if strange in params else 'unknown'})"
    for name, tensor in update.delta.items():
        if tensor.shape != params[name].shape:
            yield f"wrong shape ({name!r}: {tuple(tensor.shape)}, expected {tuple(params[name].shape)})"
        if tensor.dtype != torch.float32:
            yield f"wrong dtype ({name!r}: {tensor.dtype}, expected torch.float32)"
    if not (math.isfinite(update.weight) and update.weight > 0):
        yield f"weight {update.weight} is not a positive number"
    elif update.weight > max_weight:
        yield f"weight {update.weight:g} exceeds the client's {max_weight:g} examples"
    length = norm(update.delta)
    if not math.isfinite(length):
        yield "not finite (NaN or Inf in the update)"
    elif length > max_norm:
        yield f"norm {length:.3g} exceeds max_update_norm {max_norm:g}"
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            yield f"metric {name!r} is {value}, not a finite number"


@dataclass(slots=True)
class RoundSummary:
    """What a round's updates said, besides their deltas.

    Attributes:
        verdicts: `ok` or a reason, by client.
        examples: trained on, by the updates that counted.
        loss: mean over those updates, weighed by their examples.
        seconds_train: summed over all clients.
        absent: how many updates did not come.
    """

    verdicts: dict[int, str] = field(default_factory=dict)
    examples: int = 0
    loss: float = math.nan
    seconds_train: float = 0.0
    absent: int = 0

    @property
    def accepted(self) -> int:
        """The number of updates that counted."""
        return sum(v == OK for v in self.verdicts.values())


def finish_round(
    config: RunConfig,
    state: ServerState,
    jobs: Sequence[Job],
    updates: Iterable[Update | Absence],
    sizes: Sequence[int] | None = None,
) -> tuple[ServerState, RoundSummary]:
    """Check and sum updates as they come, and return the next state.

    No update is kept once it is summed (the robust aggregators apart, which need the whole cohort).

    Args:
        config: the recipe.
        state: before the round.
        jobs: of the round.
        updates: the answers, in the order of the jobs, or why one did not come.
        sizes: the number of examples of every client, which no weight may exceed; None if it is not known,
            and 0 of a client of which it is not.

    Raises:
        RoundFailedError: fewer than `min_success` of the cohort counted; `state` is untouched.
    """
    summary = RoundSummary()
    accumulator = config.aggregator.init(state.params)
    loss_sum = weight_sum = 0.0
    for update in updates:
        client = update.job.client_id
        if isinstance(update, Absence):
            summary.verdicts[client] = update.reason
            summary.absent += 1
            continue
        most = sizes[client] if sizes is not None and sizes[client] else math.inf
        summary.verdicts[client] = verdict(update, state.params, config.max_update_norm, most)
        seconds = update.metrics.get("seconds_train", 0.0)
        summary.seconds_train += seconds if math.isfinite(seconds) else 0.0
        if summary.verdicts[client] != OK:
            continue
        if config.privacy is not None:
            update = config.privacy.clipped(update)
        accumulator = config.aggregator.accumulate(accumulator, update)
        summary.examples += int(update.metrics.get("examples", update.weight))
        loss_sum += update.weight * update.metrics.get("loss", math.nan)
        weight_sum += update.weight
    needed = max(1, math.ceil(config.min_success * len(jobs)))
    if summary.accepted < needed:
        rejected = [f"client {c}: {v}" for c, v in sorted(summary.verdicts.items()) if v != OK]
        raise RoundFailedError(
            f"round {state.round + 1}: {summary.accepted} of {len(jobs)} updates counted, min_success asks "
            f"for {needed}; {'; '.join(rejected) or 'no update came'}. The last good state is kept"
        )
    summary.loss = loss_sum / weight_sum
    delta = config.aggregator.finish(accumulator)
    if config.privacy is not None:
        counted, number = summary.accepted, state.round + 1
        delta = config.privacy.noised(delta, counted, len(jobs), config.seed, number)
    params, opt = config.server_optimizer.step(state.params, delta, state.opt)
    return ServerState(state.round + 1, params, opt), summary
