"""What the tests of federations share: clients' own tables, and a post that is a few calls in this process."""

import functools
import json
from dataclasses import replace

import pytest

from federa.config import parse_config
from federa.data.datasets import Table, read_splits
from federa.experiment import build_experiment, resolve
from federa.flower.federation import Federation, Patience, Reply
from federa.flower.node import Node
from small import small_recipe

QUICK = Patience(start=20, round=20, ask_again=0.2, poll=0.01)
THREE = {"rounds": 2, "cohort": 3, "partition": {"name": "iid", "clients": 3}}


def shards(recipe, folder):
    """Write each client's rows, and the test set, as files; return the experiment and the paths."""
    experiment = build_experiment(resolve(parse_config(recipe)))
    config = experiment.config
    splits = read_splits(config.data, config.task)
    paths = []
    for number, rows in enumerate(experiment.parts):
        examples = rows if experiment.train.example is None else sorted(set(experiment.train.example[rows]))
        paths.append(folder / f"client-{number}.parquet")
        Table.from_list([splits.train[int(i)] for i in examples]).to_parquet(paths[-1])
    test = folder / "test.parquet"
    Table.from_list(list(splits.evaluation)).to_parquet(test)
    return experiment, paths, test


def node_config(recipe, path):
    return resolve(parse_config({**recipe, "data": {"train": str(path)}}))


class LocalPost:
    """Nodes in this process; a test may take them off, or spoil what they say.

    Attributes:
        start: makes a node, by id.
        nodes: those that run.
        off: nodes that cannot be reached.
        back: after how many looks a node can be reached again; `slow` after how many it answers.
        lose: how many messages to a node are lost; `lose_answers` those from it.
        spoil: makes something else of the answers of a node.
        sent: node and kind of every message.
    """

    def __init__(self, start):
        self.start = dict(start)
        self.nodes = {node: make() for node, make in self.start.items()}
        self.off, self.back, self.slow, self.looks = set(), {}, {}, 0
        self.spoil, self.lose, self.lose_answers = {}, {}, {}
        self.replies, self.sent, self.forgotten, self.longest = [], [], [], 0

    def restart(self, node):
        self.nodes[node] = self.start[node]()

    def kinds(self, node):
        return [kind for to, kind in self.sent if to == node]

    def online(self):
        self.looks += 1
        for node in self.off & self.back.keys():
            self.back[node] -= 1
        self.off -= {node for node, looks in self.back.items() if looks <= 0}
        return set(self.nodes) - self.off

    def send(self, node, header, tensors, seconds):
        ticket = str(len(self.sent))
        self.sent.append((node, json.loads(header)["kind"]))
        if self._taken(self.lose, node):
            return ticket
        header, tensors = self.nodes[node].answer(header, tensors)
        if self._taken(self.lose_answers, node):
            return ticket
        if node in self.spoil:
            header, tensors = self.spoil[node](header, tensors)
        self.replies.append((self.looks + self.slow.get(node, 0), Reply(ticket, header, tensors)))
        return ticket

    def collect(self, tickets):
        ready = [one for one in self.replies if one[1].ticket in tickets and one[0] <= self.looks]
        self.replies = [one for one in self.replies if one not in ready]
        return [reply for _, reply in ready]

    def forget(self, ticket):
        self.forgotten.append(ticket)

    @staticmethod
    def _taken(left, node):
        left[node] = left.get(node, 0) - 1
        return left[node] >= 0


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return `shards`, once for every recipe."""
    made = {}

    def make(recipe):
        key = json.dumps(recipe)
        if key not in made:
            made[key] = shards(recipe, tmp_path_factory.mktemp("shards"))
        return made[key]

    return make


@pytest.fixture()
def federation(recipe, sharded, tmp_path):
    """Return a function that makes a federation of the recipe's clients, as nodes of their own."""

    def make(patience=None, told=lambda line: None, keys=True, keep=False, **changes):
        whole = {**recipe, **changes}
        experiment, paths, test = sharded(whole)
        start = {
            1000 + 7 * number: functools.partial(
                Node,
                node_config(whole, path),
                client=None if keys else number,
                kept=tmp_path / f"kept-{number}" if keep else None,
            )
            for number, path in enumerate(paths)
        }
        place = Federation(
            LocalPost(start),
            "run-1",
            len(paths),
            seats=dict(enumerate(start)) if keys else None,
            patience=replace(QUICK, **(patience or {})),
            told=told,
        )
        server = {**whole, "data": {"train": "elsewhere.csv", "test": str(test)}}
        return experiment, parse_config(server), place

    return make


@pytest.fixture()
def three(recipe, federation):
    """Return a function that makes a federation of three clients, two short rounds and LoRA, as it is quick."""
    quick = {**THREE, "method": {"name": "lora", "rank": 4}, "client": {**recipe["client"], "max_steps": 3}}

    def make(patience=None, **changes):
        return federation(patience, **{**quick, **changes})

    return make


@pytest.fixture(scope="module")
def one_client(encoder, train_csv, test_csv, sharded):
    """Return a function from a method's name to the experiment, and the recipe of the first of its clients."""

    def make(method):
        whole = {**small_recipe(encoder("bert"), train_csv, test_csv), **THREE}
        whole["method"] = {"name": method, "rank": 4}
        experiment, paths, _ = sharded(whole)
        return experiment, node_config(whole, paths[0])

    return make
