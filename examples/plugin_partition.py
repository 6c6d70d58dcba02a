"""A partitioner in one file: the shards of McMahan et al. 2017 ("Communication-Efficient Learning ...").

Rows are sorted by label and cut into equal shards; each client is dealt a few, so it sees a few labels only
and all clients hold as many rows. Use it from a recipe:

    plugins: [plugin_partition.py]
    partition: {name: shards, clients: 50, per_client: 2}
"""

from typing import Literal

import numpy as np
from pydantic import Field

from federa.data.partition import PARTITIONERS, Partitioner
from federa.types import IntArray


@PARTITIONERS.register
class Shards(Partitioner):
    """Every field is a key of the recipe, `min_examples` (from Partitioner) as well."""

    name: Literal["shards"] = "shards"
    clients: int = Field(default=20, ge=1)
    per_client: int = Field(default=2, ge=1)

    def assign(self, groups: IntArray, rng: np.random.Generator) -> list[IntArray]:
        """Return the row numbers of each client; `rng` is the only randomness allowed."""
        shuffled = rng.permutation(len(groups))
        by_label = shuffled[np.argsort(groups[shuffled], kind="stable")]
        shards = np.array_split(by_label, self.clients * self.per_client)
        hands = rng.permutation(len(shards)).reshape(self.clients, self.per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]
