"""The guide of docs/federation.md on separate hosts: a run across network namespaces.

    sudo python benchmarks/separate_hosts.py --out benchmarks/results/separate_hosts.json     (Linux, as root)

There are four hosts, each with its own network, host names and component folder: a researcher, a router, hospital-a and
hospital-b. The router routes hospital-a to the researcher. It forwards the connections of hospital-b, as NAT does: the
researcher does not know any address of that network. The JSON file has the rounds, and the ports on which each host
listened during the run. No data are needed. Three rounds take a few minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedfactory.common.files import write_json
from fedfactory.generative import FactoryConfig
from fedfactory.researcher.run_state import RunState
from measuring import machine
from round_overhead import TAG, make_stores

NODES = ("hospital-a", "hospital-b")
NAME, PORT = "researcher.example.org", 50051
ADDRESS = {"researcher": "10.77.0.2", "hospital-a": "10.77.1.2", "hospital-b": "10.77.2.2"}
GATEWAY = {host: address[:-1] + "1" for host, address in ADDRESS.items()}
RESEARCHER_ADDRESS = {
    "researcher": "127.0.0.1",
    "hospital-a": ADDRESS["researcher"],
    "hospital-b": GATEWAY["hospital-b"],
}
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--relay", action="store_true", help=argparse.SUPPRESS
    )  # runs this script as the NAT of hospital-b
    arguments = parser.parse_args()
    if arguments.relay:
        asyncio.run(relay(GATEWAY["hospital-b"], ADDRESS["researcher"]))
        return
    with tempfile.TemporaryDirectory() as name:
        hosts = Hosts(Path(name))
        try:
            content = {"machine": machine("cpu"), **run(hosts, Path(name))}
        finally:
            hosts.remove()
    if arguments.out:
        write_json(arguments.out, content)
    print(json.dumps(content, indent=2))


class Hosts:
    """Network namespaces around a router. Each has its own /etc/hosts with the address of the researcher.

    Args:
        folder: for the logs of the processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, []
        ip("netns", "add", "ff-router")
        inside("router", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        inside("router", "ip", "link", "set", "lo", "up")
        for number, (host, address) in enumerate(ADDRESS.items()):
            ip("netns", "add", f"ff-{host}")
            ip("link", "add", f"ffa{number}", "netns", f"ff-{host}", "type", "veth",
               "peer", "name", f"ffb{number}", "netns", "ff-router")  # fmt: skip
            for namespace, link, own in ((host, f"ffa{number}", address), ("router", f"ffb{number}", GATEWAY[host])):
                inside(namespace, "ip", "addr", "add", f"{own}/24", "dev", link)
                inside(namespace, "ip", "link", "set", link, "up")
            inside(host, "ip", "link", "set", "lo", "up")
            Path(f"/etc/netns/ff-{host}").mkdir(parents=True)
            Path(f"/etc/netns/ff-{host}/hosts").write_text(f"127.0.0.1 localhost\n{RESEARCHER_ADDRESS[host]} {NAME}\n")
        inside("hospital-a", "ip", "route", "add", "default", "via", GATEWAY["hospital-a"])
        inside("researcher", "ip", "route", "add", "10.77.1.0/24", "via", GATEWAY["researcher"])

    def start(self, host: str, name: str, words: list, **environment: str) -> subprocess.Popen:
        """Start a command on a host; `name` is the name of its log."""
        log = (self.folder / f"{name}.log").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
        command = ["ip", "netns", "exec", f"ff-{host}", *map(str, words)]
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.running.append(child)
        return child

    def finish(self, child: subprocess.Popen, name: str, seconds: float = 180) -> None:
        """Wait for a command; end with the last part of its log if it failed."""
        if child.wait(seconds):
            raise SystemExit(f"{name} failed:\n" + (self.folder / f"{name}.log").read_text(errors="replace")[-3000:])

    def remove(self) -> None:
        """Stop all processes and remove the namespaces."""
        for child in self.running:
            if child.poll() is None:
                os.killpg(child.pid, 15)
        time.sleep(3)
        for child in self.running:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
        for host in (*ADDRESS, "router"):
            subprocess.run(["ip", "netns", "del", f"ff-{host}"], check=False)
            shutil.rmtree(f"/etc/netns/ff-{host}", ignore_errors=True)


def run(hosts: Hosts, folder: Path) -> dict:
    """Set up all hosts as the guide describes, train, and return what happened."""
    fedbiomed = [sys.executable, "-m", "fedbiomed.cli", "component", "create"]
    fedfactory = [sys.executable, "-c", "from fedfactory.cli import main; main()"]
    approval = {"FBM_SECURITY_TRAINING_PLAN_APPROVAL": "True", "FBM_SECURITY_ALLOW_DEFAULT_TRAINING_PLANS": "False"}
    server = {"FBM_SERVER_HOST": NAME, "FBM_SERVER_PORT": str(PORT)}  # the certificate is made for this name
    words = [*fedbiomed, "-c", "researcher", "-p", folder / "r"]
    created = {"researcher": hosts.start("researcher", "create-r", words, **server)}
    for node in NODES:
        words = [*fedbiomed, "-c", "node", "-p", folder / node, "-n", node]
        created[node] = hosts.start(
            node, f"create-{node}", words, FBM_RESEARCHER_IP=NAME, FBM_RESEARCHER_PORT=str(PORT), **approval
        )
    stores = make_stores(folder, list(NODES), size=32)
    hosts.finish(created["researcher"], "create-r")
    settings = folder / "r" / "etc" / "config.ini"
    settings.write_text(settings.read_text().replace(f"host = {NAME}", "host = 0.0.0.0"))
    for node in NODES:
        hosts.finish(created[node], f"create-{node}")
        words = [*fedfactory, "site", "add", folder / node, "--store", stores[node], "--tag", TAG]
        hosts.finish(hosts.start(node, f"add-{node}", words), f"add-{node}")
    hosts.start("router", "relay", [sys.executable, __file__, "--relay"])
    options = json.dumps({"gpu": False, "gpu_num": 0, "gpu_only": False, "debug": False})
    for node in NODES:
        words = [sys.executable, "-m", "fedbiomed.node.node_pm", "--config", folder / node, "--node-args", options]
        hosts.start(node, node, words)
    config = FactoryConfig.preset("tiny", NODES, z_bins=4, batch_size=2)
    write_json(folder / "config.json", config.to_dict())
    words = ["train", "--researcher", folder / "r", "--out", folder / "run", "--tag", TAG, "--rounds", ROUNDS]
    words += ["--config", folder / "config.json", "--updates-per-round", 2, "--approval-timeout", 120]
    train = hosts.start("researcher", "train", [*fedfactory, *words, "--node-timeout", 120])
    for node in NODES:
        words = [*fedfactory, "site", "approve", folder / node, "--yes", "--wait", "120"]
        hosts.finish(hosts.start(node, f"approve-{node}", words), f"approve-{node}")
    listening = {host: listeners(host) for host in ADDRESS}
    route_exit_code = ip(
        "netns", "exec", "ff-researcher", "ip", "route", "get", ADDRESS["hospital-b"], check=False
    ).returncode
    hosts.finish(train, "train", 300)
    state = RunState.load(folder / "run")
    return {
        "rounds_done": state.round_done,
        "sites": sorted(update.node_name for update in state.site_updates.values()),
        "events": [event.to_dict() for event in state.events],
        "listening": listening,
        "researcher_has_a_route_to_hospital_b": route_exit_code == 0,
    }


def listeners(host: str) -> list[str]:
    """Ports on which a process of the host accepts TCP connections."""
    ports = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        text = inside(host, "cat", table).stdout.decode()
        for row in text.splitlines()[1:]:
            local, _, state = row.split()[1:4]
            if state == "0A":  # LISTEN
                ports.append(f"port {int(local.rpartition(':')[2], 16)}")
    return sorted(set(ports))


async def relay(listen: str, target: str) -> None:
    """Forward connections as NAT does: the researcher receives them from the address of the router."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            connection = await asyncio.open_connection(target, PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, connection[1]), copy(connection[0], writer), return_exceptions=True)

    while True:  # NAT forwards refusals too, so the relay starts to listen only when the researcher listens
        try:
            (await asyncio.open_connection(target, PORT))[1].close()
            break
        except OSError:
            await asyncio.sleep(0.5)
    server = await asyncio.start_server(connected, listen, PORT)
    await server.serve_forever()


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run the command `ip`."""
    return subprocess.run(["ip", *words], check=check, capture_output=True)


def inside(host: str, *words: str) -> subprocess.CompletedProcess:
    """Run a command in the network namespace of a host."""
    return ip("netns", "exec", f"ff-{host}", *words)


if __name__ == "__main__":
    main()
