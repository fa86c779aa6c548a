"""Federated segmentation from start to table: rounds with real nodes, scores of every site."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adaptation.methods.catalogue import MethodDescription, describe
from ..adaptation.methods.federated_method import FederatedMethod
from ..adaptation.methods.method_config import MethodConfig
from ..adaptation.methods.registry import make_method
from ..adaptation.methods.site_round import SiteContext
from ..adaptation.segmenter import FEDERATED, Segmenter
from ..common.files import atomic_file, refuse_existing, write_json
from ..common.progress import track
from ..common.weights_file import write_weights
from ..errors import FederationError, UsageError
from ..node.plans.site_slices import site_slices
from ..node.site_choices import digest
from ..node.site_facts import SiteFacts, read_facts
from ..node.store.slice_store import SliceStore
from .agreement import unusual_conventions
from .experiment import attach, descriptions_of, guarded, request_approval, run_round, use_researcher, wait_for_nodes
from .node_selection import NodeSelection

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

RESULTS, TABLE, WEIGHTS, SERVER = "results.json", "scores.csv", "average.safetensors", "server.safetensors"
WEIGHTS_KIND = "federated segmenter"


@dataclass
class SegmentationResult:
    """What became of a run.

    Attributes:
        config: of the method. rows: by node, what it reported last, with `name`.
        history: per round, by node, what it reported, and `share`.
        seconds: of all rounds.
    """

    config: MethodConfig
    rows: dict[str, dict[str, Any]]
    history: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "made_by": f"fedfactory {__version__}",
            "config": self.config.to_dict(),
            "sites": self.rows,
            "history": self.history,
            "seconds": round(self.seconds, 1),
        }


def train_method(
    method: str,
    out: str | Path,
    *,
    researcher: str | Path,
    nodes: NodeSelection,
    rounds: int,
    public: str | Path | None = None,
    report_round: Callable[[int, dict[str, dict[str, Any]]], None] | None = None,
    **settings: Any,
) -> SegmentationResult:
    """Run a federated segmentation and leave a folder: scores, history, weights of the average.

    Size and number of classes are those of the sites' stores. After the last round the average is scored once more.
    Every site keeps its own segmenter and the average beside its store.

    Args:
        method: see `fedfactory.adaptation.methods.registry`.
        out: new folder.
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes take part; `min_nodes` is 1 by default.
        rounds: how often the sites' weights are averaged.
        public: slice store that all sites have too, for methods that need one.
        settings: further ones of `MethodConfig`.

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
    federated_method = make_method(config)
    experiment = method_experiment(federated_method, tag=nodes.tag, facts=facts, public=shared, min_nodes=min_nodes)
    request_approval(experiment, nodes.approval_timeout)
    result, began = SegmentationResult(config, {node: {} for node in sorted(facts)}), time.monotonic()
    for number in track(range(1, rounds + 1 + federated_method.has_average), f"training by {method}"):
        if number > rounds:  # the last average has been seen by no site yet
            change = partial(experiment.set_model_args, {"config": config.to_dict(), "train": False}, keep_weights=True)
            guarded(change, "the last average could not be scored")
        site_updates = run_round(experiment, nodes.round_timeout)
        for node, report in site_updates.items():
            report["share"] = experiment.aggregator().shares.get(node, 0.0)
            known = {key: value for key, value in report.items() if not _missing(value)}
            if number > rounds:  # what a round of training said of the site's own model stays
                known = {key: value for key, value in known.items() if key.startswith("global_")}
            result.rows[node] |= known
        result.history.append({node: _jsonable(report) for node, report in site_updates.items()})
        if report_round is not None:
            report_round(number, site_updates)
    result.seconds = time.monotonic() - began
    _write(result, experiment, out, shared)
    return result


def agreed_facts(descriptions: dict[str, str]) -> dict[str, SiteFacts]:
    """By node, what it announced.

    Raises: FederationError if stores were registered otherwise, or differ in size or in conventions.
    """
    read = {node: read_facts(text) for node, text in descriptions.items()}
    if unreadable := sorted(node for node, site in read.items() if site is None):
        raise FederationError(
            f"{', '.join(unreadable)}: not registered by this version; run `fedfactory site add` there again"
        )
    facts = {node: site for node, site in read.items() if site is not None}
    if len({site.size for site in facts.values()}) > 1:
        listed = ", ".join(f"{node}: {site.size} px" for node, site in sorted(facts.items()))
        raise FederationError(f"sites do not agree on the size of slices ({listed}); prepare with the same --size")
    other = {node: site.version for node, site in facts.items() if site.version != __version__}
    if other:
        raise FederationError(f"other fedfactory versions than {__version__}: {other}")
    if unusual := unusual_conventions(facts):
        raise FederationError("sites do not agree: " + "; ".join(f"{node}: {text}" for node, text in unusual.items()))
    return facts


def agreed_config(
    method: MethodDescription, facts: dict[str, SiteFacts], public: SliceStore | None, **settings: Any
) -> MethodConfig:
    """The method's configuration with what the sites' stores decide: size, classes, modalities, public slices.

    Raises: ConfigError, see `MethodConfig`; UsageError or FederationError if sites lack what the method needs.
    """
    options = dict(settings.pop("options", {}))
    classes = [site.classes for site in facts.values()]
    size = next(iter(facts.values())).size
    if method.needs_public:
        _require_public(method.name, facts, public, size)
        options["public_slices"] = len(public.slices("train"))
        classes.append(public.classes)
    elif public is not None:
        raise UsageError(f"{method.name} has no use for public slices")
    if method.needs_modalities:
        options["modalities"] = _agreed_modalities(method.name, facts)
        classes += [modality.classes for site in facts.values() for modality in site.modalities.values()]
    sites = {"classes": max(2, *classes), "size": size, "sites": len(facts)}
    return MethodConfig(method=method.name, **sites, options=options, **settings)


