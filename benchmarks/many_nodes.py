"""Hundreds of nodes at one server: real messages of FeDeRA's size over TLS with keys, no training.

    python benchmarks/many_nodes.py --out runs/many [--nodes 200] [--rounds 5]

The server is `federa serve` with Flower's SuperLink, as it is; this process is all of the nodes. Each has a
key and speaks through Flower's own connection of a SuperNode, looks for messages every three seconds, and
answers a job with an update that it did not train. Prints each round's seconds, and how much memory the
server's processes took in it at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives import serialization
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response

from federa.config import load_config
from federa.flower.certs import make_certificates
from federa.flower.messages import Hello, Here, Train, Trained, pack, unpack
from federa.flower.records import Message
from federa.flower.records import pack as as_records
from federa.flower.records import unpack as from_records
from federa.flower.runtime import free_port
from federa.split import split

POLL = 3.0  # a SuperNode's own
RECIPE = ("cohort={nodes}", "partition.clients={nodes}", "rounds={rounds}", "evaluate_every=0", "seed=0")


class Identity(threading.Thread):
    """One node: its key, its connection, and its answers."""

    def __init__(self, number: int, address: str, keys: Path, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.number, self.address, self.keys, self.over = number, address, keys, over
        self.answered = 0

    def run(self) -> None:
        """Look for messages, and answer them, until all is over."""
        key: Any = serialization.load_ssh_private_key((self.keys / "node.key").read_bytes(), None)
        certificate = (self.keys / "ca.crt").read_bytes()
        with http_request_response(self.address, False, certificate, (key, key.public_key())) as connection:
            _, receive, send, _, _, pull, push, confirm = connection
            while not self.over.is_set():
                found = receive()
                if found is None:
                    self.over.wait(POLL)
                    continue
                message, tree = found
                run = message.metadata.run_id
                ids = [one.object_id for one in iterate_object_tree(tree)]
                contents = pull_objects(ids, lambda one, run=run: pull(run, one))
                confirm(run, message.metadata.message_id)
                asked = inflate_object_from_contents(tree.object_id, contents)
                reply = Message(as_records(*answer(self.number, *from_records(asked))), reply_to=message)
                reply.metadata.__dict__["_message_id"] = reply.object_id
                wanted, session = send(reply, get_object_tree(reply), 0.0)
                push_objects(
                    get_all_nested_objects(reply),
                    lambda one, content, run=run, session=session: push(run, session, one, content),
                    object_ids_to_push=wanted,
                )
                self.answered += 1


def answer(number: int, header: bytes, tensors: bytes) -> tuple[bytes, bytes]:
    """Return a node's answer: it is here, or an update of small random numbers."""
    said, state = unpack(header, tensors, Hello, Train)
    if isinstance(said, Hello):
        return pack(Here(client=number, rows=100))
    source = torch.Generator().manual_seed(said.seed % 2**31)
    delta = {name: 1e-4 * torch.randn(t.shape, generator=source) for name, t in state.items()}
    metrics = {"loss": 1.0, "steps": 1.0, "examples": 100.0, "seconds_train": 0.0}
    same = {"run": said.run, "round": said.round, "client": said.client, "seed": said.seed}
    return pack(Trained(**same, weight=100.0, metrics=metrics), delta)


def memory(root: int) -> dict[str, float]:
    """Return the resident megabytes of a process and its children, by what they are."""
    found = {"server": _megabytes(root)}
    children = subprocess.run(["pgrep", "-P", str(root)], capture_output=True, text=True, check=False)
    for child in map(int, children.stdout.split()):
        with suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().replace("\0", " ")
            name = "gateway" if "federa.flower.gateway" in words else "superlink"
            found[name] = found.get(name, 0.0) + _megabytes(child)
    return found


def _megabytes(process: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/many"))
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    pki, port, run = options.out / "pki", free_port(), options.out / "run"
    make_certificates(pki, ["localhost"], options.nodes)
    recipe = [word.format(nodes=options.nodes, rounds=options.rounds) for word in RECIPE]
    split(
        load_config(None, ["partition.clients=2", "cohort=2"]), options.out / "data"
    )  # a test set, a recipe
    words = [
        "serve",
        str(options.out / "data" / "recipe.yaml"),
        *recipe,
        "--certs",
        str(pki / "server"),
        "--host",
        "localhost",
        "--port",
        str(port),
    ]
    command = [sys.executable, "-m", "federa.cli", *words, "--out", str(run), "--ask-again", "600"]
    with (options.out / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while b"listening" not in (options.out / "server.log").read_bytes():
        if server.poll() is not None:
            raise SystemExit((options.out / "server.log").read_text())
        time.sleep(0.5)
    over = threading.Event()
    nodes = [
        Identity(number, f"localhost:{port}", pki / "nodes" / f"node-{number}", over)
        for number in range(options.nodes)
    ]
    for node in nodes:
        node.start()
    print("round  seconds  updates  MB: server  superlink  gateway", flush=True)
    seen, most = 0, dict.fromkeys(("server", "superlink", "gateway"), 0.0)
    while True:
        ended = server.poll() is not None
        most = {
            name: max(most[name], now) for name, now in memory(server.pid).items() if name in most
        } or most
        file = run / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for record in records[seen:]:
            held = "".join(f"{most[name]:11.0f}" for name in ("server", "superlink", "gateway"))
            print(f"{record['round']:5}{record['seconds_round']:9.1f}{record['clients']:9}{held}", flush=True)
            most = dict.fromkeys(most, 0.0)
        seen = len(records)
        if ended:
            break
        time.sleep(0.5)
    over.set()
    print(f"status {server.returncode}; {sum(node.answered for node in nodes)} messages were answered")


if __name__ == "__main__":
    main()
