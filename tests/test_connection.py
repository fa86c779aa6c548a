"""Why a node and a researcher cannot connect: proxies, ports, certificates, stores; with real sockets and real TLS."""

from __future__ import annotations

import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from connections import (
    DAY,
    close,
    closed_port,
    listening,
    make_certificate,
    make_component,
    register,
    say,
    swallow,
    tls,
    tunnel,
)
from fedfactory.errors import FederationError, UsageError
from fedfactory.node.connection import machine, running_nodes
from fedfactory.node.connection.certificates import Certificate, check_files
from fedfactory.node.connection.check import OK, PROBLEM, WARNING, unhealthy
from fedfactory.node.connection.component import NODE, RESEARCHER, read_component
from fedfactory.node.connection.machine import check_clock, check_disk, check_versions
from fedfactory.node.connection.probes import listening_trouble, reach
from fedfactory.node.connection.proxies import (
    PROXY_VARIABLES,
    is_exempt,
    is_loopback,
    proxy_for,
    without_proxy_on_loopback,
)
from fedfactory.node.connection.running_nodes import RunningNode
from fedfactory.node.connection.way import check_way
from fedfactory.node.policy.policy import Policy, policy_file
from fedfactory.node.site_check import check_site, proxy_in_the_way, why_no_connection
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import description_of, store_facts
from fedfactory.researcher import connection_check
from fedfactory.researcher.connection_check import (
    check_researcher,
    missing_nodes,
    server_problem,
    why_nodes_are_missing,
)
from helpers import site_facts

