"""The way from a node to its researcher: port, TLS, certificate, proxy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timezone

from .certificates import Certificate
from .check import OK, PROBLEM, WARNING, Check
from .probes import TIMEOUT, Reached, reach
from .proxies import Proxy, describe_no_proxy, exemption_variable, proxy_for

OTHER_SERVER = "another program listens there: compare host and port with `fedfactory check` at the researcher"


def check_way(
    host: str,
    port: int,
    environment: Mapping[str, str],
    *,
    config: str = "etc/config.ini",
    registered: Collection[str] = (),
    started: float | None = None,
    timeout: float = TIMEOUT,
) -> list[Check]:
    """Try the connections that a node makes: directly, which Fed-BioMed does first, and then as gRPC goes.

    Args:
        host: of the researcher, as the node's configuration has it.
        port: of the researcher.
        environment: of the node's process.
        config: the node's configuration file, for remedies.
        registered: SHA-256 fingerprints of the researcher's certificates that the node has registered, if any.
        started: seconds since 1970 at which the node's process began, if it runs.
        timeout: seconds for each step of a connection.

    Returns: the checks "port", "researcher's certificate" (if one was shown), and "proxy".
    """
    direct, proxy = reach(host, port, timeout=timeout), proxy_for(host, environment)
    checks = [_check_port(host, port, direct, config)]
    if direct.certificate is not None:
        checks += _check_shown(host, direct, config=config, registered=registered, started=started)
    if proxy is None:
        return [*checks, describe_no_proxy(host, environment)]
    return [*checks, _check_proxy(host, port, proxy, direct, environment=environment, timeout=timeout)]


def proxy_trouble(
    host: str, port: int, proxy: Proxy, environment: Mapping[str, str], *, timeout: float = TIMEOUT
) -> Check:
    """What a proxy does with connections to a researcher, without a look at the direct way.

    Args:
        host: of the researcher, as nodes know it.
        port: of the researcher.
        proxy: through which gRPC goes, see `proxy_for`.
        environment: of the process that would connect.
        timeout: seconds for each step.
    """
    return _check_proxy(host, port, proxy, None, environment=environment, timeout=timeout)


def _check_port(host: str, port: int, reached: Reached, config: str) -> Check:
    if not reached.obstacle:
        return Check(name="port", found=f"{host}:{port} answers")
    setting = f"`ip` and `port` below [researcher] in {config}"
    if reached.stage == "name":
        remedy = f"correct {setting}, or ask the network's administrator for the name"
    elif reached.stage == "tls":
        remedy = f"{OTHER_SERVER}, or ask what stands between"
    elif "refuses" in reached.obstacle:
        remedy = f"a researcher listens only while its command runs: ask there, and compare {setting} with its port"
    else:
        remedy = f"a firewall may stand between: let it pass connections from here to {host}, TCP port {port}"
    return Check(name="port", state=PROBLEM, found=f"{host}:{port} {reached.obstacle}", remedy=remedy)


def _check_shown(
    host: str, reached: Reached, *, config: str, registered: Collection[str], started: float | None
) -> list[Check]:
    """The certificate that the server showed."""
    name = "researcher's certificate"
    try:
        shown = Certificate.read(reached.certificate or b"")
    except ValueError:
        return [Check(name=name, state=PROBLEM, found="the certificate shown is damaged", remedy=OTHER_SERVER)]
    checks = []
    if not reached.http2:
        checks.append(Check(name=name, state=PROBLEM, found="the server does not speak gRPC", remedy=OTHER_SERVER))
    if not shown.fits(host):
        names = ", ".join(shown.names) or "no host name"
        remedy = f"make the researcher again with FBM_SERVER_HOST={host}"
        if shown.names:
            remedy = f"set `ip = {shown.names[0]}` below [researcher] in {config}, or {remedy}"
        checks.append(Check(name=name, state=PROBLEM, found=f"it is for {names}, not for {host}", remedy=remedy))
    state, found, remedy = shown.validity(datetime.now(timezone.utc))
    if state != OK:
        checks.append(Check(name=name, state=state, found=f"it {found}", remedy=remedy))
    if registered and shown.fingerprint not in registered:
        checks.append(
            Check(
                name=name,
                state=PROBLEM,
                found=f"its SHA-256 {shown.fingerprint} is none of those registered at this node",
                remedy="compare it with `fedfactory check` at the researcher, by telephone, before you register it",
            )
        )
    elif not shown.signed_by_itself:
        checks.append(
            Check(
                name=name,
                state=WARNING,
                found=f"it is signed by {shown.issuer}, which Fed-BioMed's own certificates are not",
                remedy="a firewall may open the connection: compare SHA-256 "
                f"{shown.fingerprint} with `fedfactory check` at the researcher",
            )
        )
    if started is not None and shown.begins.timestamp() > started:
        checks.append(
            Check(
                name=name,
                state=WARNING,
                found="it was made after this node was started, which keeps the certificate that it saw first",
                remedy="start the node again if the researcher does not see it",
            )
        )
    known = "as registered" if registered else "compare it with the researcher's; a node keeps none on disk"
    return checks or [
        Check(name=name, found=f"fits {host}, until {shown.ends:%Y-%m-%d}, SHA-256 {shown.fingerprint} ({known})")
    ]


def _check_proxy(
    host: str,
    port: int,
    proxy: Proxy,
    direct: Reached | None,
    *,
    environment: Mapping[str, str],
    timeout: float,
) -> Check:
    variable = exemption_variable(environment)
    present = environment.get(variable, "").strip()
    value = f"{present},{host}" if present else host
    remedy = f"set {variable}={value} in the node's environment (lower case, without *) and start the node again"
    reached = reach(host, port, proxy=proxy, timeout=timeout)
    to = f"{proxy.setting} is used to reach {host}"
    if reached.stage == "proxy":
        return Check(name="proxy", state=PROBLEM, found=f"{to}, and that proxy {reached.obstacle}", remedy=remedy)
    if direct is not None and direct.obstacle:  # the port's own line says why
        return Check(name="proxy", state=WARNING, found=f"{to}; Fed-BioMed needs the direct way", remedy=remedy)
    if reached.obstacle:
        found = f"{to}, and behind that proxy the researcher {reached.obstacle}"
        return Check(name="proxy", state=PROBLEM, found=found, remedy=remedy)
    if direct is not None and reached.certificate != direct.certificate:
        found = f"{to}, and shows another certificate than the direct way: it opens the connection"
        return Check(name="proxy", state=PROBLEM, found=found, remedy=remedy)
    return Check(name="proxy", state=WARNING, found=f"{to}; it passes connections on", remedy=remedy)
