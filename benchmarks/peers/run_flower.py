"""Flower: its message API (ServerApp, ClientApp, FedAvg) on its Ray simulation, 100 nodes.

`run_simulation` rather than `flwr run`: the same engine without the start of a SuperLink. Actors keep model
and data in a module global. `client_resources.num_cpus` makes one actor of two threads or two of one.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable

import flower_client
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.simulation import run_simulation
from workload import Marks, Order, Plan, order_from_command_line


class PlannedFedAvg(FedAvg):
    """Flower's FedAvg with the plan's cohorts in the place of its own draw."""

    def __init__(self, order: Order, plan: Plan, marks: Marks) -> None:
        super().__init__(
            fraction_train=plan.workload.cohort / plan.workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=plan.workload.cohort,
            min_available_nodes=plan.workload.clients,
        )
        self.order = order
        self.plan = plan
        self.marks = marks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the global arrays to as many nodes as the cohort has clients."""
        cohort = self.plan.cohort(server_round)
        nodes, _ = sample_nodes(grid, self.min_available_nodes, len(cohort))  # waits for all, as FedAvg does
        for node, client in zip(nodes, cohort, strict=True):
            values = {"server-round": server_round, "client": client, "order": self.order.to_json()}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(values)})
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as Flower does, and note the end of the round."""
        replies = list(replies)
        if len(replies) != self.plan.workload.cohort or any(reply.has_error() for reply in replies):
            raise RuntimeError("a Flower client failed: see the log")
        seconds = [float(reply.content["metrics"]["seconds"]) for reply in replies]
        result = super().aggregate_train(server_round, replies)
        self.marks.finished_round(sum(seconds))
        return result


def main(order: Order) -> None:
    """Run, and write the marks."""
    plan, marks = Plan(order.plan), Marks(order.out)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = PlannedFedAvg(order, plan, marks)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(plan.initial()), num_rounds=order.rounds
        )
        marks.write(result.arrays.to_torch_state_dict())

    os.environ["RAY_ADDRESS"] = "local"  # or Ray joins whatever cluster this machine has, or had
    try:
        run_simulation(
            server_app=server,
            client_app=flower_client.app,
            num_supernodes=plan.workload.clients,
            backend_config={
                "init_args": {"num_cpus": order.workers * order.threads},
                "client_resources": {"num_cpus": order.threads, "num_gpus": 0.0},
            },
        )
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the server's thread would wait for nodes for ever


if __name__ == "__main__":
    main(order_from_command_line())
