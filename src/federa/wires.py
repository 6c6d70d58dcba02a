"""How an update travels: as it is, or rounded; what rounding took away is added to the client's next update.

Error feedback is that of Seide et al. 2014 (1-bit SGD) and Karimireddy et al. 2019 (arXiv 1901.09847): a
client sends C(d + e) for its update d, and keeps e' = d + e - C(d + e) for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from federa.engines.base import Session
from federa.privacy import Privacy
from federa.registry import Component, Registry
from federa.state import num_bytes
from federa.types import FederaError, FloatArray, IntArray, Job, State, Update


class Wire(Component, ABC):
    """What becomes of an update on its way to the server."""

    @property
    def remembers(self) -> bool:
        """Whether clients keep what rounding took away, and add it to their next update."""
        return False

    @abstractmethod
    def encode(self, delta: State) -> dict[str, Tensor]:
        """Return what is sent for float32 tensors."""

    @abstractmethod
    def decode(self, sent: State, like: State) -> dict[str, Tensor]:
        """Return float32 tensors from what was sent, in the order of `like`.

        Args:
            sent: what came.
            like: tensors of the names and shapes that are expected.

        Raises:
            FederaError: it is not what `encode` gives for such tensors.
        """

    def size(self, like: State) -> int:
        """Return the bytes of an update of such tensors."""
        return num_bytes(self.encode(like))


WIRES: Registry[Wire] = Registry("wire")


@WIRES.register
class Fp32(Wire):
    """Updates as they are."""

    name: Literal["fp32"] = "fp32"

    def encode(self, delta: State) -> dict[str, Tensor]:  # noqa: D102
        return dict(delta)

    def decode(self, sent: State, like: State) -> dict[str, Tensor]:  # noqa: D102
        return _in_order(sent, like)  # what does not fit is for the server's checks


@WIRES.register
class Fp16(Wire):
    """Updates in half precision.

    Attributes:
        error_feedback: clients keep what rounding took away, and add it to their next update.
    """

    name: Literal["fp16"] = "fp16"
    error_feedback: bool = True

    @property
    def remembers(self) -> bool:  # noqa: D102
        return self.error_feedback

    def encode(self, delta: State) -> dict[str, Tensor]:  # noqa: D102
        return {name: t.half() for name, t in delta.items()}

    def decode(self, sent: State, like: State) -> dict[str, Tensor]:  # noqa: D102
        for name, tensor in sent.items():
            if tensor.dtype != torch.float16:
                raise FederaError(f"wire fp16: {name!r} came as {tensor.dtype}")
        return {name: t.float() for name, t in _in_order(sent, like).items()}


@WIRES.register
class Int8(Wire):
    """Updates as whole numbers from -127 to 127, with a scale for every vector along the longest axis.

    Attributes:
        error_feedback: clients keep what rounding took away, and add it to their next update.
    """

    name: Literal["int8"] = "int8"
    error_feedback: bool = True

    @property
    def remembers(self) -> bool:  # noqa: D102
        return self.error_feedback

    def encode(self, delta: State) -> dict[str, Tensor]:  # noqa: D102
        sent = {}
        for name, tensor in delta.items():
            scale = tensor.abs().amax(dim=_longest(tensor), keepdim=True) / 127
            steps = tensor / torch.where(scale == 0, 1.0, scale)
            # A NaN has no place among whole numbers: its scale is NaN, and so is all that it scales.
            sent[name] = steps.nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)
            sent[name + SCALE] = scale
        return sent

    def decode(self, sent: State, like: State) -> dict[str, Tensor]:  # noqa: D102
        out = {}
        for name, tensor in like.items():
            steps, scale = sent.get(name), sent.get(name + SCALE)
            if steps is None or scale is None or len(sent) != 2 * len(like):
                raise FederaError(f"wire int8: wrong keys ({name!r} among {len(sent)} tensors)")
            expected = tensor.abs().amax(dim=_longest(tensor), keepdim=True).shape
            if steps.dtype != torch.int8 or steps.shape != tensor.shape:
                raise FederaError(f"wire int8: {name!r} came as {steps.dtype} {tuple(steps.shape)}")
            if scale.dtype != torch.float32 or scale.shape != expected:
                raise FederaError(
                    f"wire int8: the scales of {name!r} came as {scale.dtype} {tuple(scale.shape)}"
                )
            out[name] = steps.float() * scale
        return out


SCALE = "/scale"


def _longest(tensor: Tensor) -> tuple[int, ...]:
    """Return the axis along which a scale is shared."""
    return (max(range(tensor.ndim), key=lambda axis: tensor.shape[axis]),) if tensor.ndim else ()


def _in_order(sent: State, like: State) -> dict[str, Tensor]:
    """Return tensors in the order that is expected; the last bits of a norm know it."""
    return {
        name: sent[name] for name in (*(n for n in like if n in sent), *(n for n in sent if n not in like))
    }


class Remainders(Protocol):
    """What clients keep for themselves, by job."""

    def load(self, job: Job) -> State:
        """Return what the job's client kept last."""

    def save(self, job: Job, state: State) -> None:
        """Keep a state for the client's next job."""


def encode_update(
    wire: Wire, update: Update, kept: Remainders, privacy: Privacy | None = None
) -> dict[str, Tensor]:
    """Return what a client sends for an update, clipped if need be; what rounding takes away is kept."""
    if privacy is not None:  # the server's word for it is not needed
        update = privacy.clipped(update)
    if not wire.remembers:
        return wire.encode(update.delta)
    before = kept.load(update.job)
    whole = {name: t + before[name] if name in before else t for name, t in update.delta.items()}
    sent = wire.encode(whole)
    read = wire.decode(sent, whole)
    kept.save(update.job, {name: t - read[name] for name, t in whole.items()})
    return sent


class Wired:
    """An engine's session whose updates travel over a wire, as they would between machines."""

    def __init__(
        self, session: Session, wire: Wire, kept: Remainders, privacy: Privacy | None = None
    ) -> None:
        self._session, self._wire, self._kept, self._privacy = session, wire, kept, privacy

    def train(self, params: State, jobs: Sequence[Job]) -> Iterator[Update]:
        """See `Session.train`."""
        for update in self._session.train(params, jobs):
            sent = encode_update(self._wire, update, self._kept, self._privacy)
            yield Update(update.job, self._wire.decode(sent, params), update.weight, update.metrics)

    def predict(
        self, params: State, batches: Sequence[IntArray], job: Job | None = None
    ) -> Iterator[list[FloatArray]]:
        """See `Session.predict`."""
        return self._session.predict(params, batches, job)
