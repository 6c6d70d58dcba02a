"""What the tests of federations share: clients' own tables, and a post that is a few calls in this process."""

import json

import pytest

from federa.config import parse_config
from federa.data.datasets import Table, read_splits
from federa.experiment import build_experiment, resolve
from federa.flower.federation import Federation, Patience, Reply
from federa.flower.node import Node

QUICK = Patience(start=20, round=20, ask_again=0.2, poll=0.01)


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
    """Nodes in this process; a test may take them off, or spoil what they say."""

    def __init__(self, nodes):
        self.nodes = dict(nodes)
        self.off, self.replies, self.sent, self.spoil, self.lose = set(), [], [], {}, {}

    def online(self):
        return set(self.nodes) - self.off

    def send(self, node, header, tensors, seconds):
        ticket = str(len(self.sent))
        self.sent.append((node, json.loads(header)["kind"], len(tensors)))
        if self.lose.get(node, 0) > 0:
            self.lose[node] -= 1
            return ticket
        header, tensors = self.nodes[node].answer(header, tensors)
        if node in self.spoil:
            header, tensors = self.spoil[node](header, tensors)
        self.replies.append(Reply(ticket, header, tensors))
        return ticket

    def collect(self, tickets):
        ready = [reply for reply in self.replies if reply.ticket in tickets]
        self.replies = [reply for reply in self.replies if reply.ticket not in tickets]
        return ready


@pytest.fixture()
def federation(recipe, tmp_path):
    """Return a function that makes a federation of the recipe's clients, as nodes of their own."""

    def make(patience=QUICK, rows=None, told=lambda line: None, **changes):
        whole = {**recipe, **changes}
        folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        experiment, paths, test = shards(whole, folder)
        ids = [1000 + 7 * number for number in range(len(paths))]
        nodes = {i: Node(node_config(whole, path)) for i, path in zip(ids, paths, strict=True)}
        post = LocalPost(nodes)
        seats = dict(enumerate(ids))
        server = {**whole, "data": {"train": "elsewhere.csv", "test": str(test)}}
        place = Federation(post, "run-1", len(ids), seats=seats, patience=patience, rows=rows, told=told)
        return experiment, parse_config(server), place

    return make
