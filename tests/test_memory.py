"""Memory does not grow with the number of clients, as no update is kept once it is summed, nor much with workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

from running import configure

MOST = 1.2  # times the memory of 10 clients with a cohort of 4
ROWS = 1200

# One process reads its libraries once, and forks for every run: the peak of a fork is its own.
DRIVER = """
import json, os, resource, sys
from pathlib import Path
import federa
from federa.config import parse_config, read_yaml
import torch
from federa.aggregators import Mean
torch.set_num_threads(1)
for recipe in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        if "kept" in recipe:  # what must not be: every update of the round in a list
            kept, accumulate = [], Mean.accumulate
            Mean.accumulate = lambda self, so_far, update: (kept.append(update), accumulate(self, so_far, update))[1]
        result = federa.run(parse_config(read_yaml(Path(recipe))))
        (record,) = result.records
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"clients": record["clients"], "peak": peak, "bytes": record["bytes_up"]}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, recipe
"""


@pytest.fixture(scope="module")
def large(encoder, tmp_path_factory):
    """A BERT whose updates weigh about 5 MB, by full fine-tuning as by factors of rank 128."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2048,
        max_position_embeddings=80, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder("bert")).save_pretrained(folder)
    return folder


def recipes(recipe, large, train_csv, folder):
    """Recipes by name: methods by size, and one that is to keep every update."""
    header, *lines = train_csv.read_text().splitlines()
    train = folder / "train.csv"
    train.write_text("\n".join([header, *(lines * 5)[:ROWS]]) + "\n")
    common = {
        "model__name": str(large), "data__train": str(train), "rounds": 1, "client__max_steps": 1,
        "client__batch_size": 1, "evaluate_every": 0, "data__max_test": 8, "task__max_length": 8,
    }  # fmt: skip
    methods = {
        "ft": {"method": {"name": "ft"}},
        "federa": {"method": {"name": "federa", "rank": 128, "targets": "all-linear"}},
    }
    few = {"partition": {"name": "iid", "clients": 10}, "cohort": 4}
    many = {"partition": {"name": "iid", "clients": 1000}, "cohort": 64}
    made = {
        f"{name} {size}": configure(recipe, **common, **method, **clients)
        for name, method in methods.items()
        for size, clients in (("few", few), ("many", many))
    }
    return made | {"ft kept": made["ft many"]}


def test_a_thousand_clients_need_no_more_memory_than_ten(recipe, large, train_csv, tmp_path):
    made = recipes(recipe, large, train_csv, tmp_path)
    paths = []
    for name, config in made.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, paths)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = dict(zip(made, map(json.loads, process.stdout.splitlines()), strict=True))
    peak = {name: answer["peak"] for name, answer in found.items()}
    assert [answer["clients"] for answer in found.values()] == [4, 64, 4, 64, 64]
    for method in ("ft", "federa"):
        assert found[f"{method} many"]["bytes"] / 64 > 4e6, (
            "updates so small that keeping them would not be seen"
        )
        assert peak[f"{method} many"] <= MOST * peak[f"{method} few"], peak
    assert peak["ft kept"] > MOST * peak["ft few"], (
        f"this test would not notice updates that are kept: {peak}"
    )


# Workers


# In a process of its own: a worker's garbage collector writes to pages of all objects that the parent has.
WORKERS = """
import multiprocessing, os, sys
from pathlib import Path
import torch
from federa.config import parse_config, read_yaml
from federa.engines.processes import Processes, ProcessesSession
from federa.experiment import build_experiment
from federa.server import make_jobs
from federa.state import num_bytes

def proportional():  # the bytes of this process and its children; a page that several have counts once
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

def with_workers(count):  # all processes together, when every worker has trained
    with Processes(workers=count).open(experiment) as session:
        sizes = [len(part) for part in experiment.parts]
        list(session.train(experiment.params, make_jobs(experiment.config, 1, sizes)))
        assert len(multiprocessing.active_children()) == count
        return proportional()

experiment = build_experiment(parse_config(read_yaml(Path(sys.argv[1]))))
model, serve = experiment.trainer.model, ProcessesSession._serve

def copying(self, pipe):  # what must not be: a backbone of its own in each worker
    torch.set_num_threads(1)  # before the first copy: a pool of threads does not survive a fork
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    serve(self, pipe)

print(num_bytes(dict(model.named_parameters())), with_workers(1), with_workers(2))
ProcessesSession._serve = copying
print(with_workers(2))
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory that is shared cannot be told"
)
def test_a_second_worker_costs_little_beside_the_backbone(recipe, encoder, tmp_path):
    """Of MiniLM's size, 90 MB: what is frozen is there once, whoever works with it."""
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(encoder("bert")).save_pretrained(tmp_path)
    made = configure(
        recipe, model__name=str(tmp_path), method__name="lora", cohort=6, client__max_steps=1, client__batch_size=2
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    process = subprocess.run(
        [sys.executable, "-c", WORKERS, str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    backbone, one, two, copied = map(int, process.stdout.split())
    print(
        f"{backbone / 1e6:.0f} MB of backbone; with workers {one / 1e6:.0f}, {two / 1e6:.0f}, {copied / 1e6:.0f}"
    )
    assert backbone > 80e6
    assert two - one < backbone / 2
    assert copied - two > backbone, "this test would not notice copies"
