"""Certificates and keys: what is written, what a server refuses to show, and what nodes refuse to see."""

import datetime
import shutil
import socket
import ssl
import stat
import threading
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from federa.flower import certs
from federa.flower.certs import make_certificates, node_keys, require_certificate
from federa.flower.join import Server
from federa.flower.runtime import GATEWAY, await_port, free_port, start
from federa.flower.serve import Address, _keys, end
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


def test_a_revoked_node_has_no_key_until_it_is_made_another(pki):
    public = pki / "server/nodes/node-0.pub"
    before = public.read_bytes()
    public.unlink()
    assert make_certificates(pki, [], 2) == [0]
    assert sorted(node_keys(pki / "server")) == [1]
    shutil.rmtree(pki / "nodes/node-0")
    assert make_certificates(pki, [], 2) == []
    assert public.read_bytes() != before


def private_key(kind, password=None):
    """Return a key in OpenSSH's format, or in PKCS8 where it has a password."""
    key = ec.generate_private_key(ec.SECP384R1()) if kind == "ec" else ed25519.Ed25519PrivateKey.generate()
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8 if password else serialization.PrivateFormat.OpenSSH
    return key.private_bytes(serialization.Encoding.PEM, form, how)


def junk_ca_key(pki):
    (pki / "ca.key").write_bytes(b"junk")


def other_ca_key(pki):
    key = ec.generate_private_key(ec.SECP256R1())
    (pki / "ca.key").write_bytes(certs._pem(key))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (junk_ca_key, "a CA .* that cannot be read"),
        (lambda pki: (pki / "ca.crt").unlink(), "a CA .* that cannot be read"),
        (other_ca_key, "ca.key is not the key of ca.crt"),
    ],
)
def test_a_ca_that_cannot_be_used_is_a_line(pki, spoil, words):
    spoil(pki)
    with pytest.raises(FederaError, match=words):
        make_certificates(pki, [], 3)
    assert not (pki / "nodes/node-2").exists()


def test_where_nothing_can_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(FederaError, match="cannot be written"):
            make_certificates(tmp_path / folder, [], 1)


def test_a_certificate_for_ever_is_a_line(tmp_path):
    with pytest.raises(FederaError, match="--days 99999999: "):
        make_certificates(tmp_path, [], 1, days=99_999_999)


def test_what_is_no_public_key_is_a_line(pki):
    (pki / "server/nodes/node-4.pub").mkdir()
    with pytest.raises(FederaError, match=r"node-4.pub is no public key"):
        node_keys(pki / "server")


def test_a_servers_key_with_a_password_is_a_line(pki):
    (pki / "server/server.key").write_bytes(private_key("ec", b"word"))
    with pytest.raises(FederaError, match="a certificate or key that cannot be read"):
        require_certificate(pki / "server")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("node.key", b"junk", "is no private key in OpenSSH's format"),
        ("node.key", private_key("ed25519"), "is no key of an elliptic curve"),
        ("node.key", private_key("ec", b"word"), "is no private key in OpenSSH's format"),
        ("node.key", None, "is not there"),
        ("ca.crt", b"junk", "is no certificate"),
        ("ca.crt", None, "is not there"),
    ],
)
def test_a_node_does_not_start_with_files_that_are_something_else(pki, file, content, words):
    folder = pki / "nodes/node-0"
    server = Server("localhost:1", folder / "ca.crt", folder / "node.key")
    assert server.arguments()[:2] == ["--superlink", "localhost:1"]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(FederaError, match=f"^--keys: {folder / file} {words}"):
        server.arguments()


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:abc", "localhost:99999", "localhost:0", ":1", "https://a:1"]
)
def test_what_is_no_address_is_a_line(address):
    with pytest.raises(FederaError, match="SERVER: expected host:port"):
        Server(address).arguments()
    assert Server("[::1]:8000", *2 * [None]).address == "[::1]:8000"


def test_a_gateway_whose_certificate_has_expired_says_so_as_its_nodes_do(at, tmp_path):
    at(tmp_path, *OTHER_DAYS["expired"])
    port, log = free_port(), tmp_path / "gateway.log"
    words = ["--host", "localhost", "--port", str(port), "--upstream", "127.0.0.1:1", "--limit", "1000"]
    gateway = start(GATEWAY, [*words, "--certs", str(tmp_path / "server")], log, tmp_path)
    try:
        await_port(port, gateway, log, host="localhost")
        node = Server(f"localhost:{port}", tmp_path / "ca.crt", tmp_path / "nodes/node-0/node.key")
        assert node.trouble() == "the server's certificate is refused: certificate has expired"
        last = time.monotonic() + 20
        while "certificate expired" not in log.read_text() and time.monotonic() < last:
            time.sleep(0.1)
        assert "refused a caller: no TLS with it" in log.read_text()
    finally:
        end(gateway)


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
