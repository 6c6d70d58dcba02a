"""What a server tells of those whom its gateway turns away."""

import socket
import time

import pytest

from federa.config import parse_config
from federa.flower.certs import make_certificates
from federa.flower.gateway import REFUSED
from federa.flower.runtime import require_free
from federa.flower.serve import Address, retold, serve, superlink
from federa.types import FederaError


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
