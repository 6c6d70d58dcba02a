"""Workers on a Ray cluster, for those who outgrow one machine.

Each worker is an actor that builds the experiment once: it reads data and backbone on its own node, and is
sent the recipe and the round-0 state. The global state goes out once a round, through the object store; the
updates come back as safetensors. A worker that is lost is replaced, and its job is run again.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save

from federa.cpu import native
from federa.engines.base import ENGINES, Engine, Session, keep_freed_memory, share_cores
from federa.engines.processes import MAX_DEATHS
from federa.machine import available_cores
from federa.types import FederaError, FloatArray, IntArray, Job, RoundFailedError, State, Update

if TYPE_CHECKING:
    from federa.experiment import Experiment

PATIENCE = 600.0  # seconds in which one of the workers must come up while none is at work
_Request = tuple[Job | None, IntArray | None]  # to predict rows, or without rows to train
_Answer = dict[str, Any]  # numbers, names and bytes; empty from a worker that is there


def _ray() -> Any:
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise FederaError('engine.name=ray needs its package: pip install "federa[ray]"') from error
    return ray


def _pack(state: State) -> bytes:
    """Return a state as safetensors; what shares memory is stored apart."""
    return save({n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()})


def _arithmetic() -> str:
    """Return what a worker must share with the driver, or it would compute other bits."""
    kernels = native.status()  # not why there are none: without kernels all compute the same
    return f"torch {torch.__version__}, kernels: {kernels if kernels.startswith('fused') else 'none'}"


class Carried:
    """Stands for `KeptStates` in a worker: what a client keeps comes with the job and leaves with the answer.

    The one store stays with the driver, in the run directory. A client bound to one worker would lose what it
    keeps with that worker, and unbalance the round; a head is small beside the state that travels anyway.
    """

    def __init__(self, start: State) -> None:
        self.start = self.state = start

    def load(self, job: Job) -> State:  # noqa: D102
        return self.state

    def save(self, job: Job, state: State) -> None:  # noqa: D102
        self.state = state


class RemoteWorker:
    """The actor: answers one request at a time, with an experiment of its own."""

    _experiment: Any = None
    _params: tuple[int, State] = (-1, {})

    def start(self, recipe: dict[str, Any], init: list[Any], like: dict[str, str], threads: int) -> _Answer:
        """Build the experiment, which must be the driver's; if that is done, say so."""
        if self._experiment is not None:
            return {}
        os.environ["FEDERA_KERNELS"] = like["kernels"]
        keep_freed_memory()
        torch.set_num_threads(threads)
        try:
            # By name: a worker is a whole program, and stands where a run does, above the engines.
            config = importlib.import_module("federa.config").parse_config(recipe)
            build = importlib.import_module("federa.experiment").build_experiment
            experiment = build(config, load(_ray().get(init[0])), base=like["model"])
            if experiment.data_fingerprint() != like["data"]:
                raise FederaError("the data are not those that the run was started with")
            if _arithmetic() != like["arithmetic"]:
                raise FederaError(f"{_arithmetic()}, but the run was started on {like['arithmetic']}")
        except FederaError as error:
            raise FederaError(f"engine: node {_ray().util.get_node_ip_address()}: {error}") from error
        self._experiment = dataclasses.replace(experiment, kept=Carried(experiment.kept.start))
        return {}

    def answer(self, version: int, params: list[Any], asked: Any, rows: Any, kept: bytes) -> _Answer:
        """Train, or predict rows; a state of a new version is fetched by its reference."""
        if self._params[0] != version:
            self._params = (version, load(_ray().get(params[0])))
        experiment, state, job = self._experiment, self._params[1], Job(*asked) if asked else None
        experiment.kept.state = load(kept)
        if rows is not None:
            outputs = np.stack(next(experiment.predict(state, [rows], job)))
            return {"shape": outputs.shape, "outputs": np.ascontiguousarray(outputs).tobytes()}
        update = experiment.train_client(state, job)
        answer = {"weight": update.weight, "metrics": dict(update.metrics)}
        # The names, because safetensors sorts them, and the last bits of a norm know their order.
        answer |= {"names": list(update.delta), "delta": _pack(update.delta)}
        return {**answer, "kept": _pack(experiment.kept.state)}


