"""Apple's pfl: its FederatedAveraging and simulated backend, in one process or under torchrun in several."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from typing import Any

import torch
from learner import build_model
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from workload import Marks, Order, Plan, order_from_command_line


class Net(nn.Module):
    """The model as pfl wants it: with `loss` and `metrics`."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model = model
        self.mask = mask

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch; the model stays in training mode."""
        return self.model(input_ids=inputs, attention_mask=self.mask, labels=labels).loss

    def metrics(self, *_: Tensor) -> dict[str, Any]:
        """Return nothing: there is no evaluation."""
        return {}


class Timed(FederatedAveraging):
    """pfl's algorithm without its evaluation of every user in iteration 0, and with a clock on training."""

    seconds = 0.0

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Ask for training alone."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:
            contexts = tuple(dataclasses.replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics

    def simulate_one_user(self, *args: Any, **kwargs: Any) -> Any:
        """Train one user."""
        began = time.perf_counter()
        result = super().simulate_one_user(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result


class Watch(TrainingProcessCallback):
    """Notes the ends of rounds, in the first process."""

    def __init__(self, algorithm: Timed, marks: Marks, workers: int) -> None:
        self.algorithm = algorithm
        self.marks = marks
        self.workers = workers

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the end of a round; the other processes trained as many clients, for about as long."""
        self.marks.finished_round(self.algorithm.seconds * self.workers)
        self.algorithm.seconds = 0.0
        return False, Metrics()


def federated_dataset(plan: Plan) -> FederatedDataset:
    """Return the plan's clients in the plan's order; a user id is (round, client)."""
    rounds = range(1, plan.workload.rounds + 1)
    users = itertools.chain.from_iterable([(r, c) for c in plan.cohort(r)] for r in rounds)
    inputs, labels = torch.from_numpy(plan.inputs).long(), torch.from_numpy(plan.labels)

    def dataset(user: tuple[int, int]) -> Dataset:
        rows = torch.from_numpy(plan.order(*user))
        return Dataset(raw_data=(inputs[rows], labels[rows]), user_id=str(user[1]))

    return FederatedDataset(dataset, lambda: next(users))


def main(order: Order) -> None:
    """Run, and write the marks."""
    torch.set_num_threads(order.threads)
    plan, marks = Plan(order.plan), Marks(order.out)
    workload = plan.workload
    model, trained = build_model(plan, order.dropout)
    mask = torch.ones(workload.batch, workload.tokens, dtype=torch.long)
    wrapped = PyTorchModel(
        Net(model, mask),
        local_optimizer_create=functools.partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
        central_optimizer=torch.optim.SGD(trained.values(), lr=1.0),
    )
    users = federated_dataset(plan)
    backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()])
    algorithm = Timed()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=order.rounds,
            evaluation_frequency=order.rounds + 1,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=wrapped,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch
        ),
        callbacks=[Watch(algorithm, marks, order.workers)],
        send_metrics_to_platform=False,
    )
    if pytorch_ops.distributed.global_rank == 0:
        marks.write(dict(trained))


if __name__ == "__main__":
    main(order_from_command_line())
