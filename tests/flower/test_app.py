"""A federation by Flower's own tools: flower-superlink, flower-supernode and flwr run, with the app shipped here."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

from federa import run
from federa.checkpoint import RunDirectory
from federa.config import parse_config
from federa.flower.app_folder import write_app
from federa.flower.runtime import free_port
from federa.split import split
from running import same, steady

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BIN = Path(sys.executable).parent
ROUNDS = 2
NODES = 3  # the last by federa join


class Tools:
    """Flower's tools, each with its output in a file, in a home of their own; all ended with the test."""

    def __init__(self, folder, sockets):
        self.folder, self.sockets, self.processes = folder, sockets, {}
        self.port = free_port()
        self.env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "XDG_RUNTIME_DIR": str(sockets),
            "OMP_NUM_THREADS": "1",
        }
        self.env |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        (folder / "flwr").mkdir()
        link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (folder / "flwr" / "config.toml").write_text(link)

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("wb") as out:
            self.processes[name] = subprocess.Popen(
                [*map(str, words)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.folder,
            )
        return self.processes[name]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self):
        files = [*self.folder.glob("*.log"), *self.sockets.rglob("*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def until(self, true, seconds=300):
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                pytest.fail(f"not in {seconds} s\n{self.logs()}")
            time.sleep(0.1)

    def superlink(self):
        words = ("--insecure", "--host", "127.0.0.1", "--port", self.port)
        self.start("superlink", BIN / "flower-superlink", *words, "--disable-runtime-dependency-installation")
        self.until(self.listens)

    def listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True

    def supernode(self, number, recipe, train):
        config = f'recipe="{recipe}" train="{train}" client={number}'
        words = ("--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", free_port())
        self.start(f"node-{number}", BIN / "flower-supernode", *words, "--node-config", config)

    def join(self, number, recipe, train):
        words = (
            "join",
            f"127.0.0.1:{self.port}",
            recipe,
            f"data.train={train}",
            "--insecure",
            "--client",
            number,
        )
        self.start(f"node-{number}", sys.executable, "-m", "federa.cli", *words)

    def run(self, name, **config):
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        self.start(name, BIN / "flwr", "run", self.folder / "app", "here", "--stream", "--run-config", words)

    def workers(self):
        """Return the log of each client's worker, while its node lives."""
        found = {}
        for path in self.sockets.glob("*/*/worker.log"):
            text = path.read_text()
            found[int(re.search(r"starts with \S*node-(\d)\.yaml", text)[1])] = text
        return found

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture()
def tools(tmp_path):
    sockets = Path(tempfile.mkdtemp(prefix="federa-test-"))  # a socket's path is short
    started = Tools(tmp_path, sockets)
    write_app(tmp_path / "app")
    yield started
    started.end()
    try:
        started.until(lambda: not left(sockets), 10)
    finally:
        shutil.rmtree(sockets)


def left(folder):
    """Return the processes that a folder's name is in the command line of."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.fixture()
def parted(recipe, tmp_path):
    """The server's recipe, each node's own, their tables, and what the simulator makes of the whole."""
    torch.set_num_threads(1)
    recipe |= {"rounds": ROUNDS, "cohort": NODES, "partition": {"name": "iid", "clients": NODES}}
    recipe |= {"wire": {"name": "int8"}}  # what rounding takes away is the client's to keep
    config = parse_config(recipe)
    shards = tmp_path / "shards"
    split(config, shards)
    raw = yaml.safe_load((shards / "recipe.yaml").read_text())
    for number in range(NODES):
        raw["data"] = {"train": "nowhere.parquet"}  # nobody's: the owner's word is in --node-config
        (shards / f"node-{number}.yaml").write_text(yaml.safe_dump(raw))
    return shards, run(config)


def test_flowers_tools_give_the_simulators_state_with_a_worker_a_node_though_one_is_killed(
    tools, parted, tmp_path
):
    shards, expected = parted
    out = tmp_path / "out"
    tools.superlink()
    for number in range(NODES):
        start = tools.join if number == NODES - 1 else tools.supernode
        start(number, shards / f"node-{number}.yaml", shards / f"client-{number}.parquet")

    tools.run("mistake", recipe="recipe.yaml", out=str(out), clients=NODES)
    tools.run("run", recipe=str(shards / "recipe.yaml"), out=str(out), clients=NODES)
    tools.until(lambda: len(RunDirectory(out).records()) >= 1)
    killed = [
        pid for pid in left(tools.sockets) if b"node-0.yaml" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(killed) == 1
    os.kill(killed[0], signal.SIGKILL)
    assert len(RunDirectory(out).records()) < ROUNDS, "killed too late to show anything"
    tools.until(lambda: (out / "result.json").exists())

    folder = RunDirectory(out)
    assert same(folder.load_checkpoint().params, expected.state.params), tools.logs()
    assert steady(folder.records()) == steady(expected.records)
    assert json.loads((out / "result.json").read_text())["final"] == expected.summary["final"]
    workers = tools.workers()
    assert {number: text.count("starts with") for number, text in workers.items()} == {0: 2, 1: 1}
    assert workers[1].count("joined run") == 1 and workers[1].count("round ") == ROUNDS

    tools.until(lambda: tools.processes["run"].poll() is not None, 30)
    assert "run directory" in tools.log("run")
    shown = tools.log("mistake").partition("raised an exception")[2]
    assert "FederaError: recipe: give a whole path" in shown and "File " not in shown
    tools.processes["node-0"].terminate()
    tools.processes["node-1"].kill()
    for name in ("node-0", "node-1"):
        tools.processes[name].wait()
    tools.until(lambda: not left(tools.sockets), 15)
    assert not list(tools.sockets.glob("*/*"))