class RaySession:
    """Hands requests to workers, and gives the answers back in the order of the requests."""

    def __init__(self, experiment: Experiment, workers: int, threads: int) -> None:
        self._ray, self._experiment = _ray(), experiment
        self._actors = self._ray.remote(RemoteWorker).options(num_cpus=threads, scheduling_strategy="SPREAD")
        like = {"model": experiment.fingerprint, "data": experiment.data_fingerprint()}
        like |= {"arithmetic": _arithmetic(), "kernels": os.environ.get("FEDERA_KERNELS", "")}
        # In a list a reference stays one: a worker fetches what it stands for when it needs it.
        self._params = [self._ray.put(_pack(experiment.params))]
        self._version, self._sent = 0, experiment.params
        recipe = experiment.config.model_dump(mode="json") | {"device": "cpu"}
        self._start_with = (recipe, self._params, like, threads)
        self._ahead = workers + 1  # a bounded buffer: no worker runs further ahead of the update summed next
        self._idle: list[Any] = []
        # By the answer that is owed: the worker; the number of the request, None for one only to say that it
        # is there; how many died before it in its place without ever having been there.
        self._owing: dict[Any, tuple[Any, int | None, int]] = {}
        for _ in range(workers):
            self._ask(self._actors.remote())

    def wait(self) -> None:
        """Wait until all workers are there."""
        while self._owing:
            self._next()

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """See `Session.train`."""
        for job, answer in zip(jobs, self._answers(params, [(job, None) for job in jobs]), strict=True):
            self._experiment.kept.save(job, load(answer["kept"]))
            delta = load(answer["delta"])
            yield Update(job, {n: delta[n] for n in answer["names"]}, answer["weight"], answer["metrics"])

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        for answer in self._answers(params, [(job, rows) for rows in batches]):
            yield list(np.frombuffer(answer["outputs"], dtype=np.float32).reshape(answer["shape"]))

    def close(self) -> None:
        """End all workers."""
        for actor in [*self._idle, *(actor for actor, _, _ in self._owing.values())]:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _ask(self, actor: Any, deaths: int = 0) -> None:
        """Ask a worker to say that it is there, a new one as soon as it has started."""
        self._owing[actor.start.remote(*self._start_with)] = (actor, None, deaths)

    def _ask_the_idle(self) -> None:
        """Find those that died while idle: the next job is not to blame for them."""
        while self._idle:
            self._ask(self._idle.pop())

    def _answers(self, params: State, requests: Sequence[_Request]) -> Iterator[_Answer]:
        """Yield the answer to every request, in order, whatever the order in which they come."""
        if params is not self._sent:
            self._version, self._sent = self._version + 1, params
            self._params = [self._ray.put(_pack(params))]
        for owed, (_, index, _) in list(self._owing.items()):
            if index is not None:  # an abandoned iterator's: the answer belongs to nobody
                self._idle.append(self._owing.pop(owed)[0])
        self._ask_the_idle()
        todo, deaths = deque(range(len(requests))), [0] * len(requests)
        done: dict[int, _Answer] = {}
        for wanted in range(len(requests)):
            while wanted not in done:
                self._hand_out(requests, todo, wanted)
                index, answer = self._next()
                if index is not None and answer is not None:
                    done[index] = answer
                elif index is not None:
                    deaths[index] += 1
                    if deaths[index] >= MAX_DEATHS:
                        raise _deadly(*requests[index])
                    todo.appendleft(index)
            yield done.pop(wanted)

    def _hand_out(self, requests: Sequence[_Request], todo: deque[int], wanted: int) -> None:
        """Give idle workers the next requests, no further ahead than the buffer is long."""
        while self._idle and todo and todo[0] < wanted + self._ahead:
            actor, index = self._idle.pop(), todo.popleft()
            job, rows = requests[index]
            kept = _pack(self._experiment.kept.load(job) if job else {})
            asked = dataclasses.astuple(job) if job else None
            owed = actor.answer.remote(self._version, self._params, asked, rows, kept)
            self._owing[owed] = (actor, index, 0)

    def _next(self) -> tuple[int | None, _Answer | None]:
        """Return what a worker owed: its request's number, and the answer or None if the worker has died.

        The number is None if it was only to say that it is there.
        """
        at_work = any(index is not None for _, index, _ in self._owing.values())
        ready, _ = self._ray.wait(list(self._owing), timeout=None if at_work else PATIENCE)
        if not ready:
            raise RoundFailedError(f"engine: no worker came up in {PATIENCE:g} s; is the cluster full?")
        actor, index, deaths = self._owing.pop(ready[0])
        self._idle.append(actor)
        try:
            return index, self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (FederaError, RoundFailedError)):
                raise error.cause from None
            raise RuntimeError(f"a worker failed:\n{error}") from None
        except self._ray.exceptions.RayError as error:  # it is gone, or its node, or the answer with that
            deaths += index is None
            if deaths >= MAX_DEATHS:
                reason = str(error).strip().splitlines()[-1].strip()
                raise FederaError(f"engine: {deaths} workers died as they started: {reason}") from error
            self._ray.kill(self._idle.pop())  # one that is only out of reach must not come back
            self._ask(self._actors.remote(), deaths)  # it joins when the cluster has room for it
            self._ask_the_idle()
            return index, None