QUICK = 0.4  # seconds to wait for servers that never answer
DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    """The machine's own proxies and other nodes on it are not those of the test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("fedfactory.node.site_check.running_nodes", list)
    monkeypatch.setattr("fedfactory.researcher.connection_check.running_nodes", list)


def found(checks, name):
    """The one check of a name."""
    (check,) = [check for check in checks if check.name == name]
    return check


def states(checks):
    return {check.name: check.state for check in checks}


@contextmanager
def grpc_server(certificate, key):
    """A real gRPC server with TLS on localhost; its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials(((key.read_bytes(), certificate.read_bytes()),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def grpc_connects(address, certificate, *, expects="localhost"):
    """Whether gRPC connects: a server that is reached says that it does not know the method."""
    options = [("grpc.ssl_target_name_override", expects), ("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(address, credentials, options=options) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/a/b")(b"", timeout=5)
        return error.value.code() == grpc.StatusCode.UNIMPLEMENTED


# Which proxy is taken.


@pytest.mark.parametrize(
    "environment",
    [
        *({name: "PROXY"} for name in PROXY_VARIABLES),
        *({name.upper(): "PROXY"} for name in PROXY_VARIABLES),
        {"all_proxy": "PROXY"},
        {"grpc_proxy": "", "https_proxy": "PROXY"},
        {"https_proxy": "", "http_proxy": "PROXY"},
        {"https_proxy": "socks5://127.0.0.1:1", "http_proxy": "PROXY"},
        {"https_proxy": "127.0.0.1:1"},
        {"https_proxy": "PROXY", "no_proxy": "localhost"},
        {"https_proxy": "PROXY", "no_proxy": "other.example, LOCALHOST ,"},
        {"https_proxy": "PROXY", "no_proxy": "other.example localhost"},
        {"https_proxy": "PROXY", "no_proxy": "*"},
        {"https_proxy": "PROXY", "no_proxy": ".localhost"},
        {"https_proxy": "PROXY", "no_proxy": "calhost"},
        {"https_proxy": "PROXY", "no_proxy": "127.0.0.1,127.0.0.0/8"},
        {"https_proxy": "PROXY", "NO_PROXY": "localhost"},
        {"https_proxy": "PROXY", "no_proxy": "localhost", "no_grpc_proxy": ""},
        {"https_proxy": "PROXY", "no_proxy": "other.example", "no_grpc_proxy": "localhost"},
    ],
    ids=str,
)
def test_the_rules_for_proxies_are_those_of_grpc(environment, tmp_path, monkeypatch):
    certificate, key = make_certificate(tmp_path)
    asked = threading.Event()

    def proxy(channel):
        asked.set()
        channel.close()

    with grpc_server(certificate, key) as port, listening(proxy) as proxy_port:
        ours = {name: value.replace("PROXY", f"http://127.0.0.1:{proxy_port}") for name, value in environment.items()}
        for name, value in ours.items():
            monkeypatch.setenv(name, value)
        connected = grpc_connects(f"localhost:{port}", certificate)
    assert connected is not asked.is_set()
    assert (proxy_for("localhost", ours) is None) is connected


RANGES = ("10.0.0.0/8", "10.1.2.3", "2.3", "10.1.0.0/16")


@pytest.mark.parametrize("entry", [*RANGES, "10.2.0.0/16", "10.1.2.", "10.*", "x/8"])
def test_ranges_of_addresses_are_exempt(entry):
    assert is_exempt("10.1.2.3", {"no_proxy": entry}) is (entry in RANGES)


def test_loopback_is_exempt_in_the_environment_of_local_processes():
    before = {"https_proxy": DEAD, "no_proxy": "a.example, localhost", "no_grpc_proxy": "b.example"}
    after = without_proxy_on_loopback(before)
    assert after["no_proxy"] == "a.example,localhost,127.0.0.1,::1"
    assert after["no_grpc_proxy"] == "b.example,localhost,127.0.0.1,::1"  # gRPC reads this one alone
    assert after["https_proxy"] == DEAD
    assert proxy_for("b.example", after) is None
    assert proxy_for("researcher.example", after).setting == f"https_proxy={DEAD}"
    assert "no_grpc_proxy" not in without_proxy_on_loopback({"https_proxy": DEAD})
    for host in ("localhost", "127.0.0.1", "::1"):
        assert is_loopback(host)
        assert proxy_for(host, before) is not None
        assert proxy_for(host, after) is None


def test_the_processes_of_a_local_federation_use_no_proxy_for_each_other(tmp_path, monkeypatch):
    from fedfactory.demo.local_federation import LocalFederation

    for variable in (*PROXY_VARIABLES, "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, DEAD)
    for exempt in ("", "no_proxy", "no_grpc_proxy"):
        with monkeypatch.context() as patch:
            if exempt:
                patch.setenv(exempt, "elsewhere.example")
            environment = LocalFederation(tmp_path, ["a"])._environment()
            assert proxy_for(environment["FBM_RESEARCHER_IP"], environment) is None
            assert proxy_for("researcher.example", environment) is not None


def test_a_password_of_a_proxy_is_not_shown():
    proxy = proxy_for("far.example", {"https_proxy": "http://me:secret@proxy.example:3128"})
    assert proxy.setting == "https_proxy=http://proxy.example:3128"


# The way to the researcher.


@pytest.mark.parametrize(
    ("expects", "common_name", "names"),
    [
        ("localhost", "localhost", ()),
        ("127.0.0.1", "localhost", ()),
        ("127.0.0.1", "127.0.0.1", ()),
        ("127.0.0.2", "127.0.0.1", ()),
        ("localhost", "*", ()),
        ("localhost", "0.0.0.0", ()),
        ("r.example.org", "*.example.org", ()),
        ("a.r.example.org", "*.example.org", ()),
        ("r.example.org", "other", ("r.example.org",)),
        ("other", "other", ("r.example.org",)),
        ("R.example.org", "r.EXAMPLE.org", ()),
    ],
)
def test_names_fit_a_certificate_as_grpc_reads_it(expects, common_name, names, tmp_path):
    certificate, key = make_certificate(tmp_path, common_name, names=names)
    with grpc_server(certificate, key) as port:
        connected = grpc_connects(f"127.0.0.1:{port}", certificate, expects=expects)
    assert Certificate.read(certificate.read_bytes()).fits(expects) is connected


def test_a_free_way_is_in_order(tmp_path):
    certificate, key = make_certificate(tmp_path)
    with grpc_server(certificate, key) as port:
        checks = check_way("localhost", port, {})
    assert states(checks) == {"port": OK, "researcher's certificate": OK, "proxy": OK}
    fingerprint = Certificate.read(certificate.read_bytes()).fingerprint
    assert fingerprint in found(checks, "researcher's certificate").found


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (swallow, "does not answer the TLS handshake"),
        (close, "closes it"),
        (say("HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak TLS"),
    ],
)
def test_what_answers_in_place_of_a_researcher_is_named(answer, words):
    with listening(answer) as port:
        check = found(check_way("127.0.0.1", port, {}, timeout=QUICK), "port")
    assert check.state == PROBLEM and words in check.found and check.remedy


def test_a_port_without_a_server_is_named_with_the_setting():
    port = closed_port()
    check = found(check_way("localhost", port, {}, config="node/etc/config.ini"), "port")
    assert check.state == PROBLEM and f"localhost:{port} refuses connections" in check.found
    assert "node/etc/config.ini" in check.remedy


def test_a_firewall_that_drops_packets_is_told_from_a_closed_port(monkeypatch):
    def drop(channel, address):
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", drop, raising=False)
    check = found(check_way("127.0.0.1", 5, {}), "port")
    assert check.state == PROBLEM and "does not answer within 3 s" in check.found and "firewall" in check.remedy


@pytest.mark.parametrize(("host", "words"), [("no-such-host.invalid", "does not know"), ("::1", "no IPv4 address")])
def test_a_host_that_fedbiomed_cannot_look_up_is_named(host, words):
    check = found(check_way(host, 50051, {}), "port")
    assert check.state == PROBLEM and words in check.found and "`ip`" in check.remedy


@pytest.mark.parametrize(
    ("options", "state", "words"),
    [
        ({"begins": -9 * DAY, "ends": -DAY}, PROBLEM, "expired on"),
        ({"begins": DAY}, PROBLEM, "this machine's clock"),
        ({"ends": 3 * DAY}, WARNING, "expires on"),
        ({"common_name": "researcher.example.org"}, PROBLEM, "for researcher.example.org, not for localhost"),
        ({"common_name": "0.0.0.0"}, PROBLEM, "for 0.0.0.0, not for localhost"),
        ({"common_name": "*"}, PROBLEM, "for *, not for localhost"),
        ({"issuer": "Hospital Firewall"}, WARNING, "signed by CN=Hospital Firewall"),
    ],
)
def test_a_certificate_that_a_node_refuses_is_told(options, state, words, tmp_path):
    with listening(tls(*make_certificate(tmp_path, **options))) as port:
        check = found(check_way("localhost", port, {}), "researcher's certificate")
    assert check.state == state and words in check.found and check.remedy


def test_a_web_server_is_no_researcher(tmp_path):
    with listening(tls(*make_certificate(tmp_path), protocol="http/1.1")) as port:
        check = found(check_way("localhost", port, {}), "researcher's certificate")
    assert check.state == PROBLEM and "does not speak gRPC" in check.found


def test_the_certificate_is_compared_with_those_that_the_node_registered(tmp_path):
    made = make_certificate(tmp_path / "a")
    known = Certificate.read(made[0].read_bytes()).fingerprint
    other = Certificate.read(make_certificate(tmp_path / "b")[0].read_bytes()).fingerprint
    with listening(tls(*made)) as port:
        assert not unhealthy(check_way("localhost", port, {}, registered=[other, known]))
        check = found(check_way("localhost", port, {}, registered=[other]), "researcher's certificate")
    assert check.state == PROBLEM and known in check.found


def test_a_node_that_is_older_than_the_certificate_may_have_to_be_restarted(tmp_path):
    with listening(tls(*make_certificate(tmp_path))) as port:
        older = check_way("localhost", port, {}, started=0.0)
        assert not unhealthy(check_way("localhost", port, {}, started=4e9))
    assert "start the node again" in found(older, "researcher's certificate").remedy


# Proxies that stand between.


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "that proxy refuses connections"),
        (swallow, "that proxy takes the connection and does not answer"),
        (close, "that proxy"),
        (say("HTTP/1.1 403 Forbidden\r\n\r\n"), "answers 403 Forbidden"),
        (say("SSH-2.0\r\n\r\n"), "is no HTTP proxy"),
    ],
)
def test_a_proxy_that_does_not_pass_connections_on_is_the_reason(answer, words, tmp_path):
    with listening(tls(*make_certificate(tmp_path))) as port, listening(answer or swallow) as open_port:
        proxy = f"http://127.0.0.1:{open_port if answer else closed_port()}"
        checks = check_way("localhost", port, {"http_proxy": proxy, "no_proxy": "a.example"}, timeout=QUICK)
    check = found(checks, "proxy")
    assert unhealthy(checks) == [check]  # the port and the certificate are in order: only the proxy is named
    assert check.state == PROBLEM and f"http_proxy={proxy}" in check.found and words in check.found
    assert "no_proxy=a.example,localhost" in check.remedy


