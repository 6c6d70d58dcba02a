"""No framework: a loop in one process, or two forked processes that share the model's pages."""

from __future__ import annotations

import multiprocessing

import torch
from learner import Learner, resident
from torch import Tensor
from workload import Marks, Order, order_from_command_line

Params = dict[str, Tensor]


def mean(states: list[Params]) -> Params:
    """Return the plain mean: all clients hold the same number of examples."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def _train(job: tuple[Order, dict[str, object], int, int]) -> tuple[dict[str, object], float]:
    """Train in a forked worker; tensors cross as NumPy arrays, which pickle in one piece."""
    order, arrays, round_number, client = job
    params = {name: torch.from_numpy(array) for name, array in arrays.items()}
    after, seconds = learner(order).train(params, round_number, client)
    return {name: tensor.numpy() for name, tensor in after.items()}, seconds


def learner(order: Order) -> Learner:
    """Return this process's learner."""
    return resident(order.plan, order.dropout, order.threads)


def rounds_in_one_process(order: Order, marks: Marks) -> Params:
    """Train one client after the other."""
    plan = learner(order).plan
    params = plan.initial()
    for round_number in range(1, order.rounds + 1):
        done = [learner(order).train(params, round_number, client) for client in plan.cohort(round_number)]
        params = mean([after for after, _ in done])
        marks.finished_round(sum(seconds for _, seconds in done))
    return params


def rounds_in_processes(order: Order, marks: Marks) -> Params:
    """Train as many clients at a time as there are workers, forked once, after the model is loaded."""
    plan = learner(order).plan  # loaded before the fork: the workers share it
    params = plan.initial()
    with multiprocessing.get_context("fork").Pool(order.workers) as pool:
        for round_number in range(1, order.rounds + 1):
            arrays = {name: tensor.numpy() for name, tensor in params.items()}
            jobs = [(order, arrays, round_number, client) for client in plan.cohort(round_number)]
            done = pool.map(_train, jobs, chunksize=1)
            params = mean([{n: torch.from_numpy(a) for n, a in after.items()} for after, _ in done])
            marks.finished_round(sum(seconds for _, seconds in done))
    return params


def main(order: Order) -> None:
    """Run, and write the marks."""
    marks = Marks(order.out)
    rounds = rounds_in_one_process if order.workers == 1 else rounds_in_processes
    marks.write(rounds(order, marks))


if __name__ == "__main__":
    main(order_from_command_line())
