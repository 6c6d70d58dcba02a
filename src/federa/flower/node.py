"""A node: one client's data and a resident model, that answer the server's messages.

It runs nothing that came over the network: method, task and plug-ins are those of the recipe that its owner
has installed, and what the server says of its own recipe must be the same.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from federa.client import Trainer
from federa.config import RunConfig
from federa.data.batches import Encoded
from federa.data.datasets import read_client
from federa.experiment import encoded, load_model, prepare, remainders
from federa.flower.messages import (
    INIT,
    PROTOCOL,
    SLACK_BYTES,
    VERSION,
    Hello,
    Here,
    Refused,
    Train,
    Trained,
    agreed,
    difference,
    line,
    pack,
    unpack,
    unpack_tensors,
)
from federa.kept import KeptStates
from federa.models import Pretrained, require_base
from federa.state import num_parameters
from federa.types import FederaError, Job
from federa.wires import encode_update

_log = logging.getLogger(__name__)
Answer = tuple[bytes, bytes]


class Node:
    """Answers the messages of one server, one after the other.

    Args:
        config: the owner's recipe, resolved; `data.train` is the client's own table.
        client: the client's number, where the owner knows it.
        kept: a folder for what the client keeps for itself (its own head); None for a temporary one.
        told: is given a line about all that happens.

    Raises:
        FederaError: the table cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        client: int | None = None,
        kept: Path | None = None,
        told: Callable[[str], None] = _log.info,
    ) -> None:
        self._config, self._client, self._kept_in, self._told = config, client, kept, told
        self._table = read_client(config.data, config.task)
        self._hello: Hello | None = None
        self._loaded: Pretrained | None = None
        self._data: Encoded | None = None
        self._trainer: Trainer | None = None
        self._kept: KeptStates | None = None
        self._remainders: KeptStates | None = None
        self._last: tuple[Train, Answer] | None = None

    def answer(self, header: bytes, tensors: bytes) -> Answer:
        """Return the answer to a message; whatever is wrong, there is one."""
        try:
            said, _ = unpack(header, b"", Hello, Train)
            return self._greet(said) if isinstance(said, Hello) else self._train(said, tensors)
        except FederaError as error:
            self._told(f"refused: {error}")
            # A row's content may be in the words of a mistake: the owner's to read, not the server's.
            reason = str(error)
            return pack(Refused(reason="its own data do not fit" if reason.startswith("data") else reason))
        except Exception as error:
            _log.exception("failed")
            self._told(f"failed: {type(error).__name__}: {error}")
            return pack(Refused(reason=f"failed: {type(error).__name__}"))

    def _greet(self, said: Hello) -> Answer:
        if said.protocol != PROTOCOL or said.version != VERSION:
            raise FederaError(f"federa {VERSION} here and {said.version} at the server; install the same")
        differs = difference(said.recipe, agreed(self._config))
        if differs is not None:
            raise FederaError(f"recipe: {differs}")
        if self._hello is None or said.labels != self._hello.labels or said.run != self._hello.run:
            loaded = load_model(self._config, said.labels)
            require_base(loaded, said.base, self._config.model.name)
            self._data = encoded(self._config, self._table, loaded.tokenizer, said.labels)
            self._loaded, self._trainer, self._last = loaded, None, None
        elif said.base != self._hello.base:
            raise FederaError("model.name: the server says another fingerprint than before")
        self._hello = said
        assert self._data is not None
        self._told(f"joined run {said.run}: {len(self._data)} rows")
        return pack(Here(client=self._client, rows=len(self._data)))

    def _train(self, said: Train, packed: bytes) -> Answer:
        if self._hello is None or self._hello.run != said.run:
            return pack(Refused(reason="no hello of this run yet", wants="hello"))
        if self._last is not None:
            before, answer = self._last
            if said == before:
                return answer  # the server did not get it
            if said.round <= before.round:
                raise FederaError(f"round {said.round} is over: this node has answered round {before.round}")
        most = self._longest()
        if len(packed) > most:
            raise FederaError(f"state: {len(packed)} bytes, more than {most}")
        tensors = unpack_tensors(packed)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise FederaError(f"state: {line(repr(name))} holds NaN or Inf")
        params = {name: t for name, t in tensors.items() if not name.startswith(INIT)}
        init = {name.removeprefix(INIT): t for name, t in tensors.items() if name.startswith(INIT)}
        if self._trainer is None:
            if self._loaded is None:  # preparing it failed before, half-way perhaps
                self._hello = None
                return pack(Refused(reason="the model must be loaded again", wants="hello"))
            if not init and said.round > 1 and self._config.method.moves_base:
                return pack(Refused(reason="no round-0 state yet", wants="init"))
            self._prepare(said.run, _start(params, init))
        trainer, data, kept, rounded = self._trainer, self._data, self._kept, self._remainders
        assert trainer is not None and data is not None and kept is not None and rounded is not None
        self._require_shapes(trainer, params)
        job = Job(said.round, said.client, said.seed, said.lr)
        update, keeps = trainer.train(params, data, np.arange(len(data)), job, kept.load(job))
        kept.save(job, keeps)
        sent = encode_update(self._config.wire, update, rounded, self._config.privacy)
        done = Trained(
            run=said.run,
            round=said.round,
            client=said.client,
            seed=said.seed,
            weight=update.weight,
            metrics=dict(update.metrics),
        )
        self._last = (said, pack(done, sent))
        self._told(f"round {said.round}: loss {update.metrics['loss']:.4f}")
        return self._last[1]

    def _longest(self) -> int:
        """Return the bytes that a state and a round-0 state may have; no more are looked at."""
        if self._trainer is not None:
            numbers: int = sum(math.prod(shape) for shape in self._trainer.flat.shapes.values())
        else:  # not known before the method has prepared the model; factors may be twice their matrix
            numbers = 2 * num_parameters(self._loaded.model.parameters()) if self._loaded else 0
        return 2 * 4 * numbers + SLACK_BYTES

    def _prepare(self, run: str, start: dict[str, Tensor]) -> None:
        loaded, self._loaded = self._loaded, None
        assert loaded is not None
        ready = prepare(self._config, loaded, start)
        # A folder a run: what was kept in another one is none of this one's. The name is the server's word.
        own = self._kept_in and self._kept_in / hashlib.sha256(run.encode()).hexdigest()[:16]
        self._kept = KeptStates(own, ready.local)
        self._remainders = remainders(self._config, ready.params, own)
        self._trainer = ready.trainer

    @staticmethod
    def _require_shapes(trainer: Trainer, params: dict[str, Tensor]) -> None:
        """Raise unless a state is what the model trains; a wrong one must not reach the model."""
        own = trainer.flat.shapes
        for name in {*own, *params} - {*trainer.local}:
            found = tuple(params[name].shape) if name in params else None
            if own.get(name) != found:
                raise FederaError(f"state: {line(repr(name))} has shape {found}, expected {own.get(name)}")


def _start(params: dict[str, Tensor], init: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the round-0 state: in round 1 the current one.

    Raises:
        FederaError: it is not of the same names.
    """
    if init and init.keys() != params.keys():
        odd = sorted(init.keys() ^ params.keys())[0]
        raise FederaError(f"state: the round-0 state and the current one differ in {line(repr(odd))}")
    return init or params