def test_a_proxy_that_passes_connections_on_is_a_warning(tmp_path):
    with listening(tls(*make_certificate(tmp_path))) as port, listening(tunnel()) as proxy:
        check = found(check_way("localhost", port, {"grpc_proxy": f"http://127.0.0.1:{proxy}"}), "proxy")
    assert check.state == WARNING and "passes connections on" in check.found


def test_a_proxy_that_opens_the_encryption_is_a_problem(tmp_path):
    with (
        listening(tls(*make_certificate(tmp_path / "a"))) as port,
        listening(tls(*make_certificate(tmp_path / "b"))) as false,
        listening(tunnel(false)) as proxy,
    ):
        check = found(check_way("localhost", port, {"grpc_proxy": f"http://127.0.0.1:{proxy}"}), "proxy")
    assert check.state == PROBLEM and "another certificate" in check.found


def test_a_proxy_for_which_the_host_is_exempt_is_mentioned_and_not_tried(tmp_path):
    with listening(tls(*make_certificate(tmp_path))) as port:
        checks = check_way("localhost", port, {"https_proxy": DEAD, "no_proxy": "localhost"})
        upper = check_way("localhost", port, {"HTTPS_PROXY": DEAD})
    assert not unhealthy(checks) and "exempt" in found(checks, "proxy").found
    assert not unhealthy(upper) and "gRPC does not use it" in found(upper, "proxy").found


