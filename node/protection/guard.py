"""The guard of a Fed-BioMed 6.4 node: all that is changed in the framework's own node, in one place.

A plan is approved by the exact bytes of its source and the digest of the installed package, where the framework hashes
source without comments. An approval therefore means nothing to a node without the guard, which refuses every plan.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbiomed.common.constants import ErrorNumbers
from fedbiomed.common.exceptions import FedbiomedTrainingPlanSecurityManagerError
from fedbiomed.common.logger import logger
from fedbiomed.common.message import FARequest, ListReply, Message, PreprocRequest, SearchReply
from fedbiomed.node.history_monitor import HistoryMonitor
from fedbiomed.node.round import Round
from fedbiomed.node.training_plan_security_manager import TrainingPlanSecurityManager

from ...common.files import sha256_of_text
from ...errors import UsageError
from ..plan_source import refuse_disguised
from ..policy.policy import POLICY_FILE
from ..site_facts import INTRODUCTION, read_facts
from .numbers import leaving_numbers
from .round_guard import REFUSED, Asked, RefusedError, SiteGuard

if TYPE_CHECKING:
    from fedbiomed.node.node import Node

_guards: dict[Path, SiteGuard] = {}
_installed = False


class _DisguisedPlanError(FedbiomedTrainingPlanSecurityManagerError, RefusedError):
    """An error that the framework's own callers expect."""


def guard_of(root: str | Path) -> SiteGuard | None:
    """The guard of the node at `root`; None for a node without a policy, which has no slice store of this package."""
    root = Path(root).resolve()
    if not (root / POLICY_FILE).is_file():
        return None
    if root not in _guards:
        _guards[root] = SiteGuard(root)
    return _guards[root]


def is_installed() -> bool:
    """Whether the nodes of this process are guarded."""
    return _installed


def install() -> None:
    """Guard the nodes of this process. It may be called more than once."""
    global _installed  # noqa: PLW0603
    if _installed:
        return
    _installed = True
    from fedbiomed.node.node import Node  # only now: its import calls this function, see `autoload`

    _replace(TrainingPlanSecurityManager, "__init__", _remember_root)
    _replace(TrainingPlanSecurityManager, "_create_hash", _hash_of_bytes)
    _replace(Round, "run_model_training", _guarded_round)
    _replace(Node, "__init__", _watch_answers)
    _replace(Node, "add_task", _refuse_other_tasks)


def _replace(owner: type, name: str, wrapper: Any) -> None:
    """Put a function between a method of the framework and its callers; it gets the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda self, *args, **kw: wrapper(original, self, *args, **kw)))


def _remember_root(original: Any, manager: TrainingPlanSecurityManager, db: str, *args: Any, **kw: Any) -> None:
    manager.node_root = Path(db).parent.parent
    original(manager, db, *args, **kw)


def _hash_of_bytes(
    original: Any, manager: TrainingPlanSecurityManager, source: str, from_string: bool = False
) -> tuple[str, str, str]:
    """Hash, algorithm and source of a plan, see the text of this module."""
    guard = guard_of(manager.node_root)
    if guard is not None and from_string:
        try:
            refuse_disguised("that was sent", source)
        except UsageError as error:
            guard.ledger.append("refused", plan_sha256=sha256_of_text(source), reasons=[str(error)])
            raise _DisguisedPlanError(f"{ErrorNumbers.FB606.value}: {REFUSED}") from None
    digest, algorithm, text = original(manager, source, from_string)
    if guard is not None:
        digest = sha256_of_text(f"fedfactory {guard.package}\n{text}")
    return digest, algorithm, text


def _guarded_round(original: Any, framework_round: Round, *args: Any, **kw: Any) -> Any:
    guard = guard_of(framework_round._dir)
    entry = framework_round.dataset_entry
    if guard is None or not str(entry.get("description")).startswith(INTRODUCTION):
        return original(framework_round, *args, **kw)  # data of others, of which this package knows nothing
    monitor = framework_round.history_monitor
    if isinstance(monitor, HistoryMonitor):
        framework_round.history_monitor = _GatedMonitor(monitor, guard)
    facts = read_facts(str(entry.get("description")))
    asked = Asked(
        researcher=str(framework_round.researcher_id),
        experiment=framework_round.experiment_id,
        domain=facts.domain if facts is not None else "",
        state=framework_round._node_state_manager.previous_state_id,
        plan_class=str(framework_round.training_plan_class),
        plan=str(framework_round.training_plan_source),
        training=bool(framework_round.training),
        model_args=framework_round.model_arguments,
        training_args=framework_round.training_arguments.dict(),
        aggregator_args=framework_round.aggregator_args or {},
        secure_aggregation=bool(kw.get("secagg_arguments")),
        approval=bool(kw.get("tp_approval")),
        store=Path(str(entry.get("path"))),
        node=str(framework_round._node_id),
        database=Path(framework_round._db),
    )
    return guard.run(
        asked,
        lambda: original(framework_round, *args, **kw),
        lambda text: framework_round._send_round_reply(success=False, message=text),
    )


class _GatedMonitor:
    """Passes on those scalars for the researcher's live view that may leave the site."""

    def __init__(self, monitor: HistoryMonitor, guard: SiteGuard) -> None:
        self._monitor, self._guard = monitor, guard

    def add_scalar(self, metric: dict[str, float], *args: Any, **kw: Any) -> None:
        kept, _ = leaving_numbers(metric, self._guard.policy)
        if kept:
            self._monitor.add_scalar(kept, *args, **kw)


def _watch_answers(original: Any, node: Node, config: Any, *args: Any, **kw: Any) -> None:
    """Write into the ledger which descriptions of data sets a node gives to whom.

    An answer that was given before is not written again while the node runs.
    """
    original(node, config, *args, **kw)
    send, told = node._grpc_client.send, set()

    def watched(message: Message, broadcast: bool = False) -> None:
        guard = guard_of(config.root)
        if guard is not None and isinstance(message, (SearchReply, ListReply)) and message.databases:
            told_now = (message.researcher_id, sha256_of_text(repr(message.databases)))
            if told_now not in told:
                told.add(told_now)
                described = [str(data.get("description"))[:1000] for data in message.databases]
                request = "search" if isinstance(message, SearchReply) else "list"
                guard.ledger.append(
                    "answered", researcher=message.researcher_id, request=request, descriptions=described
                )
        send(message, broadcast)

    node._grpc_client.send = watched


def _refuse_other_tasks(original: Any, node: Node, task: Any) -> None:
    """Refuse the framework's statistics and preprocessing of data sets, unless the policy allows them."""
    guard = guard_of(node.config.root)
    for kind, allowed in ((FARequest, "allow_federated_analytics"), (PreprocRequest, "allow_preprocessing")):
        if guard is not None and isinstance(task, kind) and not getattr(guard.policy, allowed):
            guard.ledger.append(
                "refused", researcher=task.researcher_id, experiment=task.experiment_id, reasons=[f"{allowed} is off"]
            )
            logger.info(f"fedfactory: {allowed} is off in this node's policy")
            node.send_error(extra_msg=REFUSED, researcher_id=task.researcher_id, request_id=task.request_id)
            return
    original(node, task)
