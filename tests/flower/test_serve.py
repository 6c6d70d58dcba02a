"""What a server tells of those whom its gateway turns away."""

import base64
import datetime
import json
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request

import pytest

from federa.config import parse_config
from federa.flower.certs import make_certificates, node_keys
from federa.flower.gateway import KEY, REFUSED, STAMP
from federa.flower.runtime import Control, free_port, require_free, start
from federa.flower.serve import Address, retold, serve, superlink
from federa.types import FederaError

# ruff: isort: split
from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message


def test_refusals_are_told_once_each(tmp_path):
    log, told = tmp_path / "gateway.log", []
    log.write_text(f"started\n{REFUSED} 1.2.3.4: it has no key\n")
    with retold(log, told.append):
        while not told:
            time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"{REFUSED} 1.2.3.4: it has no key\n{REFUSED} a caller: no TLS with it\n")
    assert told == [f"{REFUSED} 1.2.3.4: it has no key", f"{REFUSED} a caller: no TLS with it"]


def test_a_line_that_is_being_written_is_told_when_it_is_whole(tmp_path):
    log, told = tmp_path / "gateway.log", []
    log.write_text(f"{REFUSED} 1.2.3.4: it has")
    with retold(log, told.append):
        time.sleep(1.2)
        assert told == []
        with log.open("a") as file:
            file.write(" no key\n")
    assert told == [f"{REFUSED} 1.2.3.4: it has no key"]


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = pytest.raises(FederaError, match=f"--port {port}: Address already in use")
        with taken, superlink(Address(port=port), tmp_path):
            pass
    require_free("127.0.0.1", port)
    with pytest.raises(FederaError, match=r"--host 203\.0\.113\.1 --port 80"):
        require_free("203.0.113.1", 80)
    with pytest.raises(FederaError, match=r"--port 99999: .*0-65535"):
        require_free("127.0.0.1", 99999)


def test_programs_of_flower_are_started_silent(tmp_path, monkeypatch):
    """No telemetry, no look for updates, and nothing is installed, whatever the owner's shell says."""
    silent = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    silent |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_HOME": str(tmp_path)}
    for name in silent:
        monkeypatch.setenv(name, "changed")
    program = (sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))")
    start(program, [], tmp_path / "log", tmp_path).wait(timeout=60)
    found = json.loads((tmp_path / "log").read_text())
    assert {name: found[name] for name in silent} == silent


def test_a_gap_among_the_keys_is_a_line_that_says_what_to_do(recipe, tmp_path):
    make_certificates(tmp_path / "certs", [], 3)
    (tmp_path / "certs/server/nodes/node-1.pub").unlink()
    with pytest.raises(FederaError, match=r"none of node-1; .*\(mv node-2.pub node-1.pub\)"):
        serve(parse_config(recipe), tmp_path / "out", Address(certs=tmp_path / "certs" / "server"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_whom_a_real_superlink_and_its_gateway_turn_away(tmp_path):
    """An unknown key, a signature of ten minutes ago, one that was used before, and one for another node."""
    pki, told, port = tmp_path / "pki", [], free_port()
    make_certificates(pki, [], 2)
    make_certificates(tmp_path / "other", [], 1)
    trusted = ssl.create_default_context(cafile=str(pki / "ca.crt"))

    def signed(folder, age=0, claims=None):
        """Return a node's first request, as so many seconds ago."""
        key = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
        public = public_key_to_bytes(key.public_key())
        stamp = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
        signature = base64.b64encode(sign_message(key, stamp.encode())).decode()
        headers = {
            KEY: base64.b64encode(claims or public).decode(),
            STAMP: stamp,
            "flwr-signature": signature,
        }
        body = ActivateNodeRequest(public_key=claims or public, heartbeat_interval=30).SerializeToString()
        headers["content-type"] = "application/protobuf"
        return urllib.request.Request(f"https://localhost:{port}/v1/fleet/activate-node", body, headers)

    def ask(request):
        try:
            with urllib.request.urlopen(request, context=trusted) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    keys, own = node_keys(pki / "server"), pki / "nodes" / "node-0"
    with superlink(Address("localhost", port, pki / "server"), tmp_path, told.append) as link:
        control = Control(link)
        for client, key in keys.items():
            control.register(key, f"node-{client}")
        assert ask(signed(tmp_path / "other" / "nodes" / "node-0")) == 401
        assert ask(signed(own, age=310)) == 401
        assert ask(signed(own, claims=keys[1])) == 401
        first = signed(own)
        assert [ask(first), ask(first)] == [200, 401]
        deadline = time.monotonic() + 10
        while len(told) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
    why = [
        "it has no key of a node",
        "its signature is not that of its key, or too old",
        "what it says was said",
    ]
    assert len(told) == len(why) and all(reason in line for reason, line in zip(why, told, strict=True))


@pytest.mark.parametrize("clients", [1, 3])
def test_the_number_of_clients_is_that_of_the_keys(recipe, tmp_path, clients):
    make_certificates(tmp_path / "certs", [], 2)
    with pytest.raises(FederaError, match=f"--clients {clients}: .* has 2 keys; leave it out"):
        serve(
            parse_config(recipe),
            tmp_path / "out",
            Address(certs=tmp_path / "certs" / "server"),
            clients=clients,
        )
    assert not (tmp_path / "out").exists()
