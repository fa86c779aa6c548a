"""Federated segmentation from the first round to the table of scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adaptation.methods.catalogue import MethodDescription, describe
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
from ..errors import CheckpointError, FederationError, UsageError
from ..node.site_choices import digest
from ..node.site_data.training_slices import site_slices
from ..node.site_facts import SiteFacts, read_facts
from ..node.store.slice_store import SliceStore
from .agreement import unusual_conventions
from .experiment import (
    descriptions_of,
    guarded,
    make_experiment,
    request_approval,
    run_round,
    use_researcher,
    wait_for_nodes,
)
from .node_selection import NodeSelection
from .private_runs import privacy_of, require_dense_labels, required_entries
from .round_records import ReceivedUpdate

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

RESULTS, TABLE, WEIGHTS, SERVER = "results.json", "scores.csv", "average.safetensors", "server.safetensors"
WEIGHTS_KIND = "federated segmenter"
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
    """

    config: MethodConfig
    sites: dict[str, ReceivedUpdate]
    history: list[dict[str, ReceivedUpdate]] = field(default_factory=list)
    seconds: float = 0.0

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
        }

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
            return cls(MethodConfig.from_dict(values["config"]), sites, rounds, values["seconds"])
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
    report_round: Callable[[int, dict[str, ReceivedUpdate]], None] | None = None,
    **settings: Any,
) -> SegmentationResult:
    """Run a federated segmentation and write a folder with scores, history and weights of the average.

    Image size and number of classes are those of the sites' stores. After the last round the sites score the average
    once more. Every site stores its own segmenter and the average beside its slice store.

    Args:
        method: name of the method, see `fedfactory methods`.
        out: new folder.
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes take part; `min_nodes` is 1 by default.
        rounds: how often the sites' weights are averaged.
        public: folder of the slice store that all sites have too, for methods that need one.
        report_round: called after every round with its number, counted from 1, and node id to the site's update.
        settings: further settings of `MethodConfig`.

    Returns: scores and history.
    Raises: UsageError, ConfigError, FederationError, see `run_round`.
    """
    out = Path(out)
    refuse_existing(out)
    use_researcher(researcher)
    min_nodes = nodes.min_nodes or 1
    wait_for_nodes(min_nodes, nodes.node_timeout, nodes.tag)
    facts = agreed_facts(descriptions_of(nodes.tag))
    shared = SliceStore(public) if public is not None else None
    description = describe(method)
    config = agreed_config(description, facts, shared, rounds=rounds, **settings)
    require_labels(description, facts)
    if config.private:
        require_dense_labels(facts)
    federated_method = make_method(config)
    experiment = method_experiment(federated_method, tag=nodes.tag, facts=facts, public=shared, min_nodes=min_nodes)
    request_approval(experiment, nodes.approval_timeout)
    sites = {node: ReceivedUpdate(node_name=node, domain=facts[node].domain) for node in sorted(facts)}
    result, began = SegmentationResult(config, sites), time.monotonic()
    for number in track(range(1, rounds + 1 + federated_method.has_average), f"training by {method}"):
        if number > rounds:  # no site has scored the last average yet
            change = partial(experiment.set_model_args, {"config": config.to_dict(), "train": False}, keep_weights=True)
            guarded(change, "the last average could not be scored")
        received, shares = run_round(experiment, nodes.round_timeout), experiment.aggregator().shares
        site_updates = {n: update.with_numbers({"share": shares.get(n, 0.0)}) for n, update in received.items()}
        result.add_round(site_updates, trained=number <= rounds)
        if report_round is not None:
            report_round(number, site_updates)
    result.seconds = time.monotonic() - began
    _write(result, experiment, out, public=shared)
    return result


def agreed_facts(descriptions: dict[str, str]) -> dict[str, SiteFacts]:
    """What the sites announced about their stores, if they agree.

    Args:
        descriptions: node id to the text under which its data are registered (`fedfactory site add`).

    Returns: node id to the site's facts.
    Raises: FederationError if a description is not readable, or if the stores differ in version, image size or
        conventions.
    """
    read = {node: read_facts(text) for node, text in descriptions.items()}
    if unreadable := sorted(node for node, site in read.items() if site is None):
        raise FederationError(
            f"{', '.join(unreadable)}: not registered by this version; run `fedfactory site add` there again"
        )
    facts = {node: site for node, site in read.items() if site is not None}
    if len({site.size for site in facts.values()}) > 1:
        listed = ", ".join(f"{node}: {site.size} px" for node, site in sorted(facts.items()))
        raise FederationError(f"sites do not agree on the size of slices ({listed}); prepare all with the same size")
    if len({(site.channels, site.colour) for site in facts.values()}) > 1:
        listed = ", ".join(
            f"{node}: {'colour' if site.colour else f'{site.channels} channels'}"
            for node, site in sorted(facts.items())
        )
        raise FederationError(f"sites do not agree on the channels of slices ({listed}); prepare all alike")
    other = {node: site.version for node, site in facts.items() if site.version != __version__}
    if other:
        listed = ", ".join(f"{node}: {version}" for node, version in sorted(other.items()))
        raise FederationError(f"other fedfactory versions than {__version__} ({listed}); use the same at all sites")
    if unusual := unusual_conventions(facts):
        listed = "; ".join(f"{node}: {text}" for node, text in unusual.items())
        raise FederationError(f"sites do not agree: {listed}; prepare all stores with the same settings")
    return facts


