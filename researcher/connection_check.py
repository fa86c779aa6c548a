"""What the study lead can check of a researcher: why nodes do not find it, as far as its own machine shows."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..node.connection.certificates import Certificate, check_files
from ..node.connection.check import PROBLEM, WARNING, Check, unhealthy
from ..node.connection.component import CONFIG, NODE, RESEARCHER, Component, read_component
from ..node.connection.machine import check_clock, check_disk, check_versions
from ..node.connection.probes import TIMEOUT, listening_trouble, reach
from ..node.connection.proxies import describe_no_proxy, is_loopback, proxy_for
from ..node.connection.running_nodes import RunningNode, running_nodes
from ..node.connection.way import check_way, proxy_trouble

if TYPE_CHECKING:
    from fedbiomed.researcher.requests import Requests

EVERYWHERE = ("0.0.0.0", "::", "[::]")  # a server that listens on all addresses of its machine


def check_researcher(root: str | Path, *, timeout: float = TIMEOUT) -> list[Check]:
    """Look at a researcher: certificate, port, proxies, nodes of this machine, versions, disk, clock.

    Args:
        root: folder of the researcher.
        timeout: seconds for each step of a connection.

    Returns: the checks, in the order in which they are shown.
    Raises: UsageError if there is no researcher, or if its configuration cannot be used.
    """
    researcher = read_component(root, RESEARCHER)
    return [
        *_check_connection(researcher, timeout=timeout),
        check_versions(),
        check_disk([researcher.root]),
        check_clock([researcher.config, researcher.certificate, researcher.database]),
    ]


def why_nodes_are_missing(root: str | Path, *, timeout: float = TIMEOUT) -> str:
    """What this machine shows of the reasons why nodes do not connect to a researcher, one line.

    Args:
        root: folder of the researcher; its server may run.
        timeout: seconds for each step of a connection.

    Raises: UsageError as `check_researcher`.
    """
    checks = _check_connection(read_component(root, RESEARCHER), timeout=timeout)
    # A key that others may read stops no node, and it is named by `fedfactory check`.
    troubles = [
        f"{check.name}: {check.line}"
        for check in unhealthy(checks)
        if check.name != "private key" or check.state == PROBLEM
    ]
    return "; ".join(troubles) or "certificate, port and proxies of this machine are in order"


def missing_nodes(requests: Requests, count: int, tag: str, root: str | Path) -> str:
    """Why too few nodes offer data, and what to do, one line: data that are not registered, or the connection.

    Args:
        requests: of the researcher, whose server runs.
        count: number of nodes that are wanted.
        tag: tag of the wanted data.
        root: folder of the researcher.
    """
    connected = len(requests.ping_nodes())
    if connected >= count:
        tags = sorted({str(word) for data in requests.list().values() for row in data for word in row["tags"]})
        known = f"; registered are {', '.join(map(repr, tags))}" if tags else ""
        return (
            f"{connected} are connected, so register data at the sites (`fedfactory site add NODE_DIR --store STORE "
            f"--tag {tag}`){known}"
        )
    return (
        f"{connected} are connected: start the nodes (`fedbiomed node -p NODE_DIR start`); `fedfactory site check "
        f"NODE_DIR` says what keeps a node away. Seen from here: {why_nodes_are_missing(root)}"
    )


def server_problem(root: str | Path, *, timeout: float = TIMEOUT) -> str:
    """Why a researcher's server cannot serve nodes: certificate, key or port; one line, empty if it can.

    Fed-BioMed says of each of these that the port cannot be bound.

    Args:
        root: folder of the researcher.
        timeout: seconds for each step of a connection.

    Raises: UsageError as `check_researcher`.
    """
    researcher = read_component(root, RESEARCHER)
    checks, certificate = check_files(researcher.certificate, researcher.key)
    checks.append(_check_port(researcher, certificate, timeout=timeout))
    return "; ".join(check.line for check in checks if check.state == PROBLEM)


def _check_connection(researcher: Component, *, timeout: float) -> list[Check]:
    checks, certificate = check_files(researcher.certificate, researcher.key)
    checks += _check_names(researcher, certificate)
    checks.append(_check_port(researcher, certificate, timeout=timeout))
    nodes = _nodes_of(researcher)
    return [*checks, _check_proxy(researcher, certificate, timeout=timeout), *_check_nodes(nodes, timeout=timeout)]


def _check_names(researcher: Component, certificate: Certificate | None) -> list[Check]:
    """Whether a node on another machine, or on this one, can find a host name that fits the certificate."""
    if certificate is None:
        return []
    again = (
        "make the researcher again with FBM_SERVER_HOST=NAME, the name that nodes connect to; then set "
        f"`host = {EVERYWHERE[0]}` in its {CONFIG}"
    )
    useful = [name for name in certificate.names if name not in EVERYWHERE and name != "*"]
    if not useful:
        found = f"it is for {', '.join(certificate.names) or 'no host name'}: nodes refuse it under every name"
        return [Check(name="certificate's name", state=PROBLEM, found=found, remedy=again)]
    if all(map(is_loopback, useful)) and not is_loopback(researcher.host):
        found = f"it is for {', '.join(useful)}: nodes of other machines refuse it (`host` is {researcher.host})"
        return [Check(name="certificate's name", state=WARNING, found=found, remedy=again)]
    if is_loopback(researcher.host) and not any(map(is_loopback, useful)):
        found = f"the server listens on {researcher.host}, where nodes of other machines do not reach it"
        return [
            Check(
                name="port",
                state=WARNING,
                found=found,
                remedy=f"set `host = {EVERYWHERE[0]}` below [server] in {researcher.config}",
            )
        ]
    return []


def _check_port(researcher: Component, certificate: Certificate | None, *, timeout: float) -> Check:
    host, port = researcher.host, researcher.port
    setting = f"`host` and `port` below [server] in {researcher.config}"
    kind, trouble = listening_trouble(host, port)
    who = "nodes of this machine alone can connect" if is_loopback(host) else "no firewall was asked"
    if not trouble:
        return Check(name="port", found=f"{host}:{port} is free: the server listens while a command runs ({who})")
    if kind == "taken":
        if _is_own_server(researcher, certificate, timeout=timeout):
            return Check(name="port", found=f"this researcher's server listens on {host}:{port} ({who})")
        return Check(
            name="port",
            state=PROBLEM,
            found=f"another program listens on {host}:{port}",
            remedy=f"end it, or choose another port below [server] in {researcher.config} and at every node",
        )
    remedy = f"correct {setting}" + (f": {EVERYWHERE[0]} is every address" if kind == "foreign" else "")
    if kind == "forbidden":
        remedy = f"choose a port from 1024 up: {setting}, and at every node"
    return Check(name="port", state=PROBLEM, found=trouble, remedy=remedy)


def _is_own_server(researcher: Component, certificate: Certificate | None, *, timeout: float) -> bool:
    """Whether all that listens on the port, at any address of the host, shows this researcher's certificate."""
    host = "localhost" if researcher.host in EVERYWHERE else researcher.host.strip("[]")
    addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, researcher.port, type=socket.SOCK_STREAM)}
    # One that is free counts for nothing: gRPC listens where it can.
    taken = [address for address in addresses if listening_trouble(address, researcher.port)[0] == "taken"]
    shown = [reach(address, researcher.port, timeout=timeout, family=socket.AF_UNSPEC).certificate for address in taken]
    own = None if certificate is None else certificate.fingerprint
    return bool(shown) and all(data is not None and Certificate.read(data).fingerprint == own for data in shown)


