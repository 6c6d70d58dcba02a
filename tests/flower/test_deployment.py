"""A real federation on this machine: SuperLink, SuperNodes, TLS and keys, and a server that is killed."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from federa import run
from federa.checkpoint import RunDirectory
from federa.config import load_config, parse_config
from federa.flower.certs import make_certificates
from federa.flower.runtime import free_port
from federa.split import split
from running import federa, same, steady

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NODES = 3
REASONS = {  # what a node that is turned away says, and what the server says
    "unknown-key": ("the server does not know this node", "it has no key of a node of this federation"),
    "other-ca": ("the server's certificate is refused", "no TLS with it (tlsv1 alert unknown ca)"),
}


def hear_interrupts():
    """A shell starts what runs in the background deaf to Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Started:
    """Programs of a test, each with its output in a file; all ended with it."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}

    def start(self, name, *words):
        path = self.folder / f"{name}.log"
        with path.open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "federa.cli", *map(str, words)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                cwd=self.folder,
                preexec_fn=hear_interrupts,
            )
        return self.processes[name]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def logs(self):
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def until(self, true, seconds=300):
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                pytest.fail(f"not in {seconds} s\n{self.logs()}")
            time.sleep(0.2)

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture()
def programs(tmp_path):
    started = Started(tmp_path)
    yield started
    started.end()


@pytest.fixture()
def parted(recipe, tmp_path):
    """Clients' tables and the recipe of server and nodes, with the simulator's run of the whole."""
    torch.set_num_threads(1)
    recipe |= {"rounds": 4, "cohort": 2, "partition": {"name": "dirichlet", "clients": NODES, "alpha": 0.5}}
    config = parse_config(recipe)
    split(config, tmp_path / "shards")
    return tmp_path / "shards", run(config)


def post(port, path, ca, body=b"x"):
    """Return the status of a request that comes from outside."""
    request = urllib.request.Request(f"https://localhost:{port}{path}", data=body)
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=ca)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_federation_with_keys_gives_the_simulators_state_though_its_server_is_killed(
    programs, parted, tmp_path
):
    shards, expected = parted
    pki, out, port = tmp_path / "pki", tmp_path / "out", free_port()
    make_certificates(pki, ["localhost"], NODES)
    make_certificates(tmp_path / "other", ["localhost"], 1)  # another federation's
    stranger = tmp_path / "stranger"  # the right CA, a key that nobody registered
    shutil.copytree(tmp_path / "other" / "nodes" / "node-0", stranger)
    shutil.copy(pki / "ca.crt", stranger / "ca.crt")
    keys = {f"node-{number}": pki / "nodes" / f"node-{number}" for number in range(NODES)}
    keys |= {"unknown-key": stranger, "other-ca": tmp_path / "other" / "nodes" / "node-0"}
    serve = (
        "serve",
        shards / "recipe.yaml",
        "--certs",
        pki / "server",
        "--host",
        "localhost",
        "--port",
        port,
    )
    serve = (*serve, "--out", out, "--wait", 300, "--ask-again", 8)
    programs.start("server", *serve)
    for name, folder in keys.items():
        table = shards / f"client-{name[-1] if name in list(keys)[:NODES] else 0}.parquet"
        words = ("join", f"localhost:{port}", shards / "recipe.yaml", f"data.train={table}", "--keys", folder)
        programs.start(name, *words)

    def rounds():
        return len(RunDirectory(out).records())

    programs.until(lambda: "listening" in programs.log("server"))
    ca = pki / "ca.crt"
    for path in (
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/docs",
        "/v1/fleet/../control/list-runs",
    ):
        assert post(port, path, ca) == 404, "of a SuperLink the nodes' interface alone is to be seen"
    assert post(port, "/v1/fleet/pull-messages", ca) in (400, 401, 415, 422)
    with pytest.raises((ssl.SSLError, urllib.error.URLError), match="CERTIFICATE_VERIFY_FAILED"):
        post(port, "/v1/fleet/pull-messages", tmp_path / "other" / "ca.crt")

    programs.until(lambda: rounds() >= 1)
    programs.processes["server"].send_signal(signal.SIGKILL)
    programs.processes["server"].wait()
    assert rounds() < 4, "killed too late to show anything"
    shutil.copytree(out, tmp_path / "cut")
    again = programs.start("server", *serve, "--resume")
    programs.until(lambda: again.poll() is not None)
    assert again.returncode == 0, programs.logs()

    folder = RunDirectory(out)
    assert same(folder.load_checkpoint().params, expected.state.params)
    assert steady(folder.records()) == steady(expected.records)
    assert json.loads((out / "result.json").read_text())["final"] == expected.summary["final"]
    for name in ("unknown-key", "other-ca"):
        assert "round" not in programs.log(name), "it took part"
        assert REASONS[name][0] in programs.log(name)
        assert REASONS[name][1] in programs.log("server")
    assert load_config(out / "config.yaml").wire.name == "fp32"
    on_the_cut = [tmp_path / "cut" if word == out else word for word in serve]
    kill_its_superlink(programs, turn_away_a_revoked_node(programs, on_the_cut, pki))
    left = subprocess.run(["pgrep", "-fc", str(tmp_path)], capture_output=True, text=True, check=False)
    assert int(left.stdout) >= NODES, "the nodes go on"
    homes = set(Path(tempfile.gettempdir()).glob("federa-node-*"))
    for number, process in enumerate(programs.processes.values()):
        process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
    programs.until(lambda: all(process.poll() is not None for process in programs.processes.values()), 30)
    assert len(homes - set(Path(tempfile.gettempdir()).glob("federa-node-*"))) >= NODES, (
        "nodes left folders behind"
    )


def turn_away_a_revoked_node(programs, serve, pki):
    """Go on with a run after a node's key was taken out: the server does not know it, and both say so.

    Returns the server, which waits for the nodes that are left: they stand still.
    """
    for stranger in ("unknown-key", "other-ca"):
        programs.processes[stranger].terminate()
        programs.processes[stranger].wait()
    (pki / "server" / "nodes" / f"node-{NODES - 1}.pub").unlink()
    node, before = f"node-{NODES - 1}", len(programs.log(f"node-{NODES - 1}"))
    for number in range(NODES - 1):
        programs.processes[f"node-{number}"].send_signal(signal.SIGSTOP)
    server = programs.start("server without a node", *serve, "--resume")
    programs.until(lambda: REASONS["unknown-key"][1] in programs.log("server without a node"))
    programs.until(lambda: REASONS["unknown-key"][0] in programs.log(node)[before:])
    return server


def kill_its_superlink(programs, server):
    """Take a server's SuperLink away: it says so, and ends."""
    links = subprocess.run(
        ["pgrep", "-P", str(server.pid), "-f", "superlink"], capture_output=True, text=True, check=True
    )
    os.kill(int(links.stdout.split()[0]), signal.SIGKILL)
    programs.until(lambda: server.poll() is not None, 90)
    assert server.returncode == 1
    log = programs.log("server without a node")
    assert "federa: the SuperLink is gone" in log and "Traceback" not in log
    for number in range(NODES - 1):
        programs.processes[f"node-{number}"].send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("serve", "--out a", "give --certs DIR"),
        ("serve", "--insecure --clients 2 --host 0.0.0.0 --out a", "--insecure is for this machine only"),
        ("serve", "--certs . --out a", "ca.crt is not there"),
        ("serve", "--insecure --out a", "--clients: say how many"),
        ("serve", "--insecure --clients 2 data.test=nowhere.csv --out a", "data.test"),
        ("serve", "--insecure --clients 2 --port 99999 --out a", "--port 99999"),
        ("serve", "--insecure --clients 2 --deadline -5 --out a", "--deadline: -5.0 is no number of seconds"),
        ("serve", "--insecure --clients 2 --wait -1 --out a", "--wait: -1.0 is no number of seconds"),
        ("serve", "--insecure --clients 2 --ask-again nan --out a", "--ask-again: nan is no number"),
        ("app", "", "recipe.yaml: cannot be written"),
        ("certs", "--nodes 2", "recipe.yaml: cannot be written"),
        ("join localhost:abc", "--insecure --client 0", "SERVER: expected host:port"),
        ("join localhost:1", "--insecure --client -4", "--client -4"),
        (
            "join localhost:1",
            "--insecure --client 0 --state recipe.yaml",
            "--state: recipe.yaml is no folder",
        ),
        ("join localhost:1", "--insecure --client 0 device=cuda", "device: cuda is not available"),
        ("join example.org:8000", "--insecure --client 0", "--insecure is for this machine only"),
        ("join localhost:1", "--insecure", "--client: say which client"),
        ("join localhost:1", "--keys nothing", "ca.crt is not there"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, monkeypatch, capsys, command, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    deaf = signal.getsignal(signal.SIGTERM)
    try:
        assert federa(*command.split(), "recipe.yaml", *words.split()) == 2
    finally:
        signal.signal(signal.SIGTERM, deaf)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("federa: ") and expected in line and "listening" not in out
    assert not (tmp_path / "a").exists()