def agreed_config(
    method: MethodDescription, facts: dict[str, SiteFacts], public: SliceStore | None, **settings: Any
) -> MethodConfig:
    """The configuration of a method, completed by what follows from the stores: size, channels, classes, modalities,
    single objects.

    Args:
        method: description of the method.
        facts: node id to the site's facts.
        public: slice store that all sites have too; None without one.
        settings: further settings of `MethodConfig`.

    Raises: ConfigError, see `MethodConfig`; UsageError or FederationError if sites lack what the method needs.
    """
    options = dict(settings.pop("options", {}))
    classes = [site.classes for site in facts.values()]
    first = next(iter(facts.values()))
    if method.needs_public:
        _require_public(method.name, facts, public, first)
        options["public_slices"] = len(public.slices("train"))
        classes.append(public.classes)
    elif public is not None:
        raise UsageError(f"public is {public.path}; leave it out, since {method.name} uses no public slices")
    if method.needs_modalities:
        options["modalities"] = _agreed_modalities(method.name, facts)
        classes += [modality.classes for site in facts.values() for modality in site.modalities.values()]
    sites = {
        "classes": max(2, *classes),
        "size": first.size,
        "channels": first.channels,
        "colour": first.colour,
        "sites": len(facts),
        "single_objects": _agreed_single_objects(facts),
    }
    return MethodConfig(method=method.name, **sites, options=options, **settings)


def _agreed_single_objects(facts: dict[str, SiteFacts]) -> tuple[int, ...]:
    """Labels of the structures that are one connected object at every site whose labels tell."""
    told = [set(site.single_objects) for site in facts.values() if site.single_objects is not None]
    return tuple(sorted(set.intersection(*told))) if told else ()


def _require_public(method: str, facts: dict[str, SiteFacts], public: SliceStore | None, of_sites: SiteFacts) -> None:
    if public is None:
        raise UsageError(f"public is None; {method} needs labelled slices that all sites have registered too")
    for name in ("size", "channels", "colour"):
        ours, theirs = getattr(public.format, name), getattr(of_sites, name)
        if ours != theirs:
            raise UsageError(f"{public.path}: {name} of the public slices is {ours}; it must be the sites', {theirs}")
    if set(public.label_kinds()) != {"dense"}:
        raise UsageError(f"{public.path}: public slices need dense labels; choose a store where all have them")
    expected = digest(public)
    if lacking := sorted(node for node, known in facts.items() if known.public_digest != expected):
        nodes = ", ".join(lacking)
        raise FederationError(f"{nodes}: other or no public slices; run `fedfactory site add --public STORE` there")


def _agreed_modalities(method: str, facts: dict[str, SiteFacts]) -> list[str]:
    if lacking := sorted(node for node, known in facts.items() if not known.modalities):
        nodes = ", ".join(lacking)
        raise FederationError(f"{nodes}: no modality registered; run `fedfactory site add --modality NAME` there")
    names = sorted({name for known in facts.values() for name in known.modalities})
    if len(names) < 2:
        raise UsageError(f"{method} needs two modalities; all sites have {names[0]} only")
    return names


def require_labels(method: MethodDescription, facts: dict[str, SiteFacts]) -> None:
    """Make sure that the sites have the labels that a method needs.

    Args:
        method: description of the method.
        facts: node id to the site's facts.

    Raises: UsageError if no site has them.
    """
    parts = [part for site in facts.values() for part in (site, *site.modalities.values())]
    held = {kind for part in parts for kind in part.label_kinds}
    if method.needs_public:
        return
    if not held - {"none"}:
        raise UsageError(f"0 of {len(facts)} sites have labels; {method.name} needs labels at one site or more")
    if method.needs_dense and "dense" not in held:
        raise UsageError(f"0 of {len(facts)} sites have dense labels; {method.name} needs at least one")


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
    make_folder(out)
    method = experiment.aggregator().method
    weights = experiment.training_plan().model().state_dict()
    local = experiment.training_plan().local_params or ()
    facts = {"rounds": result.config.rounds, **({"privacy": privacy_of(result.sites)} if result.config.private else {})}
    card = {"kind": WEIGHTS_KIND, "config": result.config.to_dict(), "facts": facts}
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
    write_json(out / RESULTS, result.to_dict())


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