# Certificates on disk.


def test_files_in_order(tmp_path):
    checks, read = check_files(*make_certificate(tmp_path, "researcher.example.org"))
    assert states(checks) == {"certificate": OK, "private key": OK}
    assert read.names == ("researcher.example.org",) and read.fingerprint in checks[0].found


def damage_certificate(certificate, key, tmp_path):
    certificate.write_text("no certificate")


def lose_certificate(certificate, key, tmp_path):
    certificate.unlink()


def lose_key(certificate, key, tmp_path):
    key.unlink()


def damage_key(certificate, key, tmp_path):
    key.write_bytes(key.read_bytes()[:40])


def exchange_key(certificate, key, tmp_path):
    key.write_bytes(make_certificate(tmp_path / "other")[1].read_bytes())


def open_key(certificate, key, tmp_path):
    key.chmod(0o644)


@pytest.mark.parametrize(
    ("change", "name", "state", "words"),
    [
        (damage_certificate, "certificate", PROBLEM, "holds no certificate"),
        (lose_certificate, "certificate", PROBLEM, "No such file"),
        (lose_key, "private key", PROBLEM, "No such file"),
        (damage_key, "private key", PROBLEM, "holds no private key"),
        (exchange_key, "private key", PROBLEM, "does not belong to the certificate"),
        (open_key, "private key", WARNING, "every user of this machine"),
    ],
)
def test_files_that_are_not_in_order(change, name, state, words, tmp_path):
    certificate, key = make_certificate(tmp_path)
    change(certificate, key, tmp_path)
    checks, _ = check_files(certificate, key)
    check = found(checks, name)
    assert check.state == state and words in check.found and check.remedy
    assert unhealthy(checks) == [check]


def test_an_expired_certificate_on_disk(tmp_path):
    checks, _ = check_files(*make_certificate(tmp_path, begins=-9 * DAY, ends=-timedelta(hours=2)))
    check = found(checks, "certificate")
    assert check.state == PROBLEM and "expired on" in check.found and "nodes keep" in check.remedy


# Ports of the researcher.


def test_ports_that_a_server_can_and_cannot_have():
    assert listening_trouble("localhost", closed_port()) == ("", "")
    with listening(swallow) as port:
        assert listening_trouble("localhost", port)[0] == "taken"
        assert listening_trouble("0.0.0.0", port)[0] == "taken"
    assert listening_trouble("192.0.2.1", closed_port())[0] == "foreign"  # an address for documents
    assert listening_trouble("no-such-host.invalid", 50051)[0] == "name"


