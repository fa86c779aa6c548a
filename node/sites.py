"""What a site's administrator does: register a store with the node, review a training plan, approve it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ..common.files import sha256_of_text, taken_from_others
from ..common.names import check_label
from ..errors import FederationError, FedFactoryError, UsageError
from .connection.component import NODE, read_component
from .fedbiomed_hooks import open_node, pending_plans, register_dataset
from .ledger.ledger import Ledger
from .plan_source import refuse_disguised
from .policy.approval import approval_problem, refuse_without_approval, turn_approval_on
from .policy.policy import Policy, policy_file
from .protection.package_digest import digest_of_all, package_fingerprint
from .site_check import process_of, why_no_connection
from .site_choices import SiteChoices
from .site_facts import description_of, store_facts
from .store.slice_store import SliceStore

MIN_TAG_LENGTH = 3  # characters; Fed-BioMed's own limit
POLL_INTERVAL = 0.5  # seconds


def add_store(
    node_dir: str | Path,
    store: str | Path,
    tag: str,
    *,
    choices: SiteChoices | None = None,
) -> bool:
    """Register a slice store with the node at `node_dir`; a running node sees it at once.

    A researcher who searches for data sees the tag and a description: domain, version, slice format, number of label
    values, and number of training slices per kind of label and with pseudo-labels. No path, no case name. If the store
    has this tag already, its description is replaced.

    The node is made to run approved plans only, and gets a policy if it has none.

    Args:
        node_dir: folder of the Fed-BioMed node.
        store: folder of the slice store.
        tag: by which the researcher finds the data.
        choices: for federated segmentation; they replace those of an earlier registration.

    Returns: whether the node would have run plans without approval until now; then it must be restarted if it runs.
    Raises: UsageError or StoreError if node or store are not usable, if the environment turns approval off,
        if its policy is wrong, if the store has changed since it was prepared, or if other data have the tag.
    """
    opened = SliceStore(store)
    opened.verify()
    choices = choices or SiteChoices()
    choices.check(opened)
    if len(tag) < MIN_TAG_LENGTH:
        raise UsageError(f"tag is '{tag}'; choose one of at least {MIN_TAG_LENGTH} characters")
    if "," in check_label("tag", tag):
        raise UsageError(f"tag is '{tag}'; choose one without a comma")
    was_open = _protect(node_dir)
    node = open_node(node_dir)
    try:
        register_dataset(
            node,
            name=f"fedfactory {opened.domain}",
            tag=tag,
            description=description_of(store_facts(opened, choices)),
            path=str(opened.path.resolve()),
        )
    except Exception as error:  # the framework raises many kinds here, each with a readable text
        raise UsageError(
            f"{node_dir}: the node refused the store ({error}); correct that and register it again"
        ) from None
    choices.save(opened)
    # The folder's own permissions guard all that is in it: configuration, key, log files, and states between rounds.
    os.chmod(node_dir, os.stat(node_dir).st_mode & ~taken_from_others())
    return was_open


def _protect(node_dir: str | Path) -> bool:
    """Make a node run approved plans only and have a policy. Returns and raises as `add_store`."""
    was_open = bool(approval_problem(read_component(node_dir, NODE, {})))
    if was_open:
        turn_approval_on(node_dir)
    running = process_of(node_dir)
    for environment in (None, *([running.environment] if running else [])):  # of this process, and of the node's
        refuse_without_approval(node_dir, environment)
    if policy_file(node_dir).exists():
        Policy.load(node_dir)
    else:
        Policy().save(node_dir)
    return was_open


def approve_plans(node_dir: str | Path, *, confirm: Callable[[str, str], bool], wait: float = 0) -> list[str]:
    """Approve the training plans that wait at a node.

    Args:
        node_dir: folder of the Fed-BioMed node.
        confirm: called with name and source text of each plan; True approves.
        wait: seconds to wait for a plan to arrive.

    Returns: names of the approved plans.
    Raises: FederationError if none waits; it says what stands between node and researcher, if anything does.
        UsageError if a plan may run as something else than it shows, see `refuse_disguised`.
    """
    node = open_node(node_dir)
    deadline = time.monotonic() + wait
    while not (plans := pending_plans(node)):
        if time.monotonic() >= deadline:
            raise FederationError(_why_no_plan(node_dir))
        time.sleep(POLL_INTERVAL)
    for plan in plans:
        refuse_disguised(plan.name, plan.source)
    approved, ledger, package = [], Ledger(Path(node_dir)), digest_of_all(package_fingerprint())
    for plan in plans:
        if confirm(plan.name, plan.source):
            node.tp_security_manager.approve_training_plan(plan.plan_id)
            plan_sha256 = sha256_of_text(plan.source)
            ledger.append("approved", plan=plan.name, plan_sha256=plan_sha256, package_sha256=package)
            approved.append(plan.name)
    return approved


def _why_no_plan(node_dir: str | Path) -> str:
    try:
        trouble = why_no_connection(node_dir)
    except FedFactoryError:  # the node was opened, so only its environment can be at fault
        trouble = ""
    if trouble:
        return (
            f"{node_dir}: no training plan waits for approval, and the way to the researcher is not free: {trouble}; "
            f"`fedfactory site check {node_dir}` shows more"
        )
    return f"{node_dir}: no training plan waits for approval; start the training at the researcher first"
