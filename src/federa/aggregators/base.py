"""The interface of aggregators: accumulate the updates of a round one by one, then finish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from federa.registry import Component, Registry
from federa.types import State, Update


class Aggregator(Component, ABC):
    """Turns the checked updates of a round, which come in job order, into the round's delta.

    Updates have passed the server's checks: same keys and shapes as `params`, finite, weight > 0.
    """

    @abstractmethod
    def init(self, params: State) -> Any:
        """Return an empty accumulator for states like `params`."""

    @abstractmethod
    def accumulate(self, accumulator: Any, update: Update) -> Any:
        """Return the accumulator with one more update; may change the old one in place."""

    @abstractmethod
    def finish(self, accumulator: Any) -> State:
        """Return the round's delta, float32.

        Raises:
            ValueError: nothing was accumulated.
        """


AGGREGATORS: Registry[Aggregator] = Registry("aggregator")