def test_the_researchers_own_server_is_told_from_another_program(tmp_path):
    root = make_component(tmp_path / "researcher", RESEARCHER, 1)
    config = root / "etc" / "config.ini"
    certs = root / "etc" / "certs"
    for answer, state, words in (
        (tls(certs / "server_certificate.pem", certs / "server_certificate.key"), OK, "this researcher's server"),
        (tls(*make_certificate(tmp_path / "other")), PROBLEM, "another program"),
        (swallow, PROBLEM, "another program"),
    ):
        with listening(answer) as port:
            config.write_text(config.read_text().replace("port = 1\n", f"port = {port}\n"))
            check = found(check_researcher(root, timeout=QUICK), "port")
            config.write_text(config.read_text().replace(f"port = {port}\n", "port = 1\n"))
        assert check.state == state and words in check.found


def test_a_server_that_shares_its_port_with_another_program_is_not_in_order(tmp_path):
    """gRPC listens on ::1 alone if another program has 127.0.0.1, where nodes connect."""
    root = make_component(tmp_path / "researcher", RESEARCHER, 1)
    certs = root / "etc" / "certs"
    with listening(swallow) as port:
        try:
            other = socket.create_server(("::1", port), family=socket.AF_INET6)
        except OSError:
            pytest.skip("no IPv6 here")
        other.close()
        config = root / "etc" / "config.ini"
        config.write_text(config.read_text().replace("port = 1\n", f"port = {port}\n"))
        own = (certs / "server_certificate.pem", certs / "server_certificate.key")
        with listening(tls(*own), address=("::1", port)):
            assert found(check_researcher(root, timeout=QUICK), "port").state == PROBLEM


@pytest.mark.parametrize("change", [damage_certificate, lose_certificate, lose_key, damage_key, exchange_key])
def test_a_server_that_cannot_start_because_of_its_files_blames_them(change, tmp_path):
    """Fed-BioMed says that the port cannot be bound."""
    root = make_component(tmp_path / "researcher", RESEARCHER, closed_port())
    assert server_problem(root) == ""
    certs = root / "etc" / "certs"
    change(certs / "server_certificate.pem", certs / "server_certificate.key", tmp_path)
    assert str(certs) in server_problem(root) and "port" not in server_problem(root)


def test_a_server_that_cannot_have_its_address_blames_the_setting(tmp_path):
    root = make_component(tmp_path / "researcher", RESEARCHER, closed_port(), host="192.0.2.1")
    assert "192.0.2.1 is no address of this machine" in server_problem(root)
    with listening(swallow) as port:
        root = make_component(tmp_path / "other", RESEARCHER, port)
        assert f"another program listens on localhost:{port}" in server_problem(root, timeout=QUICK)


@pytest.mark.parametrize(
    ("name", "host", "check_name", "state", "words"),
    [
        ("localhost", "0.0.0.0", "certificate's name", WARNING, "nodes of other machines refuse it"),
        ("0.0.0.0", "0.0.0.0", "certificate's name", PROBLEM, "under every name"),
        ("*", "0.0.0.0", "certificate's name", PROBLEM, "under every name"),
    ],
)
def test_a_certificate_under_whose_name_nobody_connects(name, host, check_name, state, words, tmp_path):
    root = make_component(tmp_path / "researcher", RESEARCHER, closed_port(), host=host, common_name=name)
    check = found(check_researcher(root), check_name)
    assert check.state == state and words in check.found and "FBM_SERVER_HOST" in check.remedy


def test_a_server_that_only_its_own_machine_reaches(tmp_path):
    port = closed_port()
    root = make_component(tmp_path / "r", RESEARCHER, port, host="localhost", common_name="researcher.example.org")
    assert "nodes of other machines do not reach it" in why_nodes_are_missing(root)
    good = make_component(tmp_path / "good", RESEARCHER, port, host="0.0.0.0", common_name="researcher.example.org")
    assert not unhealthy(check_researcher(good))
    assert why_nodes_are_missing(good) == "certificate, port and proxies of this machine are in order"


def test_the_researcher_names_a_proxy_of_its_own_environment(tmp_path, monkeypatch):
    root = make_component(tmp_path / "researcher", RESEARCHER, closed_port())
    monkeypatch.setenv("https_proxy", DEAD)
    line = why_nodes_are_missing(root)
    assert f"https_proxy={DEAD}" in line and "no_proxy=localhost" in line and "\n" not in line


