"""A fault drill: a real federation of six nodes, to which everything happens that happens to federations.

    python benchmarks/fault_drill.py --out runs/drill

Twenty rounds of FeDeRA on BBC News, over TLS with keys, while nodes are killed, stopped, cut off and answer
garbage, a SuperNode is killed, and the server is killed twice. Everything is started again as a service
manager
would. Then the same recipe undisturbed, in the simulator. It passes if the run ends, no finished round was
lost or changed, and the final accuracy is within a point; it prints what happened to whom.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from federa.checkpoint import RunDirectory
from federa.config import load_config
from federa.flower.certs import make_certificates
from federa.flower.messages import Train, Trained, pack, unpack
from federa.flower.runtime import free_port
from federa.run import run
from federa.split import split

NODES, ROUNDS, DEADLINE = 6, 20, 40.0
RECIPE = (
    f"rounds={ROUNDS}",
    f"cohort={NODES}",
    f"partition.clients={NODES}",
    "task.max_length=64",
    "client.max_steps=6",
    "client.precision=fp32",
    "engine.name=serial",
    "engine.threads=1",
)


class Wire:
    """A node's way to the server, which can be cut: a forwarder of TCP connections."""

    def __init__(self, to: int) -> None:
        self.port, self._to, self._cut = free_port(), to, False
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def cut(self, cut: bool) -> None:
        """Cut the wire, or mend it."""
        self._cut = cut
        if cut:
            self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._open])

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", self.port))
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the server is down
            writer.transport.abort()
            return
        self._open |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))
        self._open -= {writer, up_writer}

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()
        except OSError:
            pass
        writer.close()


def spoilt(kind: str, header: bytes, tensors: bytes) -> tuple[bytes, bytes]:
    """Return garbage of a kind in the place of an honest answer."""
    said, delta = unpack(header, tensors, Trained, Train)
    if kind == "bytes":
        return os.urandom(200), os.urandom(5000)
    if kind == "nan":
        return pack(said, {name: t * float("nan") for name, t in delta.items()})
    if kind == "shape":
        return pack(said, {name: t.flatten()[:1] for name, t in delta.items()})
    if kind == "huge":
        return pack(said, {name: 1e6 * t for name, t in delta.items()})
    return pack(said.model_copy(update={"round": said.round - 1}), delta)  # an update of the round before


def evil_node(words: list[str]) -> None:
    """Be `federa join`, but answer as a file says."""
    from federa.cli import main
    from federa.flower.node import Node

    how, honest = Path(words[0]), Node.answer

    def answer(self: Node, header: bytes, tensors: bytes) -> tuple[bytes, bytes]:
        found = honest(self, header, tensors)
        kind = how.read_text() if how.exists() else ""
        return spoilt(kind, *found) if kind and b'"kind":"trained"' in found[0] else found

    Node.answer = answer
    sys.argv = ["federa", *words[1:]]
    main()


