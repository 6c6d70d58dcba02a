"""The server's part of a round, checks and sum, against a plain copy of the same memory.

    python benchmarks/aggregate.py [--clients 1 10 100] [--repeats 5] [--threads 1]

`finish_round` takes updates of MiniLM's size, of full fine-tuning and of FeDeRA, in which each client's is
another piece of memory than the last one's. Bytes are those of the updates, once: a copy reads and writes
each of them. Medians of rounds and copies in turns, least and most in brackets. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from measured_run import recipe
from turns import head, in_turns, row, shown

from federa.experiment import Experiment, build_experiment
from federa.server import finish_round
from federa.state import num_bytes
from federa.types import Job, ServerState, State, Update

KEPT = 256 << 20  # bytes of different updates: more than a processor keeps near


def rivals(experiment: Experiment, clients: int) -> dict[str, Callable[[], object]]:
    """Return a round's check and sum, and a copy of its updates."""
    config, params = experiment.config, experiment.params
    draws = torch.Generator().manual_seed(0)
    different = min(clients, max(2, KEPT // num_bytes(params)))
    deltas = [
        {name: 1e-3 * torch.randn(p.shape, generator=draws) for name, p in params.items()}
        for _ in range(different)
    ]
    to: State = {name: torch.empty_like(p) for name, p in params.items()}
    jobs = [Job(1, client, client, 1e-3) for client in range(clients)]

    def check_and_sum() -> None:
        metrics = {"loss": 1.0, "examples": 64.0}
        updates = (Update(job, delta, 64.0, metrics) for job, delta in zip(jobs, cycle(deltas), strict=False))
        _, summary = finish_round(config, ServerState(0, params), jobs, updates)
        assert summary.accepted == clients

    def copy() -> None:
        for delta in islice(cycle(deltas), clients):
            for name, tensor in delta.items():
                to[name].copy_(tensor)

    return {"round": check_and_sum, "copy": copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--methods", nargs="+", default=["ft", "federa"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.thread_time if asked.threads == 1 else time.perf_counter
    print(head("updates", "clients", "check and sum, GB/s", "copy, GB/s", "of a copy's"))
    with tempfile.TemporaryDirectory() as folder:
        for method in asked.methods:
            changes = {"method": method, "partition.clients": 10, "max_update_norm": 1e9}
            experiment = build_experiment(recipe(Path(folder), changes, examples=2))
            size = num_bytes(experiment.params)
            for clients in asked.clients:
                seconds = in_turns(rivals(experiment, clients), asked.repeats, clock=clock)
                rates = {name: [clients * size / s for s in spent] for name, spent in seconds.items()}
                share = [a / b for a, b in zip(rates["round"], rates["copy"], strict=True)]
                cells = (shown(rates["round"], 1e9), shown(rates["copy"], 1e9), shown(share))
                print(row(f"{method}, {size / 1e6:.1f} MB", clients, *cells), flush=True)


if __name__ == "__main__":
    main()