def test_the_researcher_names_the_proxy_of_a_node_on_the_same_machine(tmp_path, monkeypatch):
    port = closed_port()
    root = make_component(tmp_path / "researcher", RESEARCHER, port)
    node = make_component(tmp_path / "node", NODE, port)
    other = make_component(tmp_path / "other", NODE, closed_port())
    environment = {"grpc_proxy": DEAD}
    running = [RunningNode(pid=5, root=path, started=4e9, environment=environment) for path in (node, other)]
    monkeypatch.setattr(connection_check, "running_nodes", lambda: running)
    line = why_nodes_are_missing(root)
    assert line.count(f"grpc_proxy={DEAD}") == 1 and "node hospital-a" in line  # the other node has another researcher


# A whole node, a whole researcher.


@pytest.fixture
def node(tmp_path, store):
    """A node in order: its store is registered, its researcher's server answers."""
    root = make_component(tmp_path / "node", NODE, 1)
    Policy().save(root)
    register(root, [row_of(store)])
    certs = root / "etc" / "certs"  # the same files as at the researcher will do
    with grpc_server(certs / "server_certificate.pem", certs / "server_certificate.key") as port:
        config = root / "etc" / "config.ini"
        config.write_text(config.read_text().replace("port = 1\n", f"port = {port}\n"))
        yield root


def row_of(store, **changes):
    facts = replace(store_facts(store, SiteChoices()), **changes)
    return {"name": "x", "tags": ["balls"], "description": description_of(facts), "path": str(store.path.resolve())}


def test_a_node_in_order_has_no_problem(node):
    checks = check_site(node)
    assert unhealthy(checks) == []
    names = ["certificate", "private key", "port", "researcher's certificate", "proxy", "versions", "approval"]
    assert [check.name for check in checks] == [*names, "guard", "policy", "ledger", "stores", "disk", "clock"]
    assert "3 cases" in found(checks, "stores").found


def test_one_changed_byte_of_a_store_is_found(node, store):
    file = store.path / store.files["images"]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    check = found(check_site(node), "stores")
    assert check.state == PROBLEM and "have changed since they were prepared" in check.found


def test_a_store_that_is_gone_or_grew_is_found(node, store):
    register(node, [row_of(store, slices=5)])
    grown = found(check_site(node), "stores")
    assert grown.state == PROBLEM and "not as it was registered" in grown.found and "site add" in grown.remedy
    (store.path / "store.json").rename(store.path / "elsewhere.json")
    gone = found(check_site(node), "stores")
    assert gone.state == PROBLEM and "no slice store here" in gone.found


def test_data_of_other_programs_are_counted_and_left_alone(node, store, tmp_path):
    register(node, [row_of(store), {"description": "MNIST", "path": str(tmp_path), "tags": ["x"]}])
    check = found(check_site(node), "stores")
    assert check.state == OK and "1 registered data sets are not of fedfactory" in check.found
    register(node, [])
    assert found(check_site(node), "stores").state == WARNING


def test_versions_of_the_store_and_of_the_researchers_plan_are_compared(node, store):
    register(node, [row_of(store, version="0.0.1")])
    register(node, [{"training_plan": "assert fedfactory.__version__=='9.9'"}], table="TrainingPlans")
    check = found(check_site(node), "versions")
    assert check.state == WARNING and "fedfactory 0.0.1" in check.found and "fedfactory 9.9" in check.found


@pytest.mark.parametrize(
    ("setting", "state", "words"),
    [
        ("training_plan_approval = True", PROBLEM, "unread"),
        ("allow_default_training_plans = False", PROBLEM, "example plans"),
    ],
)
def test_approval_that_is_off(setting, state, words, node):
    config = node / "etc" / "config.ini"
    name, _, value = setting.partition(" = ")
    config.write_text(config.read_text().replace(setting, f"{name} = {'False' if value == 'True' else 'True'}"))
    check = found(check_site(node), "approval")
    assert check.state == state and words in check.found and str(config) in check.remedy


def test_a_policy_that_is_missing_or_allows_more_is_found(node):
    Policy(least_batch=1).save(node)
    assert found(check_site(node), "policy").state == WARNING
    policy_file(node).unlink()
    check = found(check_site(node), "policy")
    assert check.state == PROBLEM and "has no policy" in check.found and "site policy" in check.remedy


