"""Which proxy gRPC takes for a host: the rules of its C library, which differ from those of other programs."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from .check import OK, Check

# Lower case alone; the first that is set counts, even if it is empty. Measured with grpcio 1.82.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXEMPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORT = 80


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy through which gRPC connects.

    Attributes:
        variable: environment variable that names it.
        host: of the proxy.
        port: of the proxy.
    """

    variable: str
    host: str
    port: int

    @property
    def setting(self) -> str:
        """The variable with its value; user name and password are left out."""
        return f"{self.variable}=http://{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def proxy_for(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy through which gRPC connects to a host; None if it connects directly.

    Only values with the scheme http count: gRPC ignores other proxies, and upper-case variables.

    Args:
        host: name or address, as the node's configuration has it.
        environment: of the process that connects.
    """
    variable = next((name for name in PROXY_VARIABLES if name in environment), None)
    if variable is None or is_exempt(host, environment):
        return None
    try:
        parts = urlsplit(environment[variable])
        port = parts.port or DEFAULT_PORT
    except ValueError:
        return None
    if parts.scheme.lower() != "http" or not parts.hostname:
        return None
    return Proxy(variable=variable, host=parts.hostname, port=port)


def is_exempt(host: str, environment: Mapping[str, str]) -> bool:
    """Whether `no_grpc_proxy`, or else `no_proxy`, names a host: by the end of its name, or by a range of addresses."""
    text = environment.get(exemption_variable(environment), "")
    return any(_covers(entry.strip(), host) for entry in text.split(",") if entry.strip())


def exemption_variable(environment: Mapping[str, str]) -> str:
    """The variable that gRPC reads: `no_grpc_proxy` if it is set, even to nothing; else `no_proxy`."""
    return next((name for name in EXEMPTION_VARIABLES if name in environment), EXEMPTION_VARIABLES[-1])


def without_proxy_on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of an environment in which connections to this machine go through no proxy.

    What is exempt already stays so. Both variables are set, as programs other than gRPC read only `no_proxy`.
    """
    result = dict(environment)
    for variable in EXEMPTION_VARIABLES:
        if variable == EXEMPTION_VARIABLES[-1] or variable in environment:
            present = [entry.strip() for entry in environment.get(variable, "").split(",") if entry.strip()]
            result[variable] = ",".join([*present, *(name for name in LOOPBACK if name not in present)])
    return result


def describe_no_proxy(host: str, environment: Mapping[str, str]) -> Check:
    """The check for a host that no proxy stands before; it names variables that gRPC passes over."""
    lower = {name.lower() for name, value in environment.items() if value}
    present = sorted(name for name in lower if name in (*PROXY_VARIABLES, "all_proxy"))
    if not present:
        return Check(name="proxy", state=OK, found="no proxy is set")
    reason = "exempt" if is_exempt(host, environment) else "gRPC does not use it"
    return Check(name="proxy", state=OK, found=f"none for {host} ({', '.join(present)} is set; {reason})")


def _covers(entry: str, host: str) -> bool:
    if "/" in entry:
        try:
            return ipaddress.ip_address(host.strip("[]")) in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    return host.lower().endswith(entry.lower())
