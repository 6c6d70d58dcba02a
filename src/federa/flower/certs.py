"""A first federation's certificates and keys: a CA of its own, a server's certificate, a key for every node.

    DIR/ca.crt               everyone has it
    DIR/ca.key               kept apart; makes more certificates
    DIR/server/              server.crt, server.key, and nodes/*.pub: the nodes that may join
    DIR/nodes/node-0/        what the owner of client 0 is given: ca.crt, node.key, node.pub

The number in a key's name is the client's. A node is revoked by deleting its key from `server/nodes`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from federa.errors import FederaError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID
except ImportError as error:
    raise FederaError(f'certificates need the extra: pip install "federa[flower]" ({error})') from error

DAYS = 365
_PUBLIC = re.compile(r"node-(\d+)\.pub")


def make_certificates(folder: Path, hosts: Sequence[str], nodes: int, days: int = DAYS) -> list[int]:
    """Write what a federation needs; nodes that are there already keep their keys.

    A node whose public key was taken from the server's folder stays out: to give its number to a new key,
    delete its own folder as well.

    Args:
        folder: where to; a CA that is there already is used.
        hosts: names and addresses that nodes call the server by; this machine's own are added.
        nodes: how many there are, numbered from 0.
        days: for which the server's certificate is valid.

    Returns:
        The nodes that stay out.

    Raises:
        FederaError: a host that is no name or address, too many days, a CA that cannot be used, or a folder
            that cannot be written.
    """
    known = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    names = [_general_name(host) for host in known]
    try:
        return _make(folder, known, names, nodes, days)
    except OSError as error:
        raise FederaError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _make(
    folder: Path, hosts: Sequence[str], names: Sequence[x509.GeneralName], nodes: int, days: int
) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, ca = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(hosts[0], ca.subject, days)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    server = folder / "server"
    _write(server / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _write(server / "server.key", _pem(key), secret=True)
    shutil.copyfile(folder / "ca.crt", server / "ca.crt")
    (server / "nodes").mkdir(exist_ok=True)
    out = []
    for number in range(nodes):
        own, public = folder / "nodes" / f"node-{number}", server / "nodes" / f"node-{number}.pub"
        if not (own / "node.key").is_file():
            _node_key(own)
            shutil.copyfile(own / "node.pub", public)
        elif not public.exists():
            out.append(number)
        shutil.copyfile(folder / "ca.crt", own / "ca.crt")
    return out


def require_certificate(server: Path) -> None:
    """Raise unless nodes will take the certificate in a server's folder.

    Raises:
        FederaError: a file that is missing or is no certificate, dates that do not hold now, another CA's
            certificate, or another certificate's key.
    """
    for file in ("ca.crt", "server.crt", "server.key"):
        if not (server / file).is_file():
            raise FederaError(f"--certs: {server / file} is not there; make it with: federa certs")
    path = server / "server.crt"
    try:
        own = x509.load_pem_x509_certificate(path.read_bytes())
        ca = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((server / "server.key").read_bytes(), None)
    except (ValueError, TypeError, OSError) as error:  # TypeError: the key has a password
        raise FederaError(f"{server}: a certificate or key that cannot be read ({error})") from error
    now = datetime.datetime.now(datetime.UTC)
    for name, one in (("server.crt", own), ("ca.crt", ca)):
        if now > one.not_valid_after_utc:
            day = f"{one.not_valid_after_utc:%Y-%m-%d}"
            raise FederaError(f"{server / name} expired on {day}; make another with: federa certs")
        if now < one.not_valid_before_utc:
            day = f"{one.not_valid_before_utc:%Y-%m-%d %H:%M}"
            raise FederaError(f"{server / name} is valid from {day} UTC only; is this machine's clock right?")
    try:
        own.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FederaError(f"{path} is not signed by {server / 'ca.crt'}") from error
    if own.public_key() != key.public_key():
        raise FederaError(f"{server / 'server.key'} is not the key of {path}")


def node_keys(server: Path) -> dict[int, bytes]:
    """Return the public key of every client that may join, by its number.

    Raises:
        FederaError: a file that is no key, no key at all, or one key twice.
    """
    found: dict[int, bytes] = {}
    for path in sorted((server / "nodes").glob("*.pub")):
        named = _PUBLIC.fullmatch(path.name)
        if named is None:
            raise FederaError(f"{path}: expected a name like node-0.pub; the number is the client's")
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, OSError, UnsupportedAlgorithm) as error:
            raise FederaError(f"{path} is no public key in OpenSSH's format") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise FederaError(f"{path} is no key of an elliptic curve")
        found[int(named[1])] = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    if not found:
        raise FederaError(f"{server / 'nodes'} has no key of a node; make them with: federa certs")
    if len(set(found.values())) < len(found):
        raise FederaError(f"{server / 'nodes'}: two nodes have the same key")
    return found


def require_node(ca: Path, key: Path) -> None:
    """Raise unless a SuperNode can use a node's files.

    Raises:
        FederaError: one that is not there, or is something else.
    """
    for path in (ca, key):
        if not path.is_file():
            raise FederaError(f"--keys: {path} is not there; the server's owner has it")
    try:
        x509.load_pem_x509_certificates(ca.read_bytes())
    except (ValueError, OSError) as error:
        raise FederaError(f"--keys: {ca} is no certificate ({error})") from error
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise FederaError(f"--keys: {key} is no private key in OpenSSH's format ({error})") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise FederaError(
            f"--keys: {key} is no key of an elliptic curve; make one: ssh-keygen -t ecdsa -b 384"
        )


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return the CA of a folder; make one if there is none."""
    if (folder / "ca.key").exists():
        try:
            own = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (ValueError, TypeError, OSError, UnsupportedAlgorithm) as error:
            raise FederaError(f"{folder}: a CA (ca.key, ca.crt) that cannot be read ({error})") from error
        if not isinstance(own, ec.EllipticCurvePrivateKey) or own.public_key() != ca.public_key():
            raise FederaError(f"{folder}: ca.key is not the key of ca.crt, or not of an elliptic curve")
        return own, ca
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "federa CA")])
    certificate = (
        _builder("federa CA", subject, 10 * DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _pem(key), secret=True)
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def _usage() -> x509.KeyUsage:
    signs = ("key_cert_sign", "crl_sign", "digital_signature")
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("encipher_only", "decipher_only")
    return x509.KeyUsage(**dict.fromkeys(signs, True), **dict.fromkeys((*others, *more), False))


def _builder(name: str, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    try:
        until = now + datetime.timedelta(days=days)
    except OverflowError as error:
        raise FederaError(f"--days {days}: a certificate cannot be valid for so long") from error
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(until)
    )


def _node_key(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / "node.key", private, secret=True)
    _write(folder / "node.pub", public + b"\n")


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if re.fullmatch(r"[A-Za-z0-9*]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
            return x509.DNSName(host)
        raise FederaError(f"--host {host}: neither a name nor an address") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o600 if secret else 0o644
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
