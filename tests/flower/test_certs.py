"""Certificates and keys: what is written, what a server refuses to show, and what nodes refuse to see."""

import datetime
import shutil
import socket
import ssl
import stat
import threading

import pytest

from federa.flower import certs
from federa.flower.certs import make_certificates, node_keys, require_certificate
from federa.flower.join import Server
from federa.flower.serve import Address, _keys
from federa.types import FederaError

OTHER_DAYS = {"expired": (-10, -1), "not yet": (2, 10)}


@pytest.fixture()
def pki(tmp_path):
    make_certificates(tmp_path / "pki", ["fed.example.org", "10.1.2.3"], 2)
    return tmp_path / "pki"


@pytest.fixture()
def at(monkeypatch):
    """Return a function that makes certificates valid from and to days from now."""
    honest = certs._builder

    def make(folder, first, last):
        def builder(name, issuer, days):
            made, now = honest(name, issuer, 1), datetime.datetime.now(datetime.UTC)
            made._not_valid_before = made._not_valid_after = None
            day = datetime.timedelta(days=1)
            return made.not_valid_before(now + first * day).not_valid_after(now + last * day)

        monkeypatch.setattr(certs, "_builder", builder)
        make_certificates(folder, ["localhost"], 1)
        monkeypatch.setattr(certs, "_builder", honest)

    return make


@pytest.fixture()
def shown():
    """Return a function that shows a folder's certificate at a port of this machine."""
    open_ones = []

    def show(server):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server / "server.crt", server / "server.key")
        listener = socket.create_server(("127.0.0.1", 0))
        open_ones.append(listener)

        def greet():
            while True:
                try:
                    raw, _ = listener.accept()
                    context.wrap_socket(raw, server_side=True).close()
                except ssl.SSLError:
                    raw.close()
                except OSError:
                    return

        threading.Thread(target=greet, daemon=True).start()
        return f"localhost:{listener.getsockname()[1]}"

    yield show
    for listener in open_ones:
        listener.close()


def test_what_is_private_is_for_its_owner_alone(pki):
    secret = {path.relative_to(pki).as_posix() for path in pki.rglob("*") if path.suffix == ".key"}
    assert secret == {"ca.key", "server/server.key", "nodes/node-0/node.key", "nodes/node-1/node.key"}
    assert all(stat.S_IMODE((pki / name).stat().st_mode) == 0o600 for name in secret)


def test_nodes_keep_their_keys_when_there_are_more(pki):
    before = (pki / "nodes/node-1/node.key").read_bytes()
    make_certificates(pki, [], 3)
    assert (pki / "nodes/node-1/node.key").read_bytes() == before
    assert sorted(node_keys(pki / "server")) == [0, 1, 2]
    require_certificate(pki / "server")


def test_a_revoked_node_has_no_key(pki):
    (pki / "server/nodes/node-0.pub").unlink()
    assert sorted(node_keys(pki / "server")) == [1]


def test_one_key_for_two_nodes_is_refused(pki):
    shutil.copy(pki / "server/nodes/node-0.pub", pki / "server/nodes/node-1.pub")
    with pytest.raises(FederaError, match="the same key"):
        node_keys(pki / "server")


@pytest.mark.parametrize("when", OTHER_DAYS)
def test_a_server_does_not_start_with_dates_that_do_not_hold(when, at, tmp_path):
    at(tmp_path, *OTHER_DAYS[when])
    expected = {"expired": "server.crt expired on", "not yet": "valid from .* this machine's clock"}
    with pytest.raises(FederaError, match=expected[when]):
        _keys(Address(certs=tmp_path / "server"), None)


def test_a_server_does_not_start_with_another_cas_certificate_or_key(pki, tmp_path):
    make_certificates(tmp_path / "other", [], 1)
    require_certificate(pki / "server")
    for file, words in (("server.key", "not the key of"), ("ca.crt", "not signed by")):
        mixed = tmp_path / file
        shutil.copytree(pki / "server", mixed)
        shutil.copy(tmp_path / "other" / "server" / file, mixed / file)
        with pytest.raises(FederaError, match=words):
            require_certificate(mixed)


def test_a_torn_certificate_is_one_line(pki):
    path = pki / "server" / "server.crt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FederaError, match="cannot be read"):
        require_certificate(pki / "server")


def test_a_node_says_why_it_does_not_trust_a_server(pki, at, shown, tmp_path):
    key = pki / "nodes/node-0/node.key"
    here = shown(pki / "server")
    assert Server(here, pki / "ca.crt", key).trouble() is None
    at(tmp_path / "old", *OTHER_DAYS["expired"])
    make_certificates(tmp_path / "other", [], 1)
    expired = Server(shown(tmp_path / "old" / "server"), tmp_path / "old" / "ca.crt", key).trouble()
    assert expired == "the server's certificate is refused: certificate has expired"
    stranger = Server(here, tmp_path / "other" / "ca.crt", key).trouble()
    assert stranger.startswith("the server's certificate is refused: ")
    assert "expired" not in stranger


def test_a_node_says_that_nobody_is_there():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert "no connection to localhost" in Server(f"localhost:{port}").trouble()
