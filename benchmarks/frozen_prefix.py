"""What keeping the frozen layers' hidden states brings: rounds of a run with and without, in turns.

    python benchmarks/frozen_prefix.py --repeats 3 rounds=8

The same rounds of the same clients, each with its evaluation, by linear probing and by LoRA on the last layer
alone. A turn is a round without, with, and with once more, when all of its texts have been met.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from federa.config import RunConfig, load_config
from federa.engines import Serial
from federa.experiment import build_experiment, resolve
from federa.server import finish_round, make_jobs
from federa.types import ServerState

RECIPES = {
    "probe": {"method": {"name": "probe"}},
    "lora on layer 5": {
        "method": {
            "name": "lora",
            "rank": 16,
            "targets": [f"layer.5.attention.self.{m}" for m in ("query", "value")],
        }
    },
}


class Lane:
    """A run in its own model, played round by round."""

    def __init__(self, config: RunConfig) -> None:
        self.experiment = build_experiment(config)
        self.state = ServerState(0, self.experiment.params)

    def play(self, number: int) -> float:
        """Return the seconds of a round and its evaluation."""
        experiment, config = self.experiment, self.experiment.config
        jobs = make_jobs(config, number, [len(part) for part in experiment.parts])
        batches = experiment.batches(np.arange(len(experiment.evaluation)))
        with Serial(threads=1).open(experiment) as session:
            began, start = time.perf_counter(), self.state.params
            self.state, _ = finish_round(config, self.state, jobs, session.train(start, jobs))
            list(session.predict(self.state.params, batches))
            return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = ["client.dropout=0", "client.precision=bf16", *options.overrides]
    for name, changes in RECIPES.items():
        plain = resolve(load_config(overrides=own).replace(**changes))
        runs, rounds = [], []
        for _ in range(options.repeats):
            without, reusing = (Lane(plain.replace(**{"client.reuse_frozen": on})) for on in (False, True))
            turns = []
            for number in range(1, plain.rounds + 1):
                before, start = without.play(number), reusing.state
                after, reusing.state, end = reusing.play(number), start, reusing.state
                again, reusing.state = reusing.play(number), end
                turns.append((before, after, again))
                print(f"{name}: without {before:.2f} s, with {after:.2f} s, again {again:.2f} s", flush=True)
            one, other = (lane.state.params for lane in (without, reusing))
            print(f"apart {max(float(torch.dist(one[n], t) / t.norm()) for n, t in other.items()):.1e}")
            runs.append(sum(turn[0] for turn in turns) / sum(turn[1] for turn in turns))
            rounds += [before / again for before, _, again in turns]
        for what, ratios in (("a run", runs), ("a round whose texts are kept", rounds)):
            print(
                f"{name}, {what}: {np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", flush=True
            )


if __name__ == "__main__":
    main()