def _deadly(job: Job | None, rows: IntArray | None) -> RoundFailedError:
    what = f"round {job.round}: client {job.client_id}" if job and rows is None else "evaluation"
    why = f"{MAX_DEATHS} workers died on it one after the other (out of memory?). The last good state is kept"
    return RoundFailedError(f"{what}: {why}")


def _connect(address: str | None) -> None:
    """Start a Ray, or join one; without telemetry, dashboard and other people's output."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"address": address} if address else {"address": "local", "num_cpus": available_cores()}
    where = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or ""  # as Ray reads it
    try:
        if ":" in where:  # ask first: Ray would go on trying for minutes
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        _ray().init(**options, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # half a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "Ray does not start" if address is None else f"no Ray answers at engine.address={address}"
        raise FederaError(f"engine: {what}: {reason}") from error


@ENGINES.register
class Ray(Engine):
    """Workers on a Ray cluster share the clients of a round (extra `ray`).

    Attributes:
        threads: of each worker.
        workers: actors; None for as many as the cluster's CPUs allow.
        address: `auto` or `host:port` of a cluster; None starts a Ray of its own on this machine.
    """

    name: Literal["ray"] = "ray"
    threads: int | None = Field(default=1, ge=1)
    workers: int | None = Field(default=None, ge=1)
    address: str | None = Field(default=None, pattern=r"^(auto|[^:/\s]+:\d+)$")

    def num_workers(self) -> int:
        """Return how many clients are trained at a time; a guess from this machine if a cluster decides."""
        return self.workers or max(1, available_cores() // (self.threads or 1))

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[Session]:
        """Start the workers, and end them with the block.

        Raises:
            FederaError: no ray, no cluster, too few CPUs, a node without the data or the model, or a GPU.
        """
        ray, threads = _ray(), self.threads or 1
        if experiment.trainer.device.type != "cpu":
            raise FederaError("engine.name=ray runs on the CPU; use device=cpu or engine.name=serial")
        with ExitStack() as stack:
            if not ray.is_initialized():  # else its connection is used, and kept
                if self.address is None:
                    share_cores(self.num_workers(), threads)
                stack.callback(ray.shutdown)
                _connect(self.address)
            cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            room = sum(int(cpu // threads) for cpu in cpus)  # a worker's threads are on one node
            workers = self.workers or max(1, room)
            if workers > room:
                needed = f"{workers} workers x {threads} threads"
                raise FederaError(f"engine: {needed} do not fit on the {sum(cpus):g} CPUs of the cluster")
            session = RaySession(experiment, workers, threads)
            stack.callback(session.close)
            session.wait()
            yield session