class Drill:
    """The programs of a federation, and what is done to them."""

    def __init__(self, out: Path) -> None:
        self.out, self.began = out, time.monotonic()
        self.folder = RunDirectory(out / "run")
        self.port = free_port()
        self.wires = [Wire(self.port) for _ in range(NODES)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {line}", flush=True)

    def start(self, name: str) -> None:
        with (self.out / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.server() if name == "server" else self.node(int(name[-1])),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
            )

    def server(self) -> list[str]:
        words = ["serve", self.out / "shards" / "recipe.yaml", "--certs", self.out / "pki" / "server"]
        words += ["--host", "localhost", "--port", self.port, "--out", self.folder.path]
        words += ["--deadline", DEADLINE, "--ask-again", 10, "--resume"]
        return [sys.executable, "-m", "federa.cli", *map(str, words)]

    def node(self, number: int) -> list[str]:
        shards = self.out / "shards"
        words = ["join", f"localhost:{self.wires[number].port}", shards / "recipe.yaml"]
        words += [f"data.train={shards}/client-{number}.parquet"]
        words += ["--keys", self.out / "pki" / "nodes" / f"node-{number}"]
        return [sys.executable, __file__, "--node", str(self.out / f"spoil-{number}"), *map(str, words)]

    def kill(self, name: str, back_in: float) -> None:
        self.say(f"{name} is killed, and started again in {back_in:g} s")
        self.processes[name].kill()
        self.processes[name].wait()
        time.sleep(back_in)
        self.start(name)

    def stop(self, name: str, seconds: float) -> None:
        self.say(f"{name} is stopped for {seconds:g} s")
        self.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.processes[name].send_signal(signal.SIGCONT)

    def cut(self, number: int, seconds: float) -> None:
        self.say(f"node-{number} is cut off for {seconds:g} s")
        self.wires[number].cut(True)
        time.sleep(seconds)
        self.wires[number].cut(False)

    def spoil(self, number: int, kind: str) -> None:
        self.say(
            f"node-{number} answers garbage ({kind}) from now on"
            if kind
            else f"node-{number} is honest again"
        )
        (self.out / f"spoil-{number}").write_text(kind)

    def kill_supernode(self, number: int) -> None:
        self.say(f"the SuperNode of node-{number} is killed")
        subprocess.run(["pkill", "-9", "-P", str(self.processes[f"node-{number}"].pid)], check=False)

    def finished(self) -> list[Any]:
        """Return the finished rounds: a line comes before the checkpoint that finishes its round."""
        if not self.folder.state.is_file():
            return []
        return self.folder.records()[: self.folder.load_checkpoint().round]

    def events(self) -> dict[int, Callable[[], None]]:
        """What happens when so many rounds are finished."""
        return {
            2: lambda: self.kill("node-1", 5),
            4: lambda: self.stop("node-2", 1.5 * DEADLINE),
            6: lambda: self.kill("server", 3),
            8: lambda: self.cut(3, 30),
            9: lambda: self.spoil(4, "nan"),
            10: lambda: self.spoil(4, "bytes"),
            11: lambda: self.spoil(4, "shape"),
            12: lambda: self.spoil(4, "huge"),
            13: lambda: self.spoil(4, "old"),
            14: lambda: (self.spoil(4, ""), self.kill_supernode(5)),
            15: lambda: self.kill("server", 10),
            16: lambda: (self.kill("node-0", 0), self.stop("node-1", 10)),
            17: lambda: self.cut(5, DEADLINE),
        }

    def go(self) -> None:
        """Start all, let things happen, and wait for the end."""
        for name in ("server", *(f"node-{number}" for number in range(NODES))):
            self.start(name)
        events, kept = self.events(), []
        while self.processes["server"].poll() is None:
            records = self.finished()
            assert records[: len(kept)] == kept[: len(records)], "a finished round was changed"
            assert len(records) >= len(kept), "a finished round was lost"
            for record in records[len(kept) :]:
                bad = {client: v for client, v in record["verdicts"].items() if v != "ok"}
                self.say(f"round {record['round']}: accuracy {record['accuracy']:.4f} {bad or ''}")
            kept = records
            for number in [n for n in events if n <= len(kept)]:
                events.pop(number)()
            time.sleep(0.3)
        assert self.processes["server"].returncode == 0, (self.out / "server.log").read_text()[-2000:]
        assert not events, f"the run ended before {sorted(events)}"

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()


def main() -> None:
    if sys.argv[1:2] == ["--node"]:
        evil_node(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/drill"))
    out = parser.parse_args().out.resolve()
    torch.set_num_threads(1)
    config = load_config(None, list(RECIPE))
    split(config, out / "shards")
    make_certificates(out / "pki", ["localhost"], NODES)
    drill = Drill(out)
    try:
        drill.go()
    finally:
        drill.end()
    records = drill.folder.records()
    undisturbed = run(config)
    found: dict[str, Any] = {
        "rounds": len(records),
        "accuracy": records[-1]["accuracy"],
        "undisturbed": undisturbed.summary["final"],
        "updates_lost": sum(record["rejected"] for record in records),
        "seconds": round(time.monotonic() - drill.began),
    }
    print(json.dumps(found))
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    assert abs(found["accuracy"] - found["undisturbed"]) <= 0.01, "more than a point apart"
    print("the drill is passed")


if __name__ == "__main__":
    main()