def _check_proxy(researcher: Component, certificate: Certificate | None, *, timeout: float) -> Check:
    """What a node would do that is started from this environment: the researcher itself connects to nobody."""
    host = researcher.host
    if host in EVERYWHERE and certificate is not None:
        host = next((name for name in certificate.names if "*" not in name), host)
    proxy = proxy_for(host, os.environ)
    if proxy is None:
        return describe_no_proxy(host, os.environ)
    check = proxy_trouble(host, researcher.port, proxy, os.environ, timeout=timeout)
    found = f"for nodes that are started from here {check.found}"
    return Check(name=check.name, state=WARNING, found=found, remedy=check.remedy)


def _nodes_of(researcher: Component) -> list[tuple[RunningNode, Component]]:
    """Nodes that run on this machine and are set to this researcher's port."""
    found = []
    for running in running_nodes():
        try:
            node = read_component(running.root, NODE, running.environment)
        except UsageError:
            continue
        if node.port == researcher.port:
            found.append((running, node))
    return found


def _check_nodes(nodes: list[tuple[RunningNode, Component]], *, timeout: float) -> list[Check]:
    """What stands between this researcher and those nodes that run on the same machine."""
    checks = []
    for running, node in nodes:
        way = check_way(
            node.host, node.port, running.environment, config=str(node.config), started=running.started, timeout=timeout
        )
        # Without a running server the port does not answer, which is no fault of the node.
        troubles = [check for check in unhealthy(way) if check.name != "port"]
        title = f"node {node.name or node.root.name}"
        checks += [Check(name=title, state=check.state, found=check.found, remedy=check.remedy) for check in troubles]
        if not troubles:
            checks.append(
                Check(name=title, found=f"runs on this machine (process {running.pid}), nothing stands between")
            )
    return checks