def test_the_environment_of_the_running_node_counts(node, monkeypatch):
    environment = {"https_proxy": DEAD, "FBM_SECURITY_TRAINING_PLAN_APPROVAL": "False"}
    running = [RunningNode(pid=5, root=node.resolve(), started=4e9, environment=environment)]
    monkeypatch.setattr("fedfactory.node.site_check.running_nodes", lambda: running)
    monkeypatch.setenv("no_proxy", "localhost")  # of this shell, not of the node
    checks = check_site(node)
    assert found(checks, "proxy").state == found(checks, "approval").state == PROBLEM
    line = why_no_connection(node)
    assert line.startswith(f"https_proxy={DEAD} is used to reach localhost") and "\n" not in line


def test_registering_a_store_warns_of_a_proxy_without_trying_it(node, monkeypatch):
    assert proxy_in_the_way(node) == ""
    monkeypatch.setenv("http_proxy", DEAD)
    assert proxy_in_the_way(node).startswith(f"http_proxy={DEAD} is used to reach localhost")


def test_a_command_in_the_background_that_fails_is_reported_at_once(tmp_path):
    """The nodes' commands wait for minutes for a plan that no researcher will send."""
    from fedfactory.demo.local_federation import LocalFederation

    (tmp_path / "logs").mkdir()
    waits = [sys.executable, "-c", "import time; time.sleep(100)"]
    with (
        LocalFederation(tmp_path, []) as federation,
        pytest.raises(FederationError, match=r"step train failed with code 2.*experiment is"),
        federation.background("train", ["status", str(tmp_path / "none")], rounds=1),
    ):
        federation.run_together("approve", {"a": waits})


def test_why_no_plan_arrives_names_a_node_that_does_not_run(node):
    assert why_no_connection(node).startswith("this node does not run (`fedbiomed node -p")


def test_registered_certificates_are_read_from_the_nodes_database(node, tmp_path):
    other = make_certificate(tmp_path / "other")[0].read_text()
    register(node, [{"component": "RESEARCHER", "certificate": other}], table="Certificates")
    assert found(check_site(node), "researcher's certificate").state == PROBLEM


def test_a_damaged_database_is_named(node):
    (node / "var" / "db_NODE_test.json").write_text("{")
    assert found(check_site(node), "database").state == PROBLEM


# What is no component.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("port = 5", "port = many"), "port is 'many'"),
        (lambda text: text.replace("port = 5", "port = 70000"), "port is '70000'"),
        (lambda text: text.replace("[researcher]", "[other]"), "no researcher.ip"),
        (lambda text: "no = section", "not readable"),
        (lambda text: text.replace("component = NODE", "component = RESEARCHER"), "use `fedfactory check"),
    ],
)
def test_a_configuration_that_cannot_be_used(change, words, tmp_path):
    root = make_component(tmp_path / "node", NODE, 5)
    config = root / "etc" / "config.ini"
    config.write_text(change(config.read_text()))
    with pytest.raises(UsageError, match=words):
        check_site(root)


def test_a_folder_without_a_component(tmp_path):
    with pytest.raises(UsageError, match="no Fed-BioMed node here"):
        check_site(tmp_path)
    with pytest.raises(UsageError, match="no Fed-BioMed researcher here"):
        check_researcher(tmp_path)


def test_components_are_read_as_fedbiomed_writes_them(tmp_path, monkeypatch):
    from fedbiomed.node.config import node_component
    from fedbiomed.researcher.config import researcher_component

    os.umask(0o022)  # of most machines
    monkeypatch.setenv("FBM_RESEARCHER_IP", "researcher.example.org")
    monkeypatch.setenv("FBM_RESEARCHER_PORT", "50123")
    monkeypatch.setenv("FBM_SERVER_HOST", "10.1.2.3")
    node_component.initiate(root=str(tmp_path / "node"), alias="hospital-b")
    researcher_component.initiate(root=str(tmp_path / "researcher"))
    for name in ("FBM_RESEARCHER_IP", "FBM_RESEARCHER_PORT", "FBM_SERVER_HOST"):
        monkeypatch.delenv(name)
    made = read_component(tmp_path / "node", NODE)
    assert (made.host, made.port, made.name) == ("researcher.example.org", 50123, "hospital-b")
    assert not made.is_on("security.training_plan_approval")
    researcher = read_component(tmp_path / "researcher", RESEARCHER)
    checks, certificate = check_files(researcher.certificate, researcher.key)
    assert states(checks) == {"certificate": OK, "private key": WARNING}  # Fed-BioMed lets every user read the key
    assert certificate.names == ("10.1.2.3",) and certificate.fits("10.1.2.3") and certificate.signed_by_itself