def _require_public(method: str, facts: dict[str, SiteFacts], public: SliceStore | None, size: int) -> None:
    if public is None:
        raise UsageError(f"{method} needs labelled slices that all sites have: --public STORE, here and at `site add`")
    if public.format.size != size:
        raise UsageError(f"{public.path}: public slices of {public.format.size} px, the sites' have {size}")
    if set(public.label_kinds()) != {"dense"}:
        raise UsageError(f"{public.path}: public slices need dense labels, all of them")
    expected = digest(public)
    if odd := sorted(node for node, known in facts.items() if known.public_digest != expected):
        raise FederationError(f"{', '.join(odd)}: not registered with these public slices; `site add --public` there")


def _agreed_modalities(method: str, facts: dict[str, SiteFacts]) -> list[str]:
    if odd := sorted(node for node, known in facts.items() if not known.modalities):
        raise FederationError(f"{', '.join(odd)}: registered without a modality; `site add --modality NAME` there")
    names = sorted({name for known in facts.values() for name in known.modalities})
    if len(names) < 2:
        raise UsageError(f"{method} learns from two modalities, and all sites have {names[0]} alone")
    return names


def require_labels(method: MethodDescription, facts: dict[str, SiteFacts]) -> None:
    """Raises: UsageError if no site has the labels that a method cannot do without."""
    parts = [part for site in facts.values() for part in (site, *site.modalities.values())]
    held = {kind for part in parts for kind in part.label_kinds}
    if method.needs_public:
        return
    if not held - {"none"}:
        raise UsageError("no site has any label: there is nothing to learn")
    if method.needs_dense and "dense" not in held:
        raise UsageError(f"{method.name} needs at least one site with dense labels")


def method_experiment(
    method: FederatedMethod,
    *,
    tag: str,
    facts: dict[str, SiteFacts],
    public: SliceStore | None = None,
    min_nodes: int = 1,
) -> Experiment:
    """A Fed-BioMed `Experiment` that trains by a method, with one more round than the configuration's to score the
    last average.

    Args:
        facts: by node, what it announced, see `agreed_facts`. public: slices that all have.

    Raises: FederationError if it cannot be set up.
    """
    from fedbiomed.researcher.federated_workflows import Experiment

    from .method_aggregator import MethodAverage
    from .plans.segmentation_plans import PLANS
    from .strategy import FactoryStrategy

    config, nodes = method.config, sorted(facts)
    if public is not None:
        method.public = site_slices(public, config.classes)
    kinds = {node: known.label_kinds for node, known in facts.items()}
    average = MethodAverage(method, nodes, kinds, public_digest=digest(public) if public is not None else None)
    options = {
        "tags": [tag],
        "nodes": nodes,
        "training_plan_class": PLANS[config.method],
        "node_selection_strategy": FactoryStrategy(None, min_nodes, "samples", config.seed),
        "model_args": {"config": config.to_dict(), "train": True},
        "training_args": {
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": config.updates,
            "random_seed": config.seed,
            "share_persistent_buffers": True,  # running statistics of batch norm
        },
        "aggregator": average,
        "round_limit": config.rounds + 1,
        "retain_full_history": False,
        "tensorboard": True,
    }
    experiment = guarded(lambda: Experiment(**options), "the experiment could not be set up")
    if not experiment.filtered_federation_nodes():
        raise FederationError(f"no connected node offers data with tag '{tag}'")
    attach(experiment)
    return experiment


def score_table(result: SegmentationResult) -> list[list[str]]:
    """Rows of name, kinds of labels, Dice and HD95 of the site's own model and of the average; last, their means."""
    columns = ("own_dice", "own_hd95", "global_dice", "global_hd95")
    rows = [
        [
            str(row.get("node_name", node)),
            ", ".join(sorted(key.removeprefix("slices_") for key in row if key.startswith("slices_"))),
            *(_shown(row.get(column)) for column in columns),
        ]
        for node, row in result.rows.items()
    ]
    means = []
    for column in columns:
        values = [row[column] for row in result.rows.values() if not _missing(row.get(column))]
        means.append(_shown(sum(values) / len(values) if values else None))
    return [*rows, ["mean", "", *means]]


def _write(result: SegmentationResult, experiment: Experiment, out: Path, public: SliceStore | None) -> None:
    out.mkdir(parents=True)
    rules = experiment.aggregator().method
    weights = experiment.training_plan().model().state_dict()
    keeps = experiment.training_plan().local_params or ()
    card = {"kind": WEIGHTS_KIND, "config": result.config.to_dict(), "facts": {"rounds": result.config.rounds}}
    sent = {name: tensor for name, tensor in weights.items() if name not in keeps}
    if sent and rules.has_average:
        write_weights(out / WEIGHTS, sent, card)
    if rules.server is not None:
        card = {
            "classes": result.config.classes,
            "config": {"network": FEDERATED, "method": result.config.to_dict(), "context": asdict(SiteContext())},
            "domain": public.domain,
        }
        Segmenter(rules.server, public.format, card).save(out / SERVER)
    with atomic_file(out / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "labels", "own Dice", "own HD95", "average Dice", "average HD95"])
        writer.writerows(score_table(result))
    rows = {node: _jsonable(row) for node, row in result.rows.items()}
    write_json(out / RESULTS, replace(result, rows=rows).to_dict())


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _jsonable(report: dict[str, Any]) -> dict[str, Any]:
    return {key: None if _missing(value) else value for key, value in report.items()}


def _shown(value: Any) -> str:
    return "" if _missing(value) else f"{value:.3f}"
