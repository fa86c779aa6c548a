"""Phase one as an ordinary Fed-BioMed experiment."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FederationError, FedFactoryError, QuorumError, UsageError
from ..generative.config import FactoryConfig

if TYPE_CHECKING:
    import numpy as np
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
    import fedbiomed.researcher.config  # noqa: F401 - opens the component, and sets the console to INFO
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR", "CONSOLE")  # the terminal belongs to the progress bar; errors still show


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
    nodes: list[str] | None = None,
    nodes_per_round: int | None = None,
    min_nodes: int = 1,
    weighting: str = "samples",
    transport: str = "float32",
    secagg: bool = False,
    seed: int = 0,
    **experiment_options: Any,
) -> Experiment:
    """A Fed-BioMed `Experiment` that trains the data factory; go on with `run()`, breakpoints and the rest.

    Args:
        config: networks and domains; every node's store must fit it.
        tag: of the nodes' data sets.
        rounds: how often the sites' generators are averaged.
        updates_per_round: local updates between two averagings; short rounds carry labels over better.
        nodes: ids of those that may take part; default: all with such data.
        nodes_per_round: how many a round asks, drawn at random; default: all.
        min_nodes: answers without which a round does not count.
        weighting: "samples" or "uniform" (published).
        transport: "float32", or "float16" for changes in half precision on the way from the sites.
        secagg: sum the sites' weights encrypted, so that the researcher never sees one site's.
        seed: of initial weights and of every site's draws.
        experiment_options: further arguments of `Experiment`, such as `save_breakpoints=True`.

    Raises: FederationError if no node offers data with `tag`; UsageError for settings that make no sense.
    """
    from fedbiomed.researcher.federated_workflows import Experiment  # opens the component
    from fedbiomed.researcher.secagg import SecureAggregation, SecureAggregationSchemes

    from ..node.fedbiomed_hooks import SECAGG_RANGE
    from ..node.plans.transport import TRANSPORTS
    from ..node.site_facts import read_facts
    from .aggregator import FactoryAverage
    from .plans.factory_plans import FactoryPlan, SharedDiscriminatorPlan
    from .strategy import WEIGHTINGS, FactoryStrategy

    if rounds < 1 or updates_per_round < 1 or min_nodes < 1 or (nodes_per_round is not None and nodes_per_round < 1):
        raise UsageError("rounds, updates per round and numbers of nodes must be at least 1")
    if nodes_per_round is not None and nodes_per_round < min_nodes:
        raise UsageError(f"a round asks {nodes_per_round} nodes but needs {min_nodes}")
    if transport not in TRANSPORTS or weighting not in WEIGHTINGS:
        raise UsageError(f"transport is one of {', '.join(TRANSPORTS)}, weighting one of {', '.join(WEIGHTINGS)}")
    if secagg and (transport != "float32" or weighting != "samples"):
        raise UsageError("encrypted sums are of all values and weighted by samples; leave transport and weighting out")
    if secagg:
        min_nodes = max(min_nodes, 2)  # the sum of one is no secret
    scheme = SecureAggregation(scheme=SecureAggregationSchemes.LOM, clipping_range=SECAGG_RANGE) if secagg else False
    options = {
        "tags": [tag],
        "training_plan_class": SharedDiscriminatorPlan if config.discriminator == "shared" else FactoryPlan,
        "nodes": nodes,
        "node_selection_strategy": FactoryStrategy(nodes_per_round, min_nodes, weighting, seed, complete=secagg),
        "secagg": scheme,
        "model_args": {"factory": config.to_dict(), "seed": seed, "transport": transport},
        "training_args": {
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": updates_per_round,
            "random_seed": seed,
            "share_persistent_buffers": False,  # the fixed noise is made from the seed, equal at every site
        },
        "aggregator": FactoryAverage(config, updates_per_round),
        "round_limit": rounds,
        "retain_full_history": False,
        **experiment_options,
    }
    experiment = guarded(lambda: Experiment(**options), "the experiment could not be set up")
    if not experiment.filtered_federation_nodes():
        raise FederationError(f"no connected node offers data with tag '{tag}'")
    attach(experiment)
    if secagg:
        for node, text in descriptions_of(tag).items():
            if facts := read_facts(text):
                experiment.aggregator().sizes[node] = (facts.domain, facts.slices)
    return experiment


def load_experiment(breakpoint_folder: str | Path, rounds: int) -> Experiment:
    """An experiment as it was when a breakpoint was saved. Raises: FederationError if that cannot be loaded."""
    from fedbiomed.researcher.federated_workflows import Experiment

    experiment = guarded(lambda: Experiment.load_breakpoint(str(breakpoint_folder)), "the run could not be resumed")

    def settings_that_breakpoints_forget() -> None:
        experiment.set_round_limit(rounds)
        experiment.set_tensorboard(True)
        experiment.set_retain_full_history(False)
        experiment.set_save_breakpoints(True)

    guarded(settings_that_breakpoints_forget, "the run could not be resumed")
    attach(experiment)
    return experiment


def attach(experiment: Experiment) -> None:
    """Give the strategy sight of who is connected."""
    from .fedbiomed_hooks import connected_nodes

    experiment.strategy().connected = connected_nodes


def descriptions_of(tag: str) -> dict[str, str]:
    """By node, the description under which its data with this tag are registered."""
    from fedbiomed.researcher.config import config
    from fedbiomed.researcher.requests import Requests

    return {node: data[0]["description"] for node, data in Requests(config).search([tag]).items() if data}


def change_stage(experiment: Experiment, config: FactoryConfig, updates_per_round: int, seed: int) -> None:
    """Go on with other loss weights and rounds; the plan, its approval and what the sites keep stay as they are.

    Raises: FederationError if the framework refuses.
    """

    def change() -> None:
        arguments = {**experiment.model_args(), "factory": config.to_dict(), "seed": seed}
        experiment.set_model_args(arguments, keep_weights=True)
        arguments = experiment.training_args()
        experiment.set_training_args({**arguments, "num_updates": updates_per_round})

    guarded(change, "the next stage could not be set up")
    experiment.aggregator().config, experiment.aggregator().updates_per_round = config, updates_per_round
    experiment.strategy().forget_lengths()  # rounds of other length change weights by other amounts


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


def run_round(experiment: Experiment, timeout: float | None = None) -> dict[str, dict[str, Any]]:
    """One round.

    Args:
        timeout: seconds after which a round goes on without the sites that have not answered; None waits for all that
            are connected.

    Returns: by node, what it reported (`optimizer_args` of its reply) with `node_name` and `bytes` that it sent.
    Raises: QuorumError if too few sites answered, FederationError if the round failed otherwise.
    """
    from ..node.fedbiomed_hooks import use_fine_quantisation
    from .fedbiomed_hooks import StoredUpdate, surviving_rounds

    number = experiment.round_current()
    before = None
    if experiment.secagg.active:
        use_fine_quantisation()
        before = {name: tensor.clone() for name, tensor in experiment.training_plan().after_training_params().items()}
    with surviving_rounds(timeout):
        guarded(experiment.run_once, f"round {number + 1} failed")
    replies = experiment.training_replies()[number]
    experiment.aggregator().receive_replies(replies)
    if before is not None:  # the framework averages encrypted weights itself
        experiment.aggregator().follow(experiment.training_plan().after_training_params(), before, sites=len(replies))
    return {
        node: {
            **reply["optimizer_args"],
            "node_name": reply.get("node_name") or node,
            "bytes": reply["params"].num_bytes if isinstance(reply["params"], StoredUpdate) else None,
        }
        for node, reply in replies.items()
    }


def prune(experiment: Experiment, keep: str | None) -> None:
    """Delete the framework's files of rounds that no run will be resumed from: breakpoints before `keep`, and the
    sites' weights of earlier rounds."""
    folder, current = Path(experiment.experimentation_path()), experiment.round_current() - 1
    for path in folder.glob("breakpoint_*"):
        if keep is not None and path.name < Path(keep).name:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("params_round*_*.mpk"):
        if int(path.name.removeprefix("params_round").split("_")[0]) < current:
            path.unlink(missing_ok=True)