# The machine.


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    for free, state in ((machine.GIB / 2, PROBLEM), (3 * machine.GIB, WARNING), (9 * machine.GIB, OK)):
        usage = type("Usage", (), {"free": free, "total": 100 * machine.GIB})()
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert check_disk([tmp_path, tmp_path / "missing"]).state == state


def test_a_clock_that_cannot_be_right(tmp_path):
    file = tmp_path / "config.ini"
    file.write_text("")
    now = file.stat().st_mtime
    assert check_clock([file, tmp_path / "missing"], now).state == OK
    assert check_clock([file], now - 7200).state == WARNING
    assert check_clock([file], 1.0).state == PROBLEM


def test_missing_and_other_versions_are_named(monkeypatch):
    assert check_versions([("somewhere", site_facts().version)]).state == OK
    monkeypatch.setattr(machine, "PACKAGES", ("fedbiomed", "no-such-package"))
    assert "no-such-package is not installed" in check_versions().found


def test_other_processes_are_no_nodes():
    assert all(node.root.is_absolute() for node in running_nodes.running_nodes())


# What the commands show.


def test_the_commands_print_a_line_and_a_remedy_for_each_check(node, tmp_path, capsys):
    from fedfactory.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["site", "check", str(node)])
    assert ended.value.code == 0
    assert "problems: 0, warnings: 0, ok: 13" in capsys.readouterr().out
    researcher = make_component(tmp_path / "r", RESEARCHER, closed_port(), begins=-9 * DAY, ends=-DAY)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(researcher)])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("problem ")]
    assert "expired on" in lines[number] and lines[number + 1].strip().startswith("-> ")


def test_waiting_for_approval_says_what_keeps_the_plan_away(tmp_path, monkeypatch):
    from fedfactory.node import sites

    root = make_component(tmp_path / "node", NODE, closed_port())
    monkeypatch.setattr(sites, "open_node", lambda folder: folder)
    monkeypatch.setattr(sites, "pending_plans", lambda node: [])
    monkeypatch.setenv("https_proxy", DEAD)
    with pytest.raises(FederationError, match=rf"no training plan waits.*https_proxy={DEAD}.*site check"):
        sites.approve_plans(root, confirm=lambda name, source: True)
    monkeypatch.setattr(sites, "why_no_connection", lambda folder: "")
    with pytest.raises(FederationError, match="start the training at the researcher first"):
        sites.approve_plans(root, confirm=lambda name, source: True)


class Nodes:
    """Stands for Fed-BioMed's requests: so many nodes answer, with data under these tags."""

    def __init__(self, connected, tags):
        self.connected, self.tags = connected, tags

    def ping_nodes(self):
        return [f"node{number}" for number in range(self.connected)]

    def search(self, tags):
        return {}

    def list(self):
        return {"node0": [{"tags": self.tags}]}


def test_a_researcher_without_nodes_says_whether_data_or_the_connection_are_missing(tmp_path, monkeypatch):
    root = make_component(tmp_path / "researcher", RESEARCHER, closed_port(), begins=-9 * DAY, ends=-DAY)
    monkeypatch.setenv("https_proxy", DEAD)
    away = missing_nodes(Nodes(1, []), 3, "balls", root)
    assert away.startswith("1 are connected") and "expired on" in away and f"https_proxy={DEAD}" in away
    data = missing_nodes(Nodes(3, ["bals"]), 3, "balls", root)
    assert "register data" in data and "'bals'" in data and "proxy" not in data


def test_reach_sends_the_name_and_takes_any_certificate(tmp_path):
    with listening(tls(*make_certificate(tmp_path, "far.example", ends=-timedelta(hours=1), begins=-DAY))) as port:
        reached = reach("localhost", port)
    assert reached.certificate and reached.http2 and not reached.obstacle
