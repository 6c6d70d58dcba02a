"""Partitioners: who holds which training example."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from federa.registry import Component, Registry
from federa.seeds import generator
from federa.types import FederaError, IntArray

Count = Annotated[int, Field(ge=1)]
Concentration = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Partitioner(Component, ABC):
    """Splits training examples over clients: deterministic, disjoint, exhaustive.

    Call `partition_examples`, which seeds the draw and sees to `min_examples`.

    Attributes:
        clients: the number of clients; None where the data decides.
        min_examples: no client is left with fewer; the largest clients give some of theirs.
        skews: whether the groups of the examples matter.
    """

    skews: ClassVar[bool] = True
    clients: Count | None = 20
    min_examples: Count = 1

    @abstractmethod
    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:
        """Return the row numbers of each client, before `min_examples` is seen to.

        Args:
            groups: `(num_examples,)`, at least one; what the partition may skew on: labels, or the codes
                of a column.
            rng: the only source of randomness.

        Raises:
            FederaError: these groups cannot be split as asked.
        """


PARTITIONERS: Registry[Partitioner] = Registry("partition")


def partition_examples(partitioner: Partitioner, groups: IntArray, seed: int) -> list[IntArray]:
    """Return the row numbers that each client holds, ascending; every row is held exactly once.

    Args:
        partitioner: the rule.
        groups: `(num_examples,)` labels, or the codes of a column (see `Partitioner.assign`).
        seed: the recipe's seed; the same seed gives the same split.

    Returns:
        One int64 array a client; its length is the number of clients.

    Raises:
        FederaError: fewer rows than `clients * min_examples`, or a split that the rule cannot make.
    """
    least = partitioner.min_examples
    _require_rows(len(groups), partitioner.clients or 1, least)
    rng = generator(seed, "partition")
    parts = partitioner.assign(groups, rng)
    _require_rows(len(groups), len(parts), least)
    return [np.sort(part).astype(np.int64) for part in _topped_up(parts, least, rng)]


def group_counts(parts: Sequence[IntArray], groups: IntArray, num_groups: int) -> IntArray:
    """Return how many rows of each group each client holds, of shape `(clients, num_groups)`.

    Args:
        parts: the row numbers of each client.
        groups: `(num_examples,)` codes in `[0, num_groups)`.
        num_groups: the number of columns, whether or not each group occurs.

    Raises:
        ValueError: a group outside `[0, num_groups)`.
    """
    if len(groups) and (groups.min() < 0 or groups.max() >= num_groups):
        raise ValueError(f"groups lie in [{groups.min()}, {groups.max()}], not in [0, {num_groups})")
    counts = [np.bincount(groups[part], minlength=num_groups) for part in parts]
    return np.array(counts, dtype=np.int64).reshape(len(parts), num_groups)


@PARTITIONERS.register
class Iid(Partitioner):
    """Shuffled rows in equal parts; sizes differ by at most one."""

    skews: ClassVar[bool] = False
    name: Literal["iid"] = "iid"
    clients: Count = 20

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        return np.array_split(rng.permutation(len(groups)), self.clients)


@PARTITIONERS.register
class Dirichlet(Partitioner):
    """Each group is spread over the clients by its own draw from Dirichlet(alpha * 1_clients).

    Mixes and sizes both differ between clients (Hsu et al. 2019, "Measuring the effects of non-identical
    data distribution"; in the per-class form of Yurochkin et al. 2019). This alpha is far milder than
    the same alpha of `fednlp`.

    Attributes:
        alpha: concentration; a small one leaves each group with few clients.
    """

    name: Literal["dirichlet"] = "dirichlet"
    clients: Count = 20
    alpha: Concentration = 0.5

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        codes, sizes = _encoded(groups)
        alphas = np.full(self.clients, self.alpha)
        counts = [_cut(int(size), _dirichlet(alphas, rng)) for size in sizes]
        return _dealt(np.stack(counts, axis=1), codes, rng)


@PARTITIONERS.register
class FedNLP(Partitioner):
    """Clients of equal size, each with its own mix of groups from Dirichlet(alpha * prior).

    The protocol of Lin et al. 2022, "FedNLP": `prior` is the share of each group in all rows, and a group
    that has run out is made up from the others in proportion to what they have left, so the last clients
    are less skewed than the first. FedNLP gives the `rows mod clients` rows left over to the last client;
    here the first clients get one each.

    Attributes:
        alpha: total concentration; a small one leaves each client with few groups.
    """

    name: Literal["fednlp"] = "fednlp"
    clients: Count = 20
    alpha: Concentration = 1.0

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        codes, left = _encoded(groups)
        alphas = self.alpha * left / len(groups)
        counts = np.zeros((self.clients, len(left)), dtype=np.int64)
        smaller, larger = divmod(len(groups), self.clients)
        for client in range(self.clients):
            size = smaller + (client < larger)
            taken = np.minimum(_cut(size, _dirichlet(alphas, rng)), left)
            taken += _cut(size - int(taken.sum()), left - taken)
            counts[client] = taken
            left -= taken
        return _dealt(counts, codes, rng)


@PARTITIONERS.register
class Quantity(Partitioner):
    """Sizes from Dirichlet(beta * 1_clients), rows at random whatever their group (Lin et al. 2022).

    Attributes:
        beta: concentration; a small one gives most rows to few clients.
    """

    skews: ClassVar[bool] = False
    name: Literal["quantity"] = "quantity"
    clients: Count = 20
    beta: Concentration = 1.0

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        sizes = _cut(len(groups), _dirichlet(np.full(self.clients, self.beta), rng))
        return np.split(rng.permutation(len(groups)), np.cumsum(sizes)[:-1])


@PARTITIONERS.register
class Pathological(Partitioner):
    """Few groups a client: groups are cut into shards of similar size, and each client gets a few shards.

    After McMahan et al. 2017, except that a shard never straddles two groups, and that a client draws two
    shards of one group only where the group has more shards than there are clients. With `min_examples`
    above 1, a client that is topped up may hold further groups.

    Attributes:
        classes_per_client: the shards, and so at most the groups, of one client.
    """

    name: Literal["pathological"] = "pathological"
    clients: Count = 20
    classes_per_client: Count = 2

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        codes, sizes = _encoded(groups)
        if len(sizes) > self.clients * self.classes_per_client:
            raise FederaError(
                f"partition: {self.clients} clients with {self.classes_per_client} classes each cannot hold"
                f" {len(sizes)} classes; set classes_per_client to {-(-len(sizes) // self.clients)} or more"
            )
        total = min(self.clients * self.classes_per_client, len(groups))
        # One shard a group and further ones by size; no group gets more shards than rows, so none is empty.
        shards = 1 + _cut(total - len(sizes), sizes - 1)
        shard_group = np.repeat(np.arange(len(sizes)), shards)
        shard_rows = [_cut(int(size), np.ones(n)) for size, n in zip(sizes, shards, strict=True)]
        # Groups in random order, dealt round to clients in random order: neighbours of a group part company.
        place = np.argsort(np.argsort(rng.permutation(len(sizes))[shard_group], kind="stable"))
        holder = rng.permutation(self.clients)[place % self.clients]
        counts = np.zeros((self.clients, len(sizes)), dtype=np.int64)
        np.add.at(counts, (holder, shard_group), np.concatenate(shard_rows))
        return _dealt(counts, codes, rng)


@PARTITIONERS.register
class Natural(Partitioner):
    """The split that the data brings: rows with the same value of a column stay together.

    Only `min_examples` can take rows of a value away from its client.

    Attributes:
        column: the column whose codes are the groups, for example `author`.
        clients: None for one client a value, in the order of the codes; or a number, and the values are
            dealt whole, largest first, to the client with the fewest rows.
    """

    name: Literal["natural"] = "natural"
    column: Annotated[str, Field(min_length=1)]
    clients: Count | None = None

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:  # noqa: D102
        codes, sizes = _encoded(groups)
        if self.clients is None:
            return _members(codes, len(sizes))
        if self.clients > len(sizes):
            raise FederaError(
                f"partition: {self.clients} clients but {len(sizes)} values of column {self.column!r};"
                f" set clients to {len(sizes)} or fewer, or leave it out for one client a value"
            )
        return _members(_packed(sizes, self.clients)[codes], self.clients)


def _require_rows(rows: int, clients: int, least: int) -> None:
    """Raise FederaError where `rows` cannot give each client its `least` rows."""
    if rows < clients * least:
        raise FederaError(
            f"partition: fewer rows than clients need: {rows} rows, {clients} clients, min_examples {least};"
            " use fewer clients, a smaller min_examples or more rows"
        )


def _encoded(groups: IntArray) -> tuple[IntArray, IntArray]:
    """Return codes `(num_examples,)` from 0 without gaps, and the rows of each code `(num_codes,)`."""
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return codes.astype(np.int64), sizes.astype(np.int64)


def _members(codes: IntArray, count: int) -> list[IntArray]:
    """Return the rows of every code in `[0, count)`, ascending."""
    ends = np.cumsum(np.bincount(codes, minlength=count))
    return np.split(np.argsort(codes, kind="stable"), ends[:-1])


def _dirichlet(alphas: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return one draw from Dirichlet(alphas), sound for any positive alphas.

    Drawn as logarithms by Gamma(a) = Gamma(a + 1) * U^(1/a), because with small alphas all of the
    gamma variables underflow to zero and their shares become NaN.
    """
    alphas = np.maximum(alphas, 1e-100)  # keeps 1/a finite; so small a draw is one-hot anyway
    logs = np.log(rng.standard_gamma(alphas + 1)) - rng.standard_exponential(len(alphas)) / alphas
    gammas = np.exp(logs - logs.max())
    shares: npt.NDArray[np.float64] = gammas / gammas.sum()
    return shares


def _cut(total: int, weights: npt.NDArray[Any]) -> IntArray:
    """Return whole numbers that add up to `total`, in proportion to `weights`.

    They are the gaps between the rounded cumulative shares, so each is less than one off its exact
    share. Whole weights are cut in whole-number arithmetic: where they add up to `total` or more, no
    number exceeds its weight.
    """
    if total == 0:
        return np.zeros(len(weights), dtype=np.int64)
    ends = np.cumsum(weights)
    rounded: IntArray = ((2 * total * ends + ends[-1]) // (2 * ends[-1])).astype(np.int64)
    return np.diff(rounded, prepend=np.int64(0))


def _dealt(counts: IntArray, codes: IntArray, rng: np.random.Generator) -> list[IntArray]:
    """Return rows by client, drawn at random within each group.

    Args:
        counts: `(clients, groups)` how many rows of each group each client gets; columns add up to the
            sizes of the groups.
        codes: `(num_examples,)` the group of each row.
        rng: draws which rows.
    """
    clients = np.arange(len(counts))
    owner = np.empty(len(codes), dtype=np.int64)
    for taken, rows in zip(counts.T, _members(codes, counts.shape[1]), strict=True):
        owner[rng.permutation(rows)] = np.repeat(clients, taken)
    return _members(owner, len(counts))


def _packed(sizes: IntArray, clients: int) -> IntArray:
    """Return the client of each value: largest value first, to the client with the fewest rows."""
    owner = np.empty(len(sizes), dtype=np.int64)
    loads = [(0, client) for client in range(clients)]
    for value in np.argsort(-sizes, kind="stable"):
        load, client = loads[0]
        owner[value] = client
        heapq.heapreplace(loads, (load + int(sizes[value]), client))
    return owner


def _topped_up(parts: list[IntArray], least: int, rng: np.random.Generator) -> list[IntArray]:
    """Return parts of at least `least` rows: random rows move from whoever is largest at the moment.

    Needs `least * len(parts)` rows in all: then somebody holds more than `least` as long as anybody
    holds fewer, so no giver falls short itself.
    """
    if all(len(part) >= least for part in parts):
        return parts
    held: list[list[int]] = [rng.permutation(part).tolist() for part in parts]
    largest = [(-len(rows), client) for client, rows in enumerate(held)]
    heapq.heapify(largest)
    for poor in held:
        while len(poor) < least:
            size, giver = largest[0]
            poor.append(held[giver].pop())
            heapq.heapreplace(largest, (size + 1, giver))
    return [np.array(rows, dtype=np.int64) for rows in held]
