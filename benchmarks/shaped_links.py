"""The clock model beside real nodes on shaped links: each node in a network of its own, behind a slow link.

    sudo python benchmarks/shaped_links.py --out runs/shaped [--rounds 12] [--nodes 4] [KEY=VALUE ...]

Linux, root, and `ip` (iproute2) are needed. Each node runs in its own network namespace; the only way out is
through a pair of TUN devices, between which this program carries the packets: no faster than the link's rate
each way, and each later by its latency. The server, the SuperNodes and TLS are the real ones.

Two federations run, one after the other. The first has links without limits: what a round takes there beyond
its slowest client's training is the time that Flower's polling and the server take. The second has shaped
links. The model (`federa.clock`) is told the links and that time, and must foretell the second's rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from federa.checkpoint import RunDirectory
from federa.clock import Device, replay
from federa.config import load_config
from federa.flower.certs import make_certificates
from federa.flower.runtime import free_port
from federa.split import split

RECIPE = ("task.max_length=64", "client.max_steps=4", "client.precision=fp32", "engine.threads=1")
RECIPE = (*RECIPE, "engine.name=serial", "evaluate_every=0")
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
MTU = 1500
TURNS = 5  # Flower's requests one after the other: look, fetch, confirm, announce the answer, hand it in
WITHIN = 0.1  # of what was foretold the rounds must be; else this ends with status 1
QUEUE = 1 << 20  # bytes that wait before a link; more is dropped, and TCP sends it again


@dataclass
class Way:
    """One direction of a link.

    Attributes:
        source: file of the TUN device that packets come from.
        sink: of the one that they go to.
        rate: bytes a second; 0 for no limit.
        delay: seconds.
    """

    source: int
    sink: int
    rate: float
    delay: float
    free: float = 0.0

    def leaves(self, size: int, now: float) -> float | None:
        """Return when a packet of so many bytes comes out at the other end; None if the queue is full."""
        if not self.rate:
            return now + self.delay
        begins = max(now, self.free)
        if (begins - now) * self.rate > QUEUE:
            return None
        self.free = begins + size / self.rate
        return self.free + self.delay


def carry(ways: list[Way], over: threading.Event) -> None:
    """Carry packets until it is over."""
    by_source = {way.source: way for way in ways}
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not over.is_set():
        timeout = min(0.2, max(0.0, waiting[0][0] - time.monotonic())) if waiting else 0.2
        for source in select.select(list(by_source), [], [], timeout)[0]:
            packet, way = os.read(source, 1 << 16), by_source[source]
            due = way.leaves(len(packet), time.monotonic())
            if due is not None:
                count += 1
                heapq.heappush(waiting, (due, count, way.sink, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, sink, packet = heapq.heappop(waiting)
            os.write(sink, packet)


def ip(words: str, *, must: bool = True) -> None:
    subprocess.run(["ip", *words.split()], check=must, capture_output=not must)


def make_tun(name: str, namespace: str | None) -> int:
    """Make a TUN device, in a namespace if one is given, and return its file."""
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    if namespace is not None:
        there = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(there)
    try:
        file = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    finally:
        libc.setns(own, CLONE_NEWNET)
        os.close(own)
    return file


class Networks:
    """A namespace and a link for each node."""

    def __init__(self, nodes: int, device: Device | None) -> None:
        self.names = [f"federa-{number}" for number in range(nodes)]
        self.over, self.files, ways = threading.Event(), [], []
        up, down = (1e6 * device.up / 8, 1e6 * device.down / 8) if device else (0.0, 0.0)
        delay = device.latency / 1e3 if device else 0.0
        self.close(begins=True)
        for number, name in enumerate(self.names):
            ip(f"netns add {name}")
            inner, outer = make_tun("tun0", name), make_tun(name, None)
            ip(f"addr add {self.server(number)} peer {self.node(number)} dev {name}")
            ip(f"link set dev {name} up mtu {MTU}")
            ip(f"-n {name} addr add {self.node(number)} peer {self.server(number)} dev tun0")
            ip(f"-n {name} link set dev tun0 up mtu {MTU}")
            ip(f"-n {name} link set dev lo up")
            self.files += [inner, outer]
            ways += [Way(inner, outer, up, delay), Way(outer, inner, down, delay)]
        self.thread = threading.Thread(target=carry, args=(ways, self.over), daemon=True)
        self.thread.start()

    @staticmethod
    def server(number: int) -> str:
        return f"10.77.{number}.1"

    @staticmethod
    def node(number: int) -> str:
        return f"10.77.{number}.2"

    def close(self, *, begins: bool = False) -> None:
        """Take everything down."""
        if not begins:
            self.over.set()
            self.thread.join()
        for file in self.files:
            os.close(file)
        for name in self.names:
            ip(f"netns del {name}", must=False)


def federation(out: Path, recipe: Path, shards: Path, nodes: int, device: Device | None) -> RunDirectory:
    """Run a federation over links, and return its run directory."""
    out.mkdir(parents=True)
    networks, port = Networks(nodes, device), free_port()
    make_certificates(out / "pki", [networks.server(number) for number in range(nodes)], nodes)
    federa = [sys.executable, "-m", "federa.cli"]
    processes = []

    def start(name: str, words: list[str]) -> subprocess.Popen[bytes]:
        with (out / f"{name}.log").open("wb") as log:
            processes.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
        return processes[-1]

    try:
        words = ["serve", str(recipe), "--certs", str(out / "pki" / "server"), "--host", "0.0.0.0"]
        words += ["--port", str(port), "--out", str(out / "run"), "--ask-again", "600"]
        server = start("server", [*federa, *words])
        for number in range(nodes):
            inside = ["ip", "netns", "exec", networks.names[number]]
            words = ["join", f"{networks.server(number)}:{port}", str(recipe)]
            words += [f"data.train={shards / f'client-{number}.parquet'}"]
            words += ["--keys", str(out / "pki" / "nodes" / f"node-{number}")]
            start(f"node-{number}", [*inside, *federa, *words])
        if server.wait():
            raise SystemExit((out / "server.log").read_text())
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        networks.close()
    return RunDirectory(out / "run")


def seconds(run: RunDirectory) -> list[float]:
    """Return what each round took, without the first (nodes load their models) and the last (evaluated)."""
    return [record["seconds_round"] for record in run.records()][1:-1]


def foretold(run: RunDirectory, device: Device) -> list[float]:
    """Return what the model says that each of these rounds takes."""
    totals = [spent.total for spent in replay(run.path, device).spent]
    return [later - earlier for earlier, later in itertools.pairwise(totals[:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shaped"))
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--up", type=float, default=10.0, help="Mbit/s to the server")
    parser.add_argument("--down", type=float, default=50.0, help="Mbit/s from it")
    parser.add_argument("--latency", type=float, default=40.0, help="ms one way")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    nodes, device = options.nodes, Device(options.up, options.down, options.latency)
    keys = [*RECIPE, f"rounds={options.rounds}", f"cohort={nodes}", f"partition.clients={nodes}"]
    shards = options.out / "shards"
    options.out.mkdir(parents=True)
    split(load_config(None, [*keys, *options.keys]), shards)
    recipe = shards / "recipe.yaml"
    free = federation(options.out / "free", recipe, shards, nodes, None)
    nothing = replace(device, up=1e9, down=1e9, latency=0.0)
    beyond = [took - told for took, told in zip(seconds(free), foretold(free, nothing), strict=True)]
    idle = statistics.median(beyond)
    print(f"without limits: {statistics.median(seconds(free)):.2f} s a round, {idle:.2f} s beyond training")
    shaped = federation(options.out / "shaped", recipe, shards, nodes, device)
    told, took = foretold(shaped, replace(device, idle=idle, turns=TURNS)), seconds(shaped)
    rows = [
        {"round": n, "foretold": a, "took": b} for n, (a, b) in enumerate(zip(told, took, strict=True), 2)
    ]
    for row in rows:
        print(f"round {row['round']:3}: foretold {row['foretold']:6.2f} s, took {row['took']:6.2f} s")
    ratio = sum(took) / sum(told)
    print(f"all: foretold {sum(told):.1f} s, took {sum(took):.1f} s: {ratio:.3f} of what was foretold")
    result = {"idle": idle, "beyond": beyond, "rows": rows, "ratio": ratio}
    (options.out / "shaped_links.json").write_text(json.dumps(result, indent=1) + "\n")
    if abs(ratio - 1) > WITHIN:
        raise SystemExit(f"more than {WITHIN:.0%} from what was foretold")


if __name__ == "__main__":
    main()
