"""Servers, proxies, certificates and components for the tests of connections: real sockets and real TLS on loopback."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

DAY = timedelta(days=1)


def make_certificate(
    folder: Path,
    common_name: str = "localhost",
    *,
    begins: timedelta = -DAY,
    ends: timedelta = 365 * DAY,
    names: tuple[str, ...] = (),
    issuer: str | None = None,
) -> tuple[Path, Path]:
    """A certificate and its key as Fed-BioMed makes them (an address is also an alternative name); both paths."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "RESEARCHER_test")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name), organisation])
    signer = subject if issuer is None else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)])
    alternative = [*names]
    with suppress(ValueError):
        ipaddress.ip_address(common_name)
        alternative.append(common_name)
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(signer).public_key(key.public_key())
        .serial_number(7).not_valid_before(now + begins).not_valid_after(now + ends)
    )  # fmt: skip
    if alternative:
        made = made.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in alternative]), False)
    folder.mkdir(parents=True, exist_ok=True)
    certificate, private = folder / "server_certificate.pem", folder / "server_certificate.key"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    return certificate, private


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@contextmanager
def listening(answer: Callable[[socket.socket], None], address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[int]:
    """A server on this machine that calls `answer` with every connection, each in a thread; its port."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.create_server(address, family=family) as server:
        opened: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    channel, _ = server.accept()
                except OSError:
                    return
                opened.append(channel)
                threading.Thread(target=guarded, args=(channel,), daemon=True).start()

        def guarded(channel: socket.socket) -> None:
            with suppress(OSError):
                answer(channel)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            for channel in opened:
                channel.close()


def tls(certificate: Path, key: Path, *, protocol: str = "h2") -> Callable[[socket.socket], None]:
    """An answer to `listening`: a TLS handshake like that of a gRPC server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([protocol])

    def answer(channel: socket.socket) -> None:
        with context.wrap_socket(channel, server_side=True) as secure:
            secure.recv(1)

    return answer


def swallow(channel: socket.socket) -> None:
    """An answer to `listening`: takes all, says nothing."""
    while channel.recv(1024):
        pass


def close(channel: socket.socket) -> None:
    """An answer to `listening`: ends the connection at once."""
    channel.close()


def say(text: str) -> Callable[[socket.socket], None]:
    """An answer to `listening`: the same text for everybody."""

    def answer(channel: socket.socket) -> None:
        channel.recv(1024)
        channel.sendall(text.encode())
        channel.close()

    return answer


def tunnel(port: int | None = None) -> Callable[[socket.socket], None]:
    """An answer to `listening`: an HTTP proxy that connects to where it is asked, or always to one port."""

    def answer(channel: socket.socket) -> None:
        request = channel.recv(4096).decode()
        asked = int(request.split()[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port or asked)) as behind:
            channel.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=copy, args=(behind, channel), daemon=True)
            back.start()
            copy(channel, behind)
            back.join(5)

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    return answer


def closed_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def make_component(root: Path, kind: str, port: int, *, host: str = "localhost", **certificate: object) -> Path:
    """The files of a Fed-BioMed component that connections depend on, as Fed-BioMed 6.4 writes them; its folder."""
    make_certificate(root / "etc" / "certs", **certificate)
    server = f"[server]\nhost = {host}\nport = {port}\nnode_disconnection_timeout = 10\n"
    node = (
        "[security]\nallow_default_training_plans = False\ntraining_plan_approval = True\n\n"
        f"[researcher]\nip = {host}\nport = {port}\n"
    )
    (root / "etc" / "config.ini").write_text(
        f"[default]\nid = {kind}_test\ncomponent = {kind}\nversion = 2.3.0\ndb = ../var/db_{kind}_test.json\n"
        "name = hospital-a\n\n"
        "[certificate]\nprivate_key = certs/server_certificate.key\npublic_key = certs/server_certificate.pem\n\n"
        + (node if kind == "NODE" else server)
    )
    (root / "var").mkdir(exist_ok=True)
    return root


def register(node: Path, rows: list[dict[str, object]], table: str = "Datasets") -> None:
    """Write rows into a node's database as TinyDB does."""
    file = node / "var" / "db_NODE_test.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    content[table] = {str(number): row for number, row in enumerate(rows, 1)}
    file.write_text(json.dumps(content))
