"""All that an administrator can check of a node before a run, or when the researcher does not see it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import FedFactoryError
from .connection.certificates import Certificate, check_files
from .connection.check import PROBLEM, WARNING, Check, unhealthy
from .connection.component import APPROVAL, NODE, RESEARCHER, Component, read_component
from .connection.machine import check_clock, check_disk, check_versions
from .connection.probes import TIMEOUT
from .connection.proxies import proxy_for
from .connection.running_nodes import RunningNode, running_nodes
from .connection.way import check_way
from .ledger.ledger import Ledger
from .policy.approval import approval_problem
from .policy.policy_check import check_policy
from .site_choices import SiteChoices
from .site_facts import INTRODUCTION, SiteFacts, read_facts, store_facts
from .store.slice_store import SliceStore

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # PyTorch's own switch
GUARD = "fedfactory.node.protection.autoload:"
DATA_TABLE, PLAN_TABLE, CERTIFICATE_TABLE = "Datasets", "TrainingPlans", "Certificates"
PLAN_VERSION = re.compile(r"fedfactory\.__version__\s*==\s*['\"]([\w.+-]+)['\"]")


def check_site(root: str | Path, *, timeout: float = TIMEOUT) -> list[Check]:
    """Look at a node: certificate, way to the researcher, versions, approval, policy, stores, disk, clock. Nothing is
    written.

    Args:
        root: folder of the node.
        timeout: seconds for each step of a connection.

    Returns: the checks, in the order in which they are shown.
    Raises: UsageError if there is no node, or if its configuration cannot be used.
    """
    running = process_of(root)
    node = read_component(root, NODE, running.environment if running else None)
    checks, _ = check_files(node.certificate, node.key)
    checks = [*checks, *_check_connection(node, running, timeout=timeout)]
    try:
        data, plans = node.records(DATA_TABLE), node.records(PLAN_TABLE)
    except (OSError, ValueError) as error:
        remedy = f"put {node.database} back from a backup, or make the node again"
        checks.append(Check(name="database", state=PROBLEM, found=f"it cannot be read ({error})", remedy=remedy))
        data, plans = [], []
    stores = _our_stores(data)
    versions = [(f"the store {path} was registered with", facts.version) for path, facts in stores.items() if facts]
    plan_versions = [match[1] for plan in plans if (match := PLAN_VERSION.search(str(plan.get("training_plan"))))]
    versions += [("the researcher's last plan is of", version) for version in plan_versions[-1:]]
    checks += [
        check_versions(versions),
        _check_approval(node),
        _check_guard(os.environ if running is None else running.environment),
        check_policy(node.root),
        _check_ledger(node.root),
        *_check_stores(root, stores, others=len(data) - len(stores)),
    ]
    checks.append(check_disk([node.root, *(path.parent for path in stores)]))
    checks.append(check_clock([node.config, node.certificate, node.database]))
    return checks


def why_no_connection(root: str | Path, *, timeout: float = TIMEOUT) -> str:
    """Why a node does not reach its researcher, in one line; empty if nothing stands between.

    Args:
        root: folder of the node.
        timeout: seconds for each step of a connection.

    Raises: UsageError as `check_site`.
    """
    running = process_of(root)
    node = read_component(root, NODE, running.environment if running else None)
    troubles = [check.line for check in unhealthy(_check_connection(node, running, timeout=timeout))]
    if running is None:
        troubles.insert(0, f"this node does not run (`fedbiomed node -p {root} start`)")
    return "; ".join(troubles)


def proxy_in_the_way(root: str | Path) -> str:
    """The proxy through which a node would go to its researcher, in one line; empty without any. Nothing is tried.

    Args:
        root: folder of the node.

    Raises: UsageError as `check_site`.
    """
    running = process_of(root)
    environment = os.environ if running is None else running.environment
    node = read_component(root, NODE, environment)
    proxy = proxy_for(node.host, environment)
    if proxy is None:
        return ""
    return f"{proxy.setting} is used to reach {node.host}; `fedfactory site check {root}` says whether it is in the way"


def process_of(root: str | Path) -> RunningNode | None:
    """The process that runs the node at `root`; None if it does not run."""
    folder = Path(root).resolve()
    return next((node for node in running_nodes() if node.root == folder), None)


def _check_connection(node: Component, running: RunningNode | None, *, timeout: float) -> list[Check]:
    """The way to the researcher, in the environment of the node's process, or in this one if the node does not run."""
    return check_way(
        node.host,
        node.port,
        os.environ if running is None else running.environment,
        config=str(node.config),
        registered=_registered_certificates(node),
        started=None if running is None else running.started,
        timeout=timeout,
    )


