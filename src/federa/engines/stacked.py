"""All clients of a round in one batched pass over one frozen backbone.

One client's batch is too small to keep an accelerator busy; those of a whole cohort are not. The updates are
those of the serial engine to rounding; with dropout on they are other draws of the same distribution. Who is
trained with whom settles those draws: the same recipe on the same engine gives the same bits, resumed or not,
as long as it says how many are trained at a time (`clients`) or the whole cohort fits into memory.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from federa.engines.base import ENGINES, Engine, Session, keep_freed_memory, share_cores
from federa.engines.stacking import Lanes, attention_of_all, stacked_batch, train_together
from federa.models import free_memory
from federa.seeds import torch_seeded
from federa.types import FederaError, FloatArray, IntArray, Job, RoundFailedError, State, Update

if TYPE_CHECKING:
    from federa.experiment import Experiment

SHARE = 0.7  # of the free memory that a group of clients may take
MARGIN = 1.5  # on a CPU, over a client's tensors: kernels have scratch, and freed memory has gaps
_log = logging.getLogger(__name__)
REMEDY = "use engine.name=serial"


class StackedSession:
    """Trains the jobs of a round in groups, each in one batched pass."""

    def __init__(self, experiment: Experiment, clients: int) -> None:
        self._experiment = experiment
        self.clients = clients
        self._held: Lanes | None = None

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """See `Session.train`.

        Groups are of neighbours: a round's jobs come sorted by size, so those of a group have nearly as many
        steps each, and no more updates are held than one group's.
        """
        groups = list(self._groups(jobs))
        most = max(map(len, groups), default=0)
        for group in groups:
            for job, (update, kept) in zip(group, self._together(params, group, most), strict=True):
                self._experiment.kept.save(job, kept)
                yield update

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        yield from self._experiment.predict(params, batches, job)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
        """Yield as few groups as can be, as even as can be."""
        number = -(-len(jobs) // self.clients)
        for i in range(number):
            yield jobs[i * len(jobs) // number : (i + 1) * len(jobs) // number]

    def _together(self, params: State, jobs: Sequence[Job], most: int) -> list[tuple[Update, State]]:
        experiment = self._experiment
        try:
            parts = [experiment.parts[job.client_id] for job in jobs]
            own = [experiment.kept.load(job) for job in jobs]
            return train_together(self._lanes(most), params, experiment.train, parts, jobs, own)
        except FederaError:
            raise
        except torch.OutOfMemoryError as error:
            raise _too_many(len(jobs)) from error
        except Exception as error:
            who = ("clients " if len(jobs) > 1 else "client ") + ", ".join(str(job.client_id) for job in jobs)
            text = f"round {jobs[0].round}: {who} failed: {type(error).__name__}: {error}"
            raise RoundFailedError(f"{text}. The last good state is kept") from error

    def _lanes(self, count: int) -> Lanes:
        """Return lanes for so many clients: those of before, if steps are recorded, which need them there."""
        if not self._experiment.trainer.records:
            return Lanes(self._experiment.trainer, count)
        if self._held is None or self._held.clients < count:
            self._held = None  # before there are two
            self._held = Lanes(self._experiment.trainer, count)
        return self._held


def _too_many(clients: int) -> FederaError:
    if clients > 1:
        return FederaError(
            f"engine.clients: {clients} clients at once do not fit into memory; set it to {clients // 2}"
        )
    return FederaError("client.batch_size: not even one client's batch fits into memory; make it smaller")


@ENGINES.register
class Stacked(Engine):
    """A round's clients side by side: trained parameters get a client dimension, frozen ones are shared.

    Attributes:
        clients: trained at a time; None for the whole cohort, or as many of it as fit into memory.
    """

    name: Literal["stacked"] = "stacked"
    clients: int | None = Field(default=None, ge=1)

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[Session]:
        """Try the model out, and plan how many clients are trained at a time.

        Raises:
            FederaError: this model or method gives other losses side by side than alone, or none at all; or
                clients are to save memory in ways of their own, or to start above their frozen layers.
        """
        client = experiment.trainer.config
        if client.reuse_frozen:
            raise FederaError(f"client.reuse_frozen is not for engine.name=stacked; {REMEDY}")
        if client.micro_batch is not None or client.checkpointing:
            key = "client.checkpointing" if client.micro_batch is None else "client.micro_batch"
            raise FederaError(
                f"{key} is not for engine.name=stacked, where engine.clients saves memory; {REMEDY}"
            )
        torch.set_num_threads(share_cores(1, self.threads))
        keep_freed_memory()
        try:
            _try_out(experiment)
            clients = self.clients or _planned(experiment)
        except torch.OutOfMemoryError as error:
            raise _too_many(1) from error
        yield StackedSession(experiment, clients)


def _try_out(experiment: Experiment) -> None:
    """Take one step of two clients of unequal size, and compare their losses with those of each alone."""
    trainer, data = experiment.trainer, experiment.train
    model, start = trainer.model, experiment.kept.start
    ordered = np.argsort(data.lengths(), kind="stable")
    parts = [ordered[[0, -1, 0]], ordered[[min(1, len(ordered) - 1), 0]]]  # tokens to pad, and a row
    trainer.flat.load_(experiment.params, start)
    model.eval()
    with torch.no_grad():
        alone = [trainer.loss(data, part) for part in parts]
    try:
        lanes = Lanes(trainer, 2)
        lanes.load_(experiment.params, [start, start], [1.0, 1.0])
        batch = stacked_batch(data, parts, trainer.device)
        with attention_of_all(model), torch_seeded(0):
            together = lanes.losses(batch, 2).detach()
            model.train()
            lanes.step_(lanes.losses(batch, 2))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        raise FederaError(
            "engine.name=stacked: this model or method cannot train clients side by side;"
            f" {REMEDY} ({reason})"
        ) from error
    tolerance = 5e-5 if trainer.config.precision == "fp32" else 5e-2
    expected = torch.stack(alone)
    if not torch.allclose(together.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise FederaError(
            f"engine.name=stacked: clients of this model lose {together.tolist()} side by side, "
            f"but {expected.tolist()} alone; {REMEDY}"
        )


def _planned(experiment: Experiment) -> int:
    """Return the size of the cohort, or how many clients fit; then say so: it settles dropout's draws."""
    cohort, fit = experiment.config.cohort, clients_that_fit(experiment)
    if fit < cohort:
        _log.warning(
            "engine.name=stacked trains %d of a cohort's %d clients at a time, which the free memory allows; "
            "engine.clients=%d in the recipe keeps it so, and with it the draws of dropout",
            fit,
            cohort,
            fit,
        )
    return min(fit, cohort)


