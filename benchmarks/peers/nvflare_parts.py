"""FLARE's two sides, a module of its own: FLARE copies it into the job and imports it in its processes.

A FLARE site is a process that stays. The simulator can also share a few processes among a hundred sites, but
starts a new one for every task then (importing torch each time), so here each site stands for a worker: in a
round it is sent one task, trains its half of the cohort, and returns every client's tensors. That is the
fastest arrangement that FLARE's simulator has for this workload.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from learner import resident
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController
from workload import Marks, Order, Plan

SEPARATOR = "/"  # between a client's number and a tensor's name


class Site(Executor):
    """Trains the clients that a task names, from the tensors that it carries."""

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Return every client's tensors."""
        task = FLModelUtils.from_shareable(shareable)
        order = Order.from_json(task.meta["order"])
        learner = resident(order.plan, order.dropout, order.threads)
        params = {name: torch.from_numpy(np.array(array)) for name, array in task.params.items()}
        sent, total = {}, 0.0
        for client in task.meta["clients"][fl_ctx.get_identity_name()]:
            after, seconds = learner.train(params, task.meta["round"], client)
            sent |= {f"{client}{SEPARATOR}{name}": tensor.numpy() for name, tensor in after.items()}
            total += seconds
        return FLModelUtils.to_shareable(FLModel(params=sent, meta={"seconds": total}))


class Server(ModelController):
    """Sends one task a site and round, and averages.

    Args:
        order_file: JSON; FLARE would read a brace in an argument as a variable of its own.
    """

    def __init__(self, order_file: str) -> None:
        # The wait of the server's loop that a user can set (0.5 s as it comes).
        super().__init__(persistor_id="", task_check_period=0.05)
        self.order_file = order_file

    def run(self) -> None:
        """Do all rounds."""
        text = Path(self.order_file).read_text()
        order = Order.from_json(text)
        plan, marks = Plan(order.plan), Marks(order.out)
        params = {name: tensor.numpy() for name, tensor in plan.initial().items()}
        sites = sorted(client.name for client in self.engine.get_clients())
        for round_number in range(1, order.rounds + 1):
            cohort = plan.cohort(round_number)
            shares = {site: cohort[i :: len(sites)] for i, site in enumerate(sites)}
            meta = {"round": round_number, "clients": shares, "order": text}
            task = FLModel(params=params, current_round=round_number, meta=meta)
            replies = self.send_model_and_wait(data=task, targets=sites)
            sums = {name: np.zeros_like(array) for name, array in params.items()}
            for reply in replies:
                for key, array in reply.params.items():
                    sums[key.split(SEPARATOR, 1)[1]] += array
            if sum(len(reply.params) for reply in replies) != len(cohort) * len(params):
                raise RuntimeError("a FLARE site did not answer for all of its clients")
            params = {name: total / np.float32(len(cohort)) for name, total in sums.items()}
            marks.finished_round(sum(reply.meta["seconds"] for reply in replies))
        marks.write({name: torch.from_numpy(array) for name, array in params.items()})