def _registered_certificates(node: Component) -> list[str]:
    """SHA-256 of the researchers' certificates that an administrator has registered (`fedbiomed ... certificate`)."""
    try:
        rows = node.records(CERTIFICATE_TABLE)
    except (OSError, ValueError):  # reported by `check_site`
        return []
    found = []
    for row in rows:
        if row.get("component") == RESEARCHER:
            try:
                found.append(Certificate.read(str(row.get("certificate")).encode()).fingerprint)
            except ValueError:
                continue
    return found


def _check_approval(node: Component) -> Check:
    if not (problem := approval_problem(node)):
        return Check(name="approval", found="on: training plans wait for `fedfactory site approve`")
    right = "`allow_default_training_plans = False`" if node.is_on(APPROVAL) else "`training_plan_approval = True`"
    return Check(
        name="approval",
        state=PROBLEM,
        found=problem,
        remedy=f"set {right} below [security] in {node.config} and restart the node",
    )


def _our_stores(rows: list[dict[str, object]]) -> dict[Path, SiteFacts | None]:
    """Folder of each registered slice store to what was announced of it, None if that cannot be read."""
    return {
        Path(str(row.get("path"))): read_facts(str(row.get("description")))
        for row in rows
        if str(row.get("description")).startswith(INTRODUCTION)
    }


def _check_stores(root: str | Path, stores: Mapping[Path, SiteFacts | None], *, others: int) -> list[Check]:
    """One check for each store, with those that belong to it by the administrator's choices."""
    apart = f"; {others} registered data sets are not of fedfactory, and were not looked at" if others else ""
    if not stores:
        remedy = f"fedfactory site add {root} --store STORE --tag TAG"
        return [Check(name="stores", state=WARNING, found=f"none is registered{apart}", remedy=remedy)]
    return [_check_store(path, facts, apart) for path, facts in stores.items()]


def _check_store(path: Path, facts: SiteFacts | None, apart: str) -> Check:
    try:
        store = SliceStore(path)
        store.verify()
        choices = SiteChoices.load(store)
        further = [folder for folder in (choices.public, *choices.others.values()) if folder]
        for folder in further:
            SliceStore(folder).verify()
        announced = json.loads(json.dumps(store_facts(store, choices).to_dict()))
    except (FedFactoryError, OSError) as error:
        return Check(name="stores", state=PROBLEM, found=str(error), remedy="then register the store again")
    # The versions have a line of their own.
    if facts is None or {**announced, "version": ""} != {**facts.to_dict(), "version": ""}:
        found, remedy = f"{path} is not as it was registered", "`fedfactory site add` registers it again"
        return Check(name="stores", state=PROBLEM, found=found, remedy=remedy)
    beside = f" and {len(further)} beside it" if further else ""
    found = f"{path}{beside}: {len(store.cases)} cases, all checksums as prepared{apart}"
    return Check(name="stores", found=found)


def _check_ledger(root: Path) -> Check:
    """Whether the record of what left the site is whole."""
    ledger = Ledger(root)
    if not ledger.exists():
        return Check(name="ledger", found="none yet: nothing was asked of this node")
    try:
        checked = ledger.verify()
    except OSError as error:
        remedy = "run this as the node's user"
        return Check(name="ledger", state=PROBLEM, found=f"it cannot be read ({error})", remedy=remedy)
    if checked.problem:
        remedy = f"`fedfactory site ledger {root}` shows more; find out who changed it"
        return Check(name="ledger", state=PROBLEM, found=checked.problem, remedy=remedy)
    return Check(name="ledger", found=f"{checked.entries} entries, the chain is whole")


def _check_guard(environment: Mapping[str, str]) -> Check:
    """Whether the node's process is guarded when it starts, see `fedfactory.node.protection.autoload`."""
    if environment.get(AUTOLOAD, "1") != "1":
        found = f"{AUTOLOAD} is {environment[AUTOLOAD]}: the node starts without it, and refuses all plans"
        return Check(name="guard", state=PROBLEM, found=found, remedy="take that setting out and start the node again")
    if not any(point.value.startswith(GUARD) for point in entry_points(group="torch.backends")):
        found = "fedfactory is not installed as a package here: nodes start without it, and refuse all plans"
        return Check(name="guard", state=PROBLEM, found=found, remedy="install fedfactory beside Fed-BioMed with pip")
    return Check(name="guard", found="on: rounds are held against the policy, and the ledger lists what leaves")