def show_preview(experiment: Experiment, picture: np.ndarray, pairs: dict[str, float], number: int) -> None:
    """A preview, (H, W) in [-1, 1], and shared anatomy by pair of domains for TensorBoard, beside the sites' curves."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(experiment.tensorboard_results_path) / "researcher")) as writer:
        writer.add_image("preview", (picture + 1).clip(0, 2) / 2, number, dataformats="HW")
        for pair, score in pairs.items():
            writer.add_scalar(f"shared anatomy/{pair.replace(' / ', ' and ')}", score, number)


def _not_approved(experiment: Experiment) -> list[str]:
    replies, asked = experiment.check_training_plan_status(), experiment.filtered_federation_nodes()
    return [  # the framework asks every node that has such data, whoever takes part
        reply.node_name or reply.node_id
        for reply in replies.values()
        if reply.node_id in asked and reply.approval_obligation and reply.status != "Approved"
    ]


def guarded(call: Callable[[], Any], what: str) -> Any:
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
        kind = QuorumError if type(error).__name__ == "FedbiomedStrategyError" else FederationError
        raise kind(f"{what}: {_reason(error)}") from None
    finally:
        if kept is None:
            del os.environ[DEBUG_VARIABLE]
        else:
            os.environ[DEBUG_VARIABLE] = kept


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
