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
from ..node.connection.component import RESEARCHER, require_component
from .connection_check import missing_nodes, server_problem
from .node_selection import Federation
from .round_records import ReceivedUpdate
from .run_state import PAIR, Stage

if TYPE_CHECKING:
    import numpy as np
    from fedbiomed.researcher.federated_workflows import Experiment
    from fedbiomed.researcher.secagg import SecureAggregation

DEBUG_VARIABLE = "FBM_DEBUG"
ROOT_VARIABLE = "FBM_RESEARCHER_COMPONENT_ROOT"
POLL_SECONDS = 0.5  # between two searches for nodes
MAX_REASON = 400  # characters of a framework error that are shown


def use_researcher(root: str | Path) -> None:
    """Choose the researcher component of this process, which Fed-BioMed opens when it is first imported.

    Args:
        root: folder of the component.

    Raises: UsageError if there is no such component, or if this process has opened another component.
    """
    root = require_component(root, RESEARCHER)
    opened = os.environ.get(ROOT_VARIABLE)
    if "fedbiomed.researcher.config" in sys.modules and opened != str(root):
        raise UsageError(f"researcher is {root}, but this process has opened {opened}; use a new process")
    os.environ[ROOT_VARIABLE] = str(root)
    import fedbiomed.researcher.config  # noqa: F401 - opens the component, and sets the console to INFO
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR", "CONSOLE")  # the terminal belongs to the progress bar; errors still show


def wait_for_nodes(count: int, timeout: float, tag: str) -> list[str]:
    """Start the researcher's server and wait for nodes.

    Args:
        count: number of nodes to wait for.
        timeout: seconds to wait.
        tag: tag under which the sites registered their data.

    Returns: ids of the nodes that offer data with the tag.
    Raises: FederationError if the server cannot listen or if too few nodes answer in time; it names what is at fault:
        certificate, key, port, proxy, or data that are not registered.
    """
    from fedbiomed.common.exceptions import FedbiomedError  # opens the component, see use_researcher
    from fedbiomed.researcher.config import config
    from fedbiomed.researcher.requests import Requests

    host, port = config.get("server", "host"), config.get("server", "port")
    if problem := server_problem(config.root):
        raise FederationError(f"the researcher cannot listen on {host}:{port}: {problem}")
    try:
        requests = Requests(config)
    except FedbiomedError as error:
        raise FederationError(
            f"the researcher cannot listen on {host}:{port} ({_reason(error)}); another command of this researcher "
            "may be running: wait for its end"
        ) from None
    deadline = time.monotonic() + timeout
    while True:
        nodes = [node for node, data in requests.search([tag]).items() if data] if requests.ping_nodes() else []
        if len(nodes) >= count:
            return nodes
        if time.monotonic() > deadline:
            offer = f"{len(nodes)} of {count} nodes offer data with tag '{tag}' on {host}:{port} after {timeout:.0f} s"
            raise FederationError(f"{offer}; {missing_nodes(requests, count, tag, config.root)}")
        time.sleep(POLL_SECONDS)


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
    """A Fed-BioMed `Experiment` that trains the data factory, to be used with `run()`, breakpoints and so on.

    Args:
        config: networks and domains; every node's store must fit it.
        tag: tag under which the sites registered their data.
        rounds: how often the sites' generators are averaged.
        updates_per_round: local updates between two averagings; with short rounds, labels carry over better.
        nodes: ids of the nodes that may take part; None: all nodes with such data.
        nodes_per_round: number of nodes that train in a round, drawn at random; None: all.
        min_nodes: answers without which a round does not count; at least 2 with `secagg`.
        weighting: "samples" or "uniform" (published), see `Federation`.
        transport: "float32", "float16" or "int8", see `Federation`.
        secagg: whether the sites' weights are summed under encryption, see `Federation`.
        seed: seed of the initial weights and of every site's draws.
        experiment_options: further arguments of `Experiment`, such as `save_breakpoints=True`.

    Raises: FederationError if no node offers data with `tag`; UsageError for settings that make no sense.
    """
    from ..node.site_facts import read_facts
    from .aggregator import FactoryAverage
    from .strategy import FactoryStrategy

    Stage(rounds, updates_per_round)  # checks both numbers
    Federation(  # checks the other settings
        tag=tag, min_nodes=min_nodes, nodes_per_round=nodes_per_round, weighting=weighting, transport=transport,
        secagg=secagg,
    )  # fmt: skip
    if nodes_per_round is not None and nodes_per_round < min_nodes:
        raise UsageError(f"nodes_per_round is {nodes_per_round}; choose min_nodes ({min_nodes}) or more")
    strategy = FactoryStrategy(
        nodes_per_round, min_nodes, weighting=weighting, seed=seed, required=("domain",), complete=secagg
    )
    experiment = make_experiment(
        tag,
        training_plan_class=_plan_for(config),
        nodes=nodes,
        node_selection_strategy=strategy,
        secagg=_encrypted_sums() if secagg else False,
        model_args={"factory": config.to_dict(), "seed": seed, "transport": transport},
        training_args={
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": updates_per_round,
            "random_seed": seed,
            "share_persistent_buffers": False,  # the fixed noise is made from the seed, equal at every site
        },
        aggregator=FactoryAverage(config, updates_per_round),
        round_limit=rounds,
        retain_full_history=False,
        **experiment_options,
    )
    if secagg:
        for node, text in descriptions_of(tag).items():
            if facts := read_facts(text):
                experiment.aggregator().sizes[node] = (facts.domain, facts.slices)
    return experiment