def clients_that_fit(experiment: Experiment) -> int:
    """Return how many clients can be trained at a time, one at least."""
    needed = memory_of_a_client(experiment)
    return max(1, int(SHARE * free_memory(experiment.trainer.device) / needed))


def memory_of_a_client(experiment: Experiment) -> int:
    """Return the bytes that a client takes while it is trained, from a step of the longest examples."""
    trainer, data = experiment.trainer, experiment.train
    rows = np.argsort(-data.lengths(), kind="stable")[: trainer.config.batch_size]
    trainer.model.train()

    def step() -> None:
        lanes = Lanes(trainer, 1)
        lanes.load_(experiment.params, [experiment.kept.start], [1.0])
        with attention_of_all(trainer.model), torch_seeded(0):
            lanes.step_(lanes.losses(stacked_batch(data, [rows], trainer.device), 1))

    if trainer.device.type == "cuda":
        return _peak_on_cuda(step, trainer.device)
    with _Watch() as watch:
        step()
    return int(MARGIN * watch.most)


def _peak_on_cuda(step: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that a step takes at most beyond what is there already."""
    step()  # the first one loads kernels and workspaces that stay
    torch.cuda.reset_peak_memory_stats(device)
    before = int(torch.cuda.memory_allocated(device))
    step()
    return max(1, int(torch.cuda.max_memory_allocated(device)) - before)


class _Watch(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """Counts the bytes of tensors that are made while it is entered: torch says it of CUDA's alone.

    Attributes:
        most: of those that were there at the same time, at the highest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._there: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}  # views, and changes in place
        for storage in _storages(out):
            place = storage.data_ptr()
            if place not in known and place not in self._there:
                self._there[place] = storage.nbytes()
                weakref.finalize(storage, self._there.pop, place)
        self.most = max(self.most, sum(self._there.values()))
        return out


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
