"""What server and nodes say to each other: a header of JSON and tensors as safetensors, never pickle.

The server asks, a node answers. `Hello` comes first: it says which recipe and model the federation is of, and
what it calls the labels; the node says how much data it has. `Train` is one job of a round. A node that does
not do what it is asked says why with `Refused`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from federa.config import RunConfig
from federa.types import FederaError, State

PROTOCOL = 1  # of these messages; both sides must speak the same
VERSION = importlib.metadata.version("federa")
HEADER_BYTES = 1 << 20  # no header is longer
SLACK_BYTES = 1 << 16  # of names and shapes, beside the tensors themselves
MAX_ROWS = 10_000_000  # of one client


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


class Hello(_Said):
    """The server's first words.

    Attributes:
        kind: tells messages apart.
        protocol: of the messages.
        version: of the server's federa.
        run: names the run; the same after the server was started again.
        recipe: the parts of it that both sides must have the same.
        base: fingerprint of the pretrained encoder.
        labels: label names, in the order of their ids.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    version: str
    run: str
    recipe: dict[str, Any]
    base: str
    labels: list[str]


class Here(_Said):
    """A node's answer to `Hello`.

    Attributes:
        kind: tells messages apart.
        client: the number that its owner gave it, if any; where nodes have keys the server knows better.
        rows: what the node trains on in an epoch; its updates weigh no more.
    """

    kind: Literal["here"] = "here"
    client: int | None
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]


class Train(_Said):
    """One job; the tensors are the global state, and those named `init/...` the round-0 state.

    Attributes:
        kind: tells messages apart.
        run: names the run.
        round: counted from 1.
        client: the client's number.
        seed: of batches and dropout.
        lr: learning rate.
    """

    kind: Literal["train"] = "train"
    run: str
    round: Annotated[int, Field(ge=1)]
    client: Annotated[int, Field(ge=0)]
    seed: int
    lr: float


class Trained(_Said):
    """A node's answer to `Train`; the tensors are the delta.

    Attributes:
        kind: tells messages apart.
        run: names the run.
        round: of the job.
        client: of the job.
        seed: of the job.
        weight: examples trained on in an epoch.
        metrics: as in `Update`.
    """

    kind: Literal["trained"] = "trained"
    run: str
    round: int
    client: int
    seed: int
    weight: float
    metrics: dict[str, float]


class Refused(_Said):
    """A node's answer when it does not do what it was asked.

    Attributes:
        kind: tells messages apart.
        reason: one line; nothing of the node's data is in it.
        wants: what would help: `hello` (the node has just been started), or `init` (the round-0 state).
    """

    kind: Literal["refused"] = "refused"
    reason: str
    wants: Literal["hello", "init"] | None = None


KINDS: dict[str, type[_Said]] = {
    cls.model_fields["kind"].default: cls for cls in (Hello, Here, Train, Trained, Refused)
}
One = TypeVar("One", bound=_Said)
Other = TypeVar("Other", bound=_Said)
INIT = "init/"
OWN = (
    "precision",
    "micro_batch",
    "checkpointing",
    "reuse_frozen",
    "cuda_graphs",
)  # of `client`: each machine's own business


def pack(said: _Said, state: State | None = None) -> tuple[bytes, bytes]:
    """Return a message as header and tensors."""
    whole = {n: t.detach().cpu().contiguous() for n, t in (state or {}).items()}
    return said.model_dump_json().encode(), save(whole) if whole else b""


def unpack(
    header: bytes, tensors: bytes, one: type[One], other: type[Other]
) -> tuple[One | Other, dict[str, Tensor]]:
    """Return what a message says, which must be of one of two kinds.

    Raises:
        FederaError: it is none of the expected kinds, or damaged.
    """
    if len(header) > HEADER_BYTES:
        raise FederaError(f"message: a header of {len(header)} bytes")
    try:
        raw = json.loads(header)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair can be said, and not be written
        kind = raw.get("kind") if isinstance(raw, dict) else None
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        if cls is not one and cls is not other:
            raise FederaError(f"message: {line(repr(kind), 40)} was not expected")
        said = one.model_validate(raw) if cls is one else other.model_validate(raw)
        return said, unpack_tensors(tensors)
    except FederaError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = line(".".join(map(str, first["loc"])), 40)
        raise FederaError(f"message: {where}: {first['msg']}") from error
    except Exception as error:  # whatever a stranger's bytes do to those who read them
        raise FederaError(f"message: damaged ({type(error).__name__})") from error


def unpack_tensors(tensors: bytes) -> dict[str, Tensor]:
    """Return the tensors of a message.

    Raises:
        FederaError: they are damaged.
    """
    try:
        return load(tensors) if tensors else {}
    except Exception as error:  # whatever a stranger's bytes do to those who read them
        raise FederaError(f"message: damaged ({type(error).__name__})") from error


def line(text: str, most: int = 200) -> str:
    """Return a stranger's text as part of a line: printable, and no longer than that."""
    shown = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"


def agreed(config: RunConfig) -> dict[str, Any]:
    """Return what of a recipe server and nodes must have the same.

    Data, device, and how a machine saves memory are its own business.
    """
    whole = config.model_dump(mode="json")
    client = {key: value for key, value in whole["client"].items() if key not in OWN}
    return {
        "seed": whole["seed"],
        "model": {"train_pooler": whole["model"]["train_pooler"]},
        "task": whole["task"],
        "method": whole["method"],
        "client": client,
        "wire": whole["wire"],
        "privacy": whole["privacy"],
    }


def difference(asked: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return the first key in which two recipes differ, with both values, or None."""
    for key in [*own, *(k for k in asked if k not in own)]:
        one, other = asked.get(key), own.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found = difference(one, other, f"{prefix}{key}.")
            if found is not None:
                return found
        elif one != other:
            return f"{prefix}{key} is {other!r:.60} here and {one!r:.60} at the server"
    return None