def make_experiment(tag: str, *, nodes: list[str] | None = None, **options: Any) -> Experiment:
    """A Fed-BioMed `Experiment` on the data with a tag.

    Args:
        tag: tag under which the sites registered their data.
        nodes: ids of the nodes that take part, are asked for approval and receive anything; None: all with such data.
        options: further arguments of `Experiment`.

    Raises: FederationError if it cannot be set up or if no connected node offers such data.
    """
    from fedbiomed.researcher.config import config  # opens the component
    from fedbiomed.researcher.federated_workflows import Experiment
    from fedbiomed.researcher.requests import Requests

    def build() -> Experiment:
        experiment = Experiment(tags=[tag], nodes=nodes, **options)
        if nodes is not None:  # the framework looked for data before it knew the nodes, and would ask all for approval
            experiment.set_training_data(None, from_tags=True)
        return experiment

    experiment = guarded(build, "the experiment could not be set up")
    if not experiment.filtered_federation_nodes():
        raise FederationError(
            f"no connected node offers data with tag '{tag}'; {missing_nodes(Requests(config), 1, tag, config.root)}"
        )
    attach(experiment)
    return experiment


def load_experiment(breakpoint_folder: str | Path, rounds: int) -> Experiment:
    """An experiment as it was when a breakpoint was saved.

    Args:
        breakpoint_folder: folder that Fed-BioMed wrote.
        rounds: number of rounds of the whole run.

    Raises: FederationError if the breakpoint cannot be loaded.
    """
    from fedbiomed.researcher.federated_workflows import Experiment

    experiment = guarded(lambda: Experiment.load_breakpoint(str(breakpoint_folder)), "the run could not be resumed")

    def restore_settings_missing_from_breakpoints() -> None:
        experiment.set_round_limit(rounds)
        experiment.set_tensorboard(True)
        experiment.set_retain_full_history(False)
        experiment.set_save_breakpoints(True)

    guarded(restore_settings_missing_from_breakpoints, "the run could not be resumed")
    attach(experiment)
    return experiment


def attach(experiment: Experiment) -> None:
    """Let the strategy of an experiment know which nodes are connected, and what they announced."""
    from ..node.site_facts import read_facts
    from .fedbiomed_hooks import connected_nodes
    from .reply_checks import Announced

    strategy, data = experiment.strategy(), experiment.training_data().data()
    strategy.connected = connected_nodes
    facts = {node: read_facts(str(entry.get("description"))) for node, entry in data.items()}
    strategy.announced = {node: Announced.by(known) for node, known in facts.items() if known is not None}


def descriptions_of(tag: str) -> dict[str, str]:
    """Node id to the description under which the node's data with this tag are registered."""
    from fedbiomed.researcher.config import config
    from fedbiomed.researcher.requests import Requests

    return {node: data[0]["description"] for node, data in Requests(config).search([tag]).items() if data}


def change_stage(experiment: Experiment, config: FactoryConfig, updates_per_round: int, *, seed: int) -> None:
    """Continue with other loss weights and another round length.

    The training plan, its approval and the state that sites store between rounds remain as they are.

    Args:
        experiment: the experiment after the last round of the stage before.
        config: configuration of the new stage.
        updates_per_round: local updates between two averagings.
        seed: seed of the run.

    Raises: FederationError if the framework refuses.
    """

    def change() -> None:
        arguments = {**experiment.model_args(), "factory": config.to_dict(), "seed": seed}
        experiment.set_model_args(arguments, keep_weights=True)
        arguments = experiment.training_args()
        experiment.set_training_args({**arguments, "num_updates": updates_per_round})

    guarded(change, "the next stage could not be set up")
    experiment.aggregator().config, experiment.aggregator().updates_per_round = config, updates_per_round
    experiment.strategy().forget_changes()


