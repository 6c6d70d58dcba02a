"""Several workers on one machine, each with the whole experiment, shared by fork.

The frozen backbone and the tokenised data are pages of the parent that no worker writes to: a second worker
costs what it trains. Parameters go out and deltas come back through shared memory; only a few numbers in JSON
go through pipes. A worker that dies is forked anew, and its job is run again.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from federa.engines.base import ENGINES, Engine, Session, keep_freed_memory, share_cores
from federa.machine import available_cores, die_with_parent
from federa.state import num_bytes
from federa.types import FederaError, FloatArray, IntArray, Job, RoundFailedError, State, Update

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from federa.experiment import Experiment

MAX_DEATHS = 3  # of workers on one and the same job: then the job, not the worker, is at fault
START_SECONDS = 30.0  # for a forked worker to say that it is there; it needs a few milliseconds
_READY = b"ready"
BUFFER_BYTES = 32 << 20  # for updates that wait for an earlier, longer one; a worker with no room is idle
_Request = dict[str, Any]
_fork = multiprocessing.get_context("fork")


class SharedState:
    """A state in memory that forked processes share: float32 tensors of fixed names and shapes."""

    def __init__(self, like: State) -> None:
        self._shapes = {name: t.shape for name, t in like.items()}
        size = sum(t.numel() for t in like.values())
        self._memory = mmap.mmap(
            -1, max(4, 4 * size)
        )  # anonymous: gone with the last process, however it ends
        self._flat = torch.frombuffer(self._memory, dtype=torch.float32)[:size]

    def views(self) -> dict[str, Tensor]:
        """Return the tensors themselves, not copies."""
        out, start = {}, 0
        for name, shape in self._shapes.items():
            out[name] = self._flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return out

    def fits(self, state: State) -> bool:
        """Return whether a state has these names and shapes, and is float32."""
        shapes = {name: t.shape for name, t in state.items()}
        return shapes == self._shapes and all(t.dtype == torch.float32 for t in state.values())

    def write(self, state: State) -> None:
        """Copy a state in; it must fit."""
        for name, view in self.views().items():
            view.copy_(state[name])

    def read(self) -> dict[str, Tensor]:
        """Return a copy."""
        return {name: view.clone() for name, view in self.views().items()}


@dataclass(slots=True)
class Worker:
    """A forked process, the pipe to it, and the number of the request that it is busy with."""

    process: ForkProcess
    pipe: Connection
    busy: int | None = None


class ProcessesSession:
    """Hands requests to workers, and gives the answers back in the order of the requests."""

    def __init__(self, experiment: Experiment, workers: int, threads: int) -> None:
        self._experiment = experiment
        self._threads = threads
        self._params = SharedState(experiment.params)
        # A bounded buffer: a worker may run at most this far ahead of the update that is summed next.
        fit = BUFFER_BYTES // max(1, num_bytes(experiment.params))
        ahead = max(workers + 1, min(fit, experiment.config.cohort))
        # In the order of a trained state: the last bits of a norm know it.
        like = {name: experiment.params[name] for name in experiment.trainer.shared}
        self._slots = [SharedState(like) for _ in range(ahead)]
        self._workers: list[Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._fork())
            for worker in list(self._workers):
                if not _is_there(worker):
                    self._replace(worker)
        except BaseException:
            self.close()
            raise

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """See `Session.train`."""
        self._params.write(params)
        requests: list[_Request] = [{"job": asdict(job)} for job in jobs]
        for index, (answer, payload) in enumerate(self._answers(requests)):
            delta = load(payload) if payload else self._slots[index % len(self._slots)].read()
            yield Update(jobs[index], delta, answer["weight"], answer["metrics"])

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        self._params.write(params)
        keeps = asdict(job) if job is not None else None
        requests: list[_Request] = [{"rows": rows.tolist(), "keeps": keeps} for rows in batches]
        for answer, payload in self._answers(requests):
            yield list(np.frombuffer(payload, dtype=np.float32).reshape(answer["shape"]))

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def _fork(self) -> Worker:
        ours, theirs = _fork.Pipe()
        others = [worker.pipe for worker in self._workers] + [ours]
        process = _fork.Process(target=self._work, args=(theirs, others), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _work(self, pipe: Connection, others: list[Connection]) -> None:
        """Answer requests until the parent goes away; runs in the child."""
        for other in others:  # else a dead parent's pipe would stay open in the siblings
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        die_with_parent()
        if self._threads == 1:
            self._serve(pipe)
            return
        # The forked thread would wait for ever for OpenMP helpers that the fork left behind; a new thread
        # starts helpers of its own.
        serving = threading.Thread(target=self._serve, args=(pipe,))
        serving.start()
        serving.join()

    def _serve(self, pipe: Connection) -> None:
        torch.set_num_threads(self._threads)
        weight = torch.ones(8, 8, requires_grad=True)
        (weight @ weight).sum().backward()  # a part of being there
        try:
            pipe.send_bytes(_READY)
            while True:
                request = json.loads(pipe.recv_bytes())
                for part in self._answer(request):
                    pipe.send_bytes(part)
        except (EOFError, OSError):
            os._exit(0)

    def _answer(self, request: _Request) -> list[bytes]:
        """Return a JSON header, and where it says so a payload.

        A payload is the float32 outputs of a prediction, or an update that does not fit into shared memory:
        whether that counts is for the server to say.
        """
        try:
            if "job" in request:
                update = self._experiment.train_client(self._params.views(), Job(**request["job"]))
                header = {"weight": update.weight, "metrics": dict(update.metrics)}
                slot = self._slots[request["slot"]]
                if slot.fits(update.delta):
                    slot.write(update.delta)
                    return [json.dumps(header).encode()]
                odd = {name: t.clone().contiguous() for name, t in update.delta.items()}
                return [json.dumps({**header, "payload": True}).encode(), save(odd)]
            keeps = Job(**request["keeps"]) if request["keeps"] else None
            rows = np.array(request["rows"], dtype=np.int64)
            outputs = np.stack(next(self._experiment.predict(self._params.views(), [rows], keeps)))
            header = {"shape": outputs.shape, "payload": True}
            return [json.dumps(header).encode(), np.ascontiguousarray(outputs).tobytes()]
        except FederaError as error:
            return [json.dumps({"mistake": str(error)}).encode()]
        except RoundFailedError as error:
            return [json.dumps({"failed": str(error)}).encode()]
        except Exception:
            return [json.dumps({"error": traceback.format_exc()}).encode()]

    def _answers(self, requests: Sequence[_Request]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield the answer to every request, in order, whatever the order in which they come."""
        self._settle()
        todo, done = deque(range(len(requests))), {}
        deaths = [0] * len(requests)
        for wanted in range(len(requests)):
            while wanted not in done:
                self._hand_out(requests, todo, wanted)
                busy = [worker for worker in self._workers if worker.busy is not None]
                ready = wait([worker.pipe for worker in busy])
                for worker in (w for w in busy if w.pipe in ready):
                    index = worker.busy
                    assert index is not None
                    answer = self._receive(worker)
                    if answer is not None:
                        done[index] = answer
                        continue
                    deaths[index] += 1
                    if deaths[index] >= MAX_DEATHS:
                        raise _deadly(requests[index])
                    todo.appendleft(index)
                    self._replace(worker)
            self._hand_out(requests, todo, wanted)  # no worker waits while the answer is made use of
            yield done.pop(wanted)

    def _hand_out(self, requests: Sequence[_Request], todo: deque[int], wanted: int) -> None:
        """Give idle workers the next requests, no further ahead than there are slots."""
        idle = [worker for worker in self._workers if worker.busy is None]
        while idle and todo and todo[0] < wanted + len(self._slots):
            worker, index = idle.pop(0), todo[0]
            message = {**requests[index], "slot": index % len(self._slots)}
            try:
                worker.pipe.send_bytes(json.dumps(message).encode())
            except OSError:  # it died while idle
                idle.append(self._replace(worker))
                continue
            worker.busy = todo.popleft()

    def _receive(self, worker: Worker) -> tuple[dict[str, Any], bytes] | None:
        """Return a worker's answer, or None if it died before it was whole."""
        try:
            header = json.loads(worker.pipe.recv_bytes())
            payload = worker.pipe.recv_bytes() if header.get("payload") else b""
        except (EOFError, OSError):
            return None
        worker.busy = None
        if "mistake" in header:
            raise FederaError(header["mistake"])
        if "failed" in header:
            raise RoundFailedError(header["failed"])
        if "error" in header:
            raise RuntimeError(f"a worker failed:\n{header['error']}")
        return header, payload

    def _replace(self, worker: Worker) -> Worker:
        """Fork a new worker in the place of one that is dead or stuck, and return it."""
        for _ in range(MAX_DEATHS):
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()
            self._workers.remove(worker)
            worker = self._fork()
            self._workers.append(worker)
            if _is_there(worker):
                return worker
        raise RoundFailedError(
            f"engine: {MAX_DEATHS} workers, one after the other, did not start (out of memory?). "
            "The last good state is kept; engine.name=serial needs none"
        )

    def _settle(self) -> None:
        """Replace workers that an abandoned iterator left busy: their answers belong to nobody."""
        for worker in [w for w in self._workers if w.busy is not None]:
            self._replace(worker)


