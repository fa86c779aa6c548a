"""Phase one as an ordinary Fed-BioMed experiment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FederationError, FedFactoryError, UsageError
from ..generative.config import FactoryConfig

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

DEBUG_VARIABLE = "FBM_DEBUG"
ROOT_VARIABLE = "FBM_RESEARCHER_COMPONENT_ROOT"


def use_researcher(root: str | Path) -> None:
    """Choose the researcher component of this process. Fed-BioMed opens it when it is first imported.

    Raises: UsageError if there is no such component, or another one is open already.
    """
    root = Path(root).resolve()
    if not (root / "etc" / "config.ini").is_file():
        raise UsageError(
            f"{root}: no Fed-BioMed researcher here; make one with `fedbiomed component create -c researcher -p {root}`"
        )
    if "fedbiomed.researcher.config" in sys.modules and os.environ.get(ROOT_VARIABLE) != str(root):
        raise UsageError("Fed-BioMed is imported already with another researcher component; start a new process")
    os.environ[ROOT_VARIABLE] = str(root)
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR")  # the terminal belongs to the progress bar; errors still show


def wait_for_nodes(count: int, timeout: float, tag: str) -> list[str]:
    """Start the researcher's server and wait until `count` nodes offer data with `tag`; returns their ids.

    Raises: FederationError if the port is taken or too few nodes answer in time.
    """
    from fedbiomed.common.exceptions import FedbiomedError  # opens the component, see use_researcher
    from fedbiomed.researcher.config import config
    from fedbiomed.researcher.requests import Requests

    host, port = config.get("server", "host"), config.get("server", "port")
    try:
        requests = Requests(config)
    except FedbiomedError as error:
        raise FederationError(
            f"the researcher cannot listen on {host}:{port} ({_reason(error)}); is another experiment running, "
            "or the port taken by another program?"
        ) from None
    deadline = time.monotonic() + timeout
    while True:
        nodes = [node for node, data in requests.search([tag]).items() if data] if requests.ping_nodes() else []
        if len(nodes) >= count:
            return nodes
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {count} nodes offer data with tag '{tag}' on {host}:{port} after {timeout:.0f} s; "
                "start the nodes (`fedbiomed node -p NODE_DIR start`) and register data (`fedfactory site add`)"
            )
        time.sleep(0.5)


def factory_experiment(
    config: FactoryConfig,
    *,
    tag: str,
    rounds: int,
    updates_per_round: int = 10,
    seed: int = 0,
    **experiment_options: Any,
) -> Experiment:
    """A Fed-BioMed `Experiment` that trains the data factory; go on with `run()`, breakpoints and the rest.

    Args:
        config: networks and domains; every node's store must fit it.
        tag: of the nodes' data sets.
        rounds: how often the sites' generators are averaged.
        updates_per_round: local updates between two averagings; short rounds carry labels over better.
        seed: of initial weights and of every site's draws.
        experiment_options: further arguments of `Experiment`, such as `save_breakpoints=True`.

    Raises: FederationError if no node offers data with `tag`.
    """
    from fedbiomed.researcher.federated_workflows import Experiment  # opens the component

    from .aggregator import FactoryAverage
    from .wire_plan import FactoryPlan

    if rounds < 1 or updates_per_round < 1:
        raise UsageError("rounds and updates per round must be at least 1")
    options = {
        "tags": [tag],
        "training_plan_class": FactoryPlan,
        "model_args": {"factory": config.to_dict(), "seed": seed},
        "training_args": {
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": updates_per_round,
            "random_seed": seed,
        },
        "aggregator": FactoryAverage(config, updates_per_round),
        "round_limit": rounds,
        "retain_full_history": False,
        **experiment_options,
    }
    experiment = _guarded(lambda: Experiment(**options), "the experiment could not be set up")
    if not experiment.filtered_federation_nodes():
        raise FederationError(f"no connected node offers data with tag '{tag}'")
    return experiment


def change_stage(experiment: Experiment, config: FactoryConfig, updates_per_round: int, seed: int) -> None:
    """Go on with other loss weights and rounds; the plan, its approval and what the sites keep stay as they are.

    Raises: FederationError if the framework refuses.
    """

    def change() -> None:
        experiment.set_model_args({"factory": config.to_dict(), "seed": seed}, keep_weights=True)
        arguments = experiment.training_args()
        experiment.set_training_args({**arguments, "num_updates": updates_per_round})

    _guarded(change, "the next stage could not be set up")
    experiment.aggregator().config, experiment.aggregator().updates_per_round = config, updates_per_round


def request_approval(experiment: Experiment, timeout: float) -> None:
    """Make sure that every node which demands approval has approved the plan; ask, and wait, if not.

    Args:
        timeout: seconds to wait for the sites' administrators.

    Raises: FederationError that names the nodes and what to do there.
    """
    if not (missing := _not_approved(experiment)):
        return
    experiment.training_plan_approve(description="fedfactory: train the data factory's generator")
    deadline = time.monotonic() + timeout
    while missing := _not_approved(experiment):
        if time.monotonic() >= deadline:
            raise FederationError(
                f"the training plan is not approved at {', '.join(sorted(missing))}. It was sent there: each site "
                "reads and approves it with `fedfactory site approve NODE_DIR`; then run this command again"
            )
        time.sleep(1)


def run_round(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """One round. Returns what each site reported (`optimizer_args` of its reply), by domain.

    Raises: FederationError if the round failed.
    """
    number = experiment.round_current()
    _guarded(experiment.run_once, f"round {number} failed")
    replies = experiment.training_replies()[number]
    reports = [reply["optimizer_args"] for reply in replies.values()]
    return {report["domain"]: report for report in reports}


def _not_approved(experiment: Experiment) -> list[str]:
    replies = experiment.check_training_plan_status()
    return [
        reply.node_name or reply.node_id
        for reply in replies.values()
        if reply.approval_obligation and reply.status != "Approved"
    ]


def _guarded(call: Callable[[], Any], what: str) -> Any:
    """Run one of Fed-BioMed's experiment methods and turn its failure into one line.

    It ends the program on any error; only in its debug mode, asked for at each call, do errors come through.
    """
    kept = os.environ.get(DEBUG_VARIABLE)
    os.environ[DEBUG_VARIABLE] = "1"
    try:
        return call()
    except FedFactoryError:
        raise
    except Exception as error:
        raise FederationError(f"{what}: {_reason(error)}") from None
    finally:
        if kept is None:
            del os.environ[DEBUG_VARIABLE]
        else:
            os.environ[DEBUG_VARIABLE] = kept


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
