"""Connections that are tried: to a port, through a proxy, with TLS. Nothing is sent but the handshakes."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass

from .proxies import Proxy

TIMEOUT = 3.0  # seconds for each step; Fed-BioMed itself waits for 2
MAX_REPLY = 4096  # bytes of a proxy's answer


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How far a connection came.

    Attributes:
        obstacle: what stopped it, as "refuses connections"; empty if TLS was agreed on.
        stage: what did not work: "name", "port", "proxy" or "tls"; empty without an obstacle.
        certificate: DER that the server showed; None if it did not come so far.
        http2: whether the server speaks the protocol of gRPC.
    """

    obstacle: str = ""
    stage: str = ""
    certificate: bytes | None = None
    http2: bool = False


class _Stopped(Exception):
    """A connection did not come further. Arguments: stage and obstacle, see `Reached`."""


def reach(
    host: str,
    port: int,
    *,
    proxy: Proxy | None = None,
    timeout: float = TIMEOUT,
    family: int = socket.AF_INET,
) -> Reached:
    """Connect to a server and shake hands, as a node does; any certificate is taken.

    Args:
        host: name or address.
        port: of the server.
        proxy: through which to connect; None connects directly.
        timeout: seconds for each step.
        family: of the server's addresses; Fed-BioMed's nodes look for IPv4 alone.
    """
    try:
        with _open(proxy, host, port, timeout=timeout, family=family) as channel:
            return _shake_hands(channel, host)
    except _Stopped as stopped:
        stage, obstacle = stopped.args
        return Reached(stage=stage, obstacle=obstacle)


def listening_trouble(host: str, port: int) -> tuple[str, str]:
    """Why a server cannot listen on an address: a word ("taken", "name", "forbidden", "foreign") and a sentence; both
    are empty if it can.

    Args:
        host: name or address of this machine.
        port: to listen on.
    """
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, OverflowError):
        return "name", f"the name {host} is not known on this machine"
    foreign = 0
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # connections that ended a minute ago do not count, as for gRPC
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "taken", f"port {port} of {host} is in use"
            if error.errno == errno.EACCES:
                return "forbidden", f"this user may not listen on port {port}"
            foreign += 1  # for instance the IPv6 address of localhost on a machine without IPv6
    if foreign == len(addresses):
        return "foreign", f"{host} is no address of this machine"
    return "", ""


def _open(proxy: Proxy | None, host: str, port: int, *, timeout: float, family: int) -> socket.socket:
    """A connection to the server, directly or through a proxy's tunnel. Raises: _Stopped."""
    if proxy is None:
        return _connect(host, port, timeout, family)
    try:
        channel = _connect(proxy.host, proxy.port, timeout)
    except _Stopped as stopped:
        raise _Stopped("proxy", stopped.args[1]) from None
    try:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        channel.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("ascii", "replace"))
        reply = b""
        while b"\r\n\r\n" not in reply and len(reply) < MAX_REPLY:
            part = channel.recv(1024)
            if not part:
                raise _Stopped("proxy", "closes the connection")
            reply += part
        words = reply.split(b"\r\n", 1)[0].decode("ascii", "replace").split(maxsplit=2)
        if len(words) < 2 or not words[0].startswith("HTTP/"):
            raise _Stopped("proxy", "is no HTTP proxy")
        if words[1] != "200":
            raise _Stopped("proxy", f"refuses to connect (it answers {' '.join(words[1:])[:60]})")
    except TimeoutError:
        channel.close()
        raise _Stopped("proxy", f"takes the connection and does not answer within {timeout:g} s") from None
    except OSError as error:
        channel.close()
        raise _Stopped("proxy", f"ends the connection ({error.strerror or error})") from None
    except _Stopped:
        channel.close()
        raise
    return channel


def _connect(host: str, port: int, timeout: float, family: int = socket.AF_UNSPEC) -> socket.socket:
    """A connection to the first address that takes one. Raises: _Stopped with the reason at the last address."""
    addresses = _addresses(host, port, family)
    for number, (kind, sort, protocol, _, address) in enumerate(addresses, 1):
        channel = socket.socket(kind, sort, protocol)
        channel.settimeout(timeout)
        try:
            channel.connect(address)
            return channel
        except OSError as error:
            channel.close()
            if number == len(addresses):
                raise _Stopped("port", _reason(error, timeout)) from None
    raise _Stopped("name", "has no address")


def _addresses(host: str, port: int, family: int) -> list:
    """What the resolver finds, never empty. Raises: _Stopped."""
    try:
        return socket.getaddrinfo(host.strip("[]"), port, family, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        if family == socket.AF_INET:
            with suppress(socket.gaierror, UnicodeError):
                socket.getaddrinfo(host.strip("[]"), port, socket.AF_INET6, socket.SOCK_STREAM)
                raise _Stopped("name", "has no IPv4 address, and Fed-BioMed's nodes need one") from None
        raise _Stopped("name", "is a name that this machine does not know") from None


def _reason(error: OSError, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"does not answer within {timeout:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "refuses connections: nothing listens there"
    return f"cannot be reached ({error.strerror or error})"


def _shake_hands(channel: socket.socket, host: str) -> Reached:
    """Raises: _Stopped."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate is looked at afterwards: a node takes whichever is shown, and here every reason is wanted.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(channel, server_hostname=host.strip("[]")) as secure:
            shown = secure.getpeercert(binary_form=True)
            http2 = secure.selected_alpn_protocol() == "h2"
            with suppress(OSError):
                secure.shutdown(socket.SHUT_RDWR)
    except TimeoutError:
        raise _Stopped("tls", "takes the connection and does not answer the TLS handshake") from None
    except ssl.SSLError as error:
        if "EOF" in str(error):
            raise _Stopped("tls", "takes the connection and closes it") from None
        raise _Stopped("tls", f"does not speak TLS ({error.reason or error})") from None
    except OSError:  # reset
        raise _Stopped("tls", "takes the connection and closes it") from None
    return Reached(certificate=shown, http2=http2)