def _is_there(worker: Worker) -> bool:
    """Return whether a new worker says that it is there.

    A fork has the locks and thread pools of its parent's libraries in whatever state they were: it may hang
    or die in its first moments, through no fault of a job.
    """
    try:
        return bool(wait([worker.pipe], START_SECONDS)) and worker.pipe.recv_bytes() == _READY
    except (EOFError, OSError):
        return False


def _deadly(request: _Request) -> RoundFailedError:
    job = request.get("job")
    what = f"round {job['round']}: client {job['client_id']}" if job else "evaluation"
    return RoundFailedError(
        f"{what}: {MAX_DEATHS} workers died on it one after the other (out of memory?). "
        "The last good state is kept"
    )


@ENGINES.register
class Processes(Engine):
    """Workers of one thread each, by default one a core, share the clients of a round.

    Attributes:
        workers: processes; None for one a core.
    """

    name: Literal["processes"] = "processes"
    workers: int | None = Field(default=None, ge=1)

    def num_workers(self) -> int:  # noqa: D102
        return self.workers or available_cores()

    @contextmanager
    def open(self, experiment: Experiment) -> Iterator[Session]:
        """Fork the workers, and end them with the block.

        Raises:
            FederaError: workers x threads exceeds the cores, or the model is not on the CPU.
        """
        workers = self.num_workers()
        threads = share_cores(workers, self.threads or 1)
        if experiment.trainer.device.type != "cpu":
            raise FederaError("engine.name=processes runs on the CPU; use device=cpu or engine.name=serial")
        if "fork" not in multiprocessing.get_all_start_methods():
            raise FederaError("engine.name=processes needs an operating system with fork; use serial")
        keep_freed_memory()  # the workers inherit it
        session = ProcessesSession(experiment, workers, threads)
        try:
            yield session
        finally:
            session.close()