def request_approval(experiment: Experiment, timeout: float) -> None:
    """Send the training plan to the nodes that have not approved it yet, and wait for the approval.

    Nodes that need no approval are not waited for.

    Args:
        experiment: the experiment with the training plan.
        timeout: seconds to wait for the sites' administrators.

    Raises: FederationError that names the nodes without approval and what to do there.
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


def run_round(experiment: Experiment, timeout: float | None = None) -> dict[str, ReceivedUpdate]:
    """Run one round.

    Args:
        experiment: the experiment, with an approved training plan.
        timeout: seconds after which a round ends without the sites that have not answered; None waits for all that
            are connected.

    Returns: node id to the site's update, for all sites whose answers count.
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
        node: ReceivedUpdate.from_dict(
            {
                **reply["optimizer_args"],
                "node_name": reply.get("node_name") or node,
                "num_bytes": reply["params"].num_bytes if isinstance(reply["params"], StoredUpdate) else None,
            }
        )
        for node, reply in replies.items()
    }


def prune(experiment: Experiment, keep: str | None) -> None:
    """Delete the framework's files of earlier rounds, which no run will be resumed from.

    Args:
        experiment: the experiment; the sites' weights of rounds before the last are deleted.
        keep: breakpoint folder of the last round; earlier breakpoints are deleted. None: no breakpoint is deleted.
    """
    folder, current = Path(experiment.experimentation_path()), experiment.round_current() - 1
    for path in folder.glob("breakpoint_*"):
        if keep is not None and path.name < Path(keep).name:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("params_round*_*.mpk"):
        if int(path.name.removeprefix("params_round").split("_")[0]) < current:
            path.unlink(missing_ok=True)


def show_preview(experiment: Experiment, picture: np.ndarray, pairs: dict[str, float], *, number: int) -> None:
    """Write a preview and the shared anatomy for TensorBoard, beside the sites' curves.

    Args:
        experiment: the experiment, with its TensorBoard folder.
        picture: (H, W, 3) in [0, 1].
        pairs: names of two domains, see `SharedAnatomy`, to their score.
        number: number of the round, counted from 1.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(experiment.tensorboard_results_path) / "researcher")) as writer:
        writer.add_image(
            "preview", (picture + 1).clip(0, 2) / 2, number, dataformats="HW" if picture.ndim == 2 else "HWC"
        )
        for pair, score in pairs.items():
            writer.add_scalar(f"shared anatomy/{pair.replace(PAIR, ' and ')}", score, number)


def _plan_for(config: FactoryConfig) -> type:
    """The plan that states what leaves the sites with this configuration."""
    from .plans.factory_plans import FactoryPlan, LabelledFactoryPlan, SharedDiscriminatorPlan

    if config.classes:
        return LabelledFactoryPlan
    return SharedDiscriminatorPlan if config.discriminator == "shared" else FactoryPlan


def _encrypted_sums() -> SecureAggregation:
    from fedbiomed.researcher.secagg import SecureAggregation, SecureAggregationSchemes

    from ..node.fedbiomed_hooks import SECAGG_RANGE

    return SecureAggregation(scheme=SecureAggregationSchemes.LOM, clipping_range=SECAGG_RANGE)


def _not_approved(experiment: Experiment) -> list[str]:
    """Names of the experiment's nodes that need an approval of the plan and have not given it."""
    replies, members = experiment.check_training_plan_status(), experiment.filtered_federation_nodes()
    return [  # the framework reports on every node with such data, also on nodes that take no part
        reply.node_name or reply.node_id
        for reply in replies.values()
        if reply.node_id in members and reply.approval_obligation and reply.status != "Approved"
    ]


def guarded(call: Callable[[], Any], what: str) -> Any:
    """Call one of Fed-BioMed's experiment methods and turn its failure into an error of one line.

    Fed-BioMed ends the whole program on any error unless its debug mode is set, so the mode is set for the call.

    Args:
        call: the method with its arguments.
        what: what failed, for the error's text.

    Returns: what `call` returns.
    Raises: QuorumError if too few sites took part, FederationError for any other failure.
    """
    debug_mode = os.environ.get(DEBUG_VARIABLE)
    os.environ[DEBUG_VARIABLE] = "1"
    try:
        return call()
    except FedFactoryError:
        raise
    except Exception as error:
        kind = QuorumError if type(error).__name__ == "FedbiomedStrategyError" else FederationError
        raise kind(f"{what}: {_reason(error)}") from None
    finally:
        if debug_mode is None:
            del os.environ[DEBUG_VARIABLE]
        else:
            os.environ[DEBUG_VARIABLE] = debug_mode


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
