"""federa, through its public `run`: from the recipe and the texts to the final state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from plan import schedule
from workload import Marks, Order, Plan, order_from_command_line

from federa import run
from federa.config import load_config
from federa.experiment import Experiment
from federa.run import Observer
from federa.types import Record


class Watch(Observer):
    """Checks that federa follows the plan, and notes when rounds end."""

    def __init__(self, order: Order, marks: Marks) -> None:
        self.plan = Plan(order.plan)
        self.order = order
        self.marks = marks

    def started(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Compare what federa drew with the plan, to the bit."""
        initial = self.plan.initial()
        if set(initial) != set(experiment.params) or not all(
            torch.equal(tensor, initial[name]) for name, tensor in experiment.params.items()
        ):
            raise SystemExit("federa's start is not the plan's")
        cohorts, orders = schedule(experiment, self.order.rounds)
        if not (
            np.array_equal(cohorts, self.plan.cohorts[: self.order.rounds])
            and np.array_equal(orders, self.plan.orders[: self.order.rounds])
        ):
            raise SystemExit("federa's cohorts or batches are not the plan's")

    def finished_round(self, record: Record) -> None:
        """Note the end of a round."""
        if record["rejected"]:
            raise SystemExit(f"federa rejected an update: {record['verdicts']}")
        self.marks.finished_round(record["seconds_train"])


def main(order: Order) -> None:
    """Run, and write the marks."""
    overrides = [
        f"rounds={order.rounds}",
        f"client.precision={order.precision}",
        f"client.dropout={'null' if order.dropout is None else order.dropout}",
        f"engine.name={'serial' if order.workers == 1 else 'processes'}",
        f"engine.threads={order.threads}",
    ]
    if order.workers > 1:
        overrides.append(f"engine.workers={order.workers}")
    marks = Marks(order.out)
    config = load_config(order.plan / "recipe.yaml", overrides)
    result = run(config, observer=Watch(order, marks))
    marks.write(dict(result.state.params))


if __name__ == "__main__":
    main(order_from_command_line())
