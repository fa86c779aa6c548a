"""Federated segmentation from the first round to the table of scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adaptation.averaged_segmenter import AVERAGE as AVERAGE_KIND
from ..adaptation.methods.catalogue import describe
from ..adaptation.methods.interface.federated_method import FederatedMethod
from ..adaptation.methods.interface.method_config import MethodConfig
from ..adaptation.methods.interface.site_round import SiteContext
from ..adaptation.methods.registry import make_method
from ..adaptation.segmenter import Segmenter
from ..adaptation.segmenter_card import FEDERATED, FederatedDesign, SegmenterCard, TrainingFacts
from ..common.files import make_folder, refuse_existing, write_json
from ..common.json_text import read_json
from ..common.progress import track
from ..common.tables import write_table
from ..common.weights_file import write_weights
from ..errors import CheckpointError, UsageError
from ..node.site_choices import digest
from ..node.site_data.training_slices import site_slices
from ..node.site_facts import SiteFacts
from ..node.store.slice_store import SliceStore
from .experiment import (
    descriptions_of,
    guarded,
    load_experiment,
    make_experiment,
    prune,
    request_approval,
    run_round,
    use_researcher,
    wait_for_nodes,
)
from .node_selection import NodeSelection
from .private_runs import privacy_of, require_dense_labels, required_entries
from .round_records import ReceivedUpdate, RoundEvent
from .run_state import RESULTS, breakpoint_of
from .segmenting.run_progress import RunProgress, require_same_run, require_same_stores
from .segmenting.site_agreement import agreed_config, agreed_facts, require_labels

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

TABLE, WEIGHTS, SERVER = "scores.csv", "average.safetensors", "server.safetensors"
OWN, AVERAGE = "own_", "global_"  # prefixes of the scores of a site's own model and of the average
LABELS = "slices_"  # prefix of the numbers of training slices by kind of label


@dataclass
class SegmentationResult:
    """Scores and history of a run.

    Attributes:
        config: configuration of the method.
        sites: node id to the newest value of every number that the site reported, in whichever round it was; scores are
            those of one round.
        history: per round, node id to the site's update, with the site's `share` in the average.
        seconds: duration of all rounds.
        run: what is needed to resume the run; None for a result that no run goes on from.
        events: sites that did not count in a round, and why.
    """

    config: MethodConfig
    sites: dict[str, ReceivedUpdate]
    history: list[dict[str, ReceivedUpdate]] = field(default_factory=list)
    seconds: float = 0.0
    run: RunProgress | None = None
    events: list[RoundEvent] = field(default_factory=list)

    def add_round(self, site_updates: Mapping[str, ReceivedUpdate], *, trained: bool) -> None:
        """Add a round.

        Args:
            site_updates: node id to the site's update.
            trained: False for a round that only scored the average: the scores of the sites' own models and their
                losses remain those of the last round of training.
        """
        scores = (OWN, AVERAGE) if trained else (AVERAGE,)
        for node, update in site_updates.items():
            numbers = update.selected() if trained else update.selected(AVERAGE)
            # A score that is undefined now is not the one of an earlier round.
            kept = {name: value for name, value in self.sites[node].numbers.items() if not name.startswith(scores)}
            self.sites[node] = replace(update, numbers={**kept, **numbers})
        self.history.append(dict(site_updates))

    def to_dict(self) -> dict[str, object]:
        """JSON values, from which `load` reads the result."""
        return {
            "made_by": f"fedfactory {__version__}",
            "config": self.config.to_dict(),
            "sites": {node: site.to_dict() for node, site in self.sites.items()},
            "history": [{node: update.to_dict() for node, update in round_.items()} for round_ in self.history],
            "seconds": round(self.seconds, 1),
            "run": self.run.to_dict() if self.run is not None else None,
            "events": [event.to_dict() for event in self.events],
        }

    def save(self, out: Path) -> None:
        """Write the JSON file of the result into the folder of a run."""
        make_folder(out)
        write_json(out / RESULTS, self.to_dict())

    @classmethod
    def load(cls, out: Path) -> SegmentationResult:
        """The result in the folder of a run. Raises: CheckpointError if its file is damaged."""
        path = out / RESULTS
        try:
            values = read_json(path)
            rounds = [
                {node: ReceivedUpdate.from_dict(row) for node, row in round_.items()} for round_ in values["history"]
            ]
            sites = {node: ReceivedUpdate.from_dict(row) for node, row in values["sites"].items()}
            run = RunProgress.from_dict(values["run"]) if values.get("run") else None
            events = [RoundEvent(**event) for event in values.get("events", [])]
            return cls(MethodConfig.from_dict(values["config"]), sites, rounds, values["seconds"], run, events)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); choose a run of this version") from None


def train_method(
    method: str,
    out: str | Path,
    *,
    researcher: str | Path,
    nodes: NodeSelection,
    rounds: int,
    public: str | Path | None = None,
    resume: bool = False,
    report_round: Callable[[int, dict[str, ReceivedUpdate]], None] | None = None,
    **settings: Any,
) -> SegmentationResult:
    """Run a federated segmentation and write a folder with scores, history and weights of the average.

    Image size and number of classes are those of the sites' stores. After the last round the sites score the average
    once more. Every site stores its own segmenter and the average beside its slice store.

    Args:
        method: name of the method, see `fedfactory methods`.
        out: new folder, or with `resume` that of an interrupted run.
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes take part; `min_nodes` is 1 by default, and with `resume` that of the run.
        rounds: how often the sites' weights are averaged.
        public: folder of the slice store that all sites have too, for methods that need one.
        resume: whether to go on after the last finished round of the run in `out`. All other arguments must be those
            with which it began, apart from `min_nodes`, which holds for the rounds that are left; nodes of the run may
            be missing.
        report_round: called after every round with its number, counted from 1, and node id to the site's update.
        settings: further settings of `MethodConfig`.

    Returns: scores and history.
    Raises: UsageError, ConfigError, FederationError, see `run_round`; UsageError if there is nothing to resume.
    """
    out = Path(out)
    interrupted = interrupted_run(out) if resume else None
    if interrupted is None:
        refuse_existing(out)
    use_researcher(researcher)
    min_nodes = nodes.min_nodes or (1 if interrupted is None else interrupted.run.min_nodes)
    wait_for_nodes(min_nodes, nodes.node_timeout, nodes.tag)
    descriptions, shared = descriptions_of(nodes.tag), SliceStore(public) if public is not None else None
    description = describe(method)
    facts = agreed_facts(descriptions) if interrupted is None else interrupted.run.facts
    require_labels(description, facts)
    config = agreed_config(description, facts, shared, rounds=rounds, **settings)
    if config.private:
        require_dense_labels(facts)
    progress = RunProgress(
        tag=nodes.tag, min_nodes=min_nodes, facts=facts, public_digest=digest(shared) if shared is not None else None
    )
    if interrupted is None:
        sites = {node: ReceivedUpdate(node_name=node, domain=facts[node].domain) for node in sorted(facts)}
        result = SegmentationResult(config, sites, run=progress)
    else:
        result = interrupted
        require_same_run(out, (result.run, result.config), (progress, config))
        require_same_stores(out, result.run, descriptions)
        result.run.require_answers(min_nodes, round_done=len(result.history))
    experiment = _experiment_of(result, public=shared)
    request_approval(experiment, nodes.approval_timeout)
    result.save(out)
    _run_rounds(result, experiment, out, round_timeout=nodes.round_timeout, report_round=report_round)
    _write(result, experiment, out, public=shared)
    return result


def interrupted_run(out: Path) -> SegmentationResult:
    """The run in a folder that can be resumed.

    Raises: UsageError if there is no run or if it is finished, CheckpointError if its file is damaged.
    """
    if not (out / RESULTS).is_file():
        raise UsageError(f"{out}: no run to resume ({RESULTS} is missing); choose the folder of an interrupted run")
    result = SegmentationResult.load(out)
    if result.run is None or result.run.finished:
        raise UsageError(f"{out}: all {result.config.rounds} rounds are done, nothing to resume; start a new run")
    return result


def _experiment_of(result: SegmentationResult, *, public: SliceStore | None) -> Experiment:
    """The experiment of a run, as its last finished round left it."""
    config, run = result.config, result.run
    if run.breakpoint is None:
        method = make_method(config)
        return method_experiment(method, tag=run.tag, facts=run.facts, public=public, min_nodes=run.min_nodes)
    experiment = load_experiment(run.breakpoint, config.rounds + 1)
    experiment.strategy().require_answers(run.min_nodes)
    if public is not None:
        experiment.aggregator().method.public = site_slices(public, config.classes)
    return experiment


def _run_rounds(
    result: SegmentationResult,
    experiment: Experiment,
    out: Path,
    *,
    round_timeout: float | None,
    report_round: Callable[[int, dict[str, ReceivedUpdate]], None] | None,
) -> None:
    """Run the rounds that are left; after each of them the run can be resumed."""
    config, run, began = result.config, result.run, time.monotonic() - result.seconds
    last = config.rounds + experiment.aggregator().method.has_average
    for number in track(range(len(result.history) + 1, last + 1), f"training by {config.method}"):
        if number > config.rounds:  # no site has scored the last average yet
            change = partial(experiment.set_model_args, {"config": config.to_dict(), "train": False}, keep_weights=True)
            guarded(change, "the last average could not be scored")
        received, shares = run_round(experiment, round_timeout), experiment.aggregator().shares
        site_updates = {n: update.with_numbers({"share": shares.get(n, 0.0)}) for n, update in received.items()}
        result.add_round(site_updates, trained=number <= config.rounds)
        result.seconds, result.events = time.monotonic() - began, list(experiment.strategy().events)
        run.breakpoint = breakpoint_of(experiment)
        result.save(out)
        prune(experiment, keep=run.breakpoint)
        if report_round is not None:
            report_round(number, site_updates)


def method_experiment(
    method: FederatedMethod,
    *,
    tag: str,
    facts: dict[str, SiteFacts],
    public: SliceStore | None = None,
    min_nodes: int = 1,
) -> Experiment:
    """A Fed-BioMed `Experiment` that trains by a method.

    It has one round more than the configuration, in which the sites score the last average.

    Args:
        method: with its configuration.
        tag: tag under which the sites registered their data.
        facts: node id to the site's facts, see `agreed_facts`.
        public: slice store that all sites have too; None without one.
        min_nodes: answers without which a round does not count.

    Raises: FederationError if it cannot be set up.
    """
    from .method_aggregator import MethodAverage
    from .plans.segmentation_plans import PLANS
    from .strategy import FactoryStrategy

    config, nodes = method.config, sorted(facts)
    if public is not None:
        method.public = site_slices(public, config.classes)
    kinds = {node: known.label_kinds for node, known in facts.items()}
    average = MethodAverage(method, nodes, kinds, public_digest=digest(public) if public is not None else None)
    return make_experiment(
        tag,
        nodes=nodes,
        training_plan_class=PLANS[config.method],
        node_selection_strategy=FactoryStrategy(None, min_nodes, seed=config.seed, required=required_entries(config)),
        model_args={"config": config.to_dict(), "train": True},
        training_args={
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": config.updates,
            "random_seed": config.seed,
            "share_persistent_buffers": True,  # running statistics of batch norm
        },
        aggregator=average,
        round_limit=config.rounds + 1,
        retain_full_history=False,
        save_breakpoints=True,
        tensorboard=True,
    )


def score_headings(result: SegmentationResult) -> list[str]:
    """Headings of the columns of `score_table`."""
    scores = ["own Dice", "own HD95", "average Dice", "average HD95"]
    return ["site", "labels", *(["epsilon", "delta"] if result.config.private else scores)]


def score_table(result: SegmentationResult) -> list[list[str]]:
    """The scores as text, one row per site and a last row of means; no row of means with differential privacy.

    Returns: rows of name, kinds of labels, Dice and HD95 (mm; pixels of pictures) of the site's own model, Dice and
        HD95 of the average; with differential privacy of name, kinds of labels, epsilon and delta, since no scores
        leave a site. Empty where nothing was measured.
    """
    if result.config.private:
        numbers = [site.selected() for site in result.sites.values()]
        return [
            [
                site.node_name,
                _kinds_of(site),
                *(f"{row[name]:.4g}" if name in row else "" for name in ("epsilon", "delta")),
            ]
            for site, row in zip(result.sites.values(), numbers, strict=True)
        ]
    columns = [f"{which}{measure}" for which in (OWN, AVERAGE) for measure in ("dice", "hd95")]
    rows = [
        [
            site.node_name,
            _kinds_of(site),
            *(_shown(site.selected().get(column)) for column in columns),
        ]
        for site in result.sites.values()
    ]
    means = []
    for column in columns:
        measured = [site.selected() for site in result.sites.values()]
        values = [numbers[column] for numbers in measured if column in numbers]
        means.append(_shown(sum(values) / len(values) if values else None))
    return [*rows, ["mean", "", *means]]


def _kinds_of(site: ReceivedUpdate) -> str:
    return ", ".join(sorted(name.removeprefix(LABELS) for name in site.numbers if name.startswith(LABELS)))


def _write(result: SegmentationResult, experiment: Experiment, out: Path, *, public: SliceStore | None) -> None:
    """Write weights of the average, the researcher's own segmenter if the method makes one, scores and history."""
    method = experiment.aggregator().method
    weights = experiment.training_plan().model().state_dict()
    local = experiment.training_plan().local_params or ()
    facts = {"rounds": result.config.rounds, **({"privacy": privacy_of(result.sites)} if result.config.private else {})}
    card = {"kind": AVERAGE_KIND, "config": result.config.to_dict(), "facts": facts}
    sent = {name: tensor for name, tensor in weights.items() if name not in local}
    if sent and method.has_average:
        write_weights(out / WEIGHTS, sent, card)
    if method.server is not None:
        server_card = SegmenterCard(
            classes=result.config.classes,
            network=FEDERATED,
            single_objects=result.config.single_objects,
            federated=FederatedDesign(method=result.config, context=SiteContext(), weights="server"),
            training=TrainingFacts(domain=public.domain),
            **public.card_entries,
        )
        Segmenter(method.server, public.format, server_card).save(out / SERVER)
    write_table(out / TABLE, score_headings(result), score_table(result))
    result.run.finished, result.run.breakpoint = True, None
    result.save(out)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
