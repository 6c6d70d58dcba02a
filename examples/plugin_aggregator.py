"""An aggregator in one file: a mean in which large clients count less than their size.

An update is weighed by examples ** power: 1 is the usual mean, 0 counts every client alike, and what lies
between keeps a few large clients from deciding alone. Use it from a recipe:

    plugins: [plugin_aggregator.py]
    aggregator: {name: tempered_mean, power: 0.5}
"""

from typing import Literal

from pydantic import Field

from federa.aggregators import AGGREGATORS, Aggregator
from federa.aggregators.mean import RunningMean, empty_mean
from federa.types import State, Update


@AGGREGATORS.register
class TemperedMean(Aggregator):
    """Updates come one by one, already checked, and are not kept: memory is one state."""

    name: Literal["tempered_mean"] = "tempered_mean"
    power: float = Field(default=0.5, ge=0, le=1)

    def init(self, params: State) -> RunningMean:
        """Return what the sum starts from: zeros in float64."""
        return empty_mean(params)

    def accumulate(self, accumulator: RunningMean, update: Update) -> RunningMean:
        """Return the sum with one more update."""
        accumulator.add_(update.delta, update.weight**self.power)
        return accumulator

    def finish(self, accumulator: RunningMean) -> State:
        """Return the round's delta, float32."""
        return accumulator.mean()
