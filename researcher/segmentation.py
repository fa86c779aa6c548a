"""Federated segmentation from start to table: rounds with real nodes, scores of every site."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adaptation.federated_method import MethodConfig
from ..adaptation.methods import make_method
from ..errors import FederationError, UsageError
from ..files import atomic_file, refuse_existing, write_json
from ..generative.checkpoint import write_weights
from ..node.sites import read_facts
from ..progress import track
from .agreement import other_conventions
from .experiment import attach, descriptions_of, guarded, request_approval, run_round, use_researcher, wait_for_nodes

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

RESULTS, TABLE, WEIGHTS = "results.json", "scores.csv", "average.safetensors"
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
    tag: str,
    rounds: int,
    min_nodes: int = 1,
    node_timeout: float = 60,
    approval_timeout: float = 0,
    round_timeout: float | None = None,
    report_round: Callable[[int, dict[str, dict[str, Any]]], None] | None = None,
    **settings: Any,
) -> SegmentationResult:
    """Run a federated segmentation and leave a folder: scores, history, weights of the average.

    Size and number of classes are those of the sites' stores. After the last round the average is scored once more.
    Every site keeps its own segmenter and the average beside its store.

    Args:
        method: see `fedfactory.adaptation.methods`.
        out: new folder.
        researcher: Fed-BioMed researcher component. tag: of the nodes' data sets.
        min_nodes: nodes to wait for, and answers a round needs.
        settings: further ones of `MethodConfig`.

    Raises: UsageError, ConfigError, FederationError, see `run_round`.
    """
    out = Path(out)
    refuse_existing(out)
    use_researcher(researcher)
    wait_for_nodes(min_nodes, node_timeout, tag)
    facts = agreed_facts(descriptions_of(tag))
    nodes = sorted(facts)
    config = MethodConfig(
        method=method,
        classes=max(2, *(known["classes"] for known in facts.values())),
        size=facts[nodes[0]]["size"],
        sites=len(nodes),
        rounds=rounds,
        **settings,
    )
    kinds = {node: known["label_kinds"] for node, known in facts.items()}
    require_labels(method, kinds)
    experiment = method_experiment(config, tag=tag, nodes=nodes, kinds=kinds, min_nodes=min_nodes)
    request_approval(experiment, approval_timeout)
    result, began = SegmentationResult(config, {node: {} for node in nodes}), time.monotonic()
    for number in track(range(1, rounds + 2), f"training by {method}"):
        if number > rounds:  # the last average has been seen by no site yet
            change = partial(experiment.set_model_args, {"config": config.to_dict(), "train": False}, keep_weights=True)
            guarded(change, "the last average could not be scored")
        reports = run_round(experiment, round_timeout)
        for node, report in reports.items():
            report["share"] = experiment.aggregator().shares.get(node, 0.0)
            known = {key: value for key, value in report.items() if not _missing(value)}
            if number > rounds:  # what a round of training said of the site's own model stays
                known = {key: value for key, value in known.items() if key.startswith("global_")}
            result.rows[node] |= known
        result.history.append({node: _jsonable(report) for node, report in reports.items()})
        if report_round is not None:
            report_round(number, reports)
    result.seconds = time.monotonic() - began
    _write(result, experiment, out)
    return result


def agreed_facts(descriptions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By node, what it announced.

    Raises: FederationError if stores were registered otherwise, or differ in size or in conventions.
    """
    facts = {node: read_facts(text) for node, text in descriptions.items()}
    odd = [node for node, known in facts.items() if known is None or "label_kinds" not in known]
    if odd:
        raise FederationError(
            f"{', '.join(odd)}: registered without label kinds; run `fedfactory site add` there again"
        )
    sizes = {known["size"] for known in facts.values()}
    if len(sizes) > 1:
        listed = ", ".join(f"{node}: {known['size']} px" for node, known in sorted(facts.items()))
        raise FederationError(f"sites do not agree on the size of slices ({listed}); prepare with the same --size")
    other = {node: known["version"] for node, known in facts.items() if known["version"] != __version__}
    if other:
        raise FederationError(f"other fedfactory versions than {__version__}: {other}")
    if odd := other_conventions(facts):
        raise FederationError("sites do not agree: " + "; ".join(f"{node}: {text}" for node, text in odd.items()))
    return facts


def require_labels(method: str, kinds: dict[str, dict[str, int]]) -> None:
    """Raises: UsageError if no site has the labels that a method cannot do without."""
    held = {kind for known in kinds.values() for kind in known}
    if not held - {"none"}:
        raise UsageError("no site has any label: there is nothing to learn")
    if method == "fedmix" and "dense" not in held:
        raise UsageError("fedmix needs at least one site with dense labels")


def method_experiment(
    config: MethodConfig, *, tag: str, nodes: Sequence[str], kinds: dict[str, dict[str, int]], min_nodes: int = 1
) -> Experiment:
    """A Fed-BioMed `Experiment` that trains by a method, with one more round than the configuration's to score the
    last average. Raises: FederationError if it cannot be set up."""
    from fedbiomed.researcher.federated_workflows import Experiment

    from .method_average import MethodAverage
    from .method_plans import PLANS
    from .strategy import FactoryStrategy

    method = make_method(config)
    options = {
        "tags": [tag],
        "nodes": list(nodes),
        "training_plan_class": PLANS[config.method],
        "node_selection_strategy": FactoryStrategy(None, min_nodes, "samples", config.seed),
        "model_args": {"config": config.to_dict(), "train": True},
        "training_args": {
            "loader_args": {"batch_size": config.batch_size},
            "num_updates": config.updates,
            "random_seed": config.seed,
            "share_persistent_buffers": True,  # running statistics of batch norm
        },
        "aggregator": MethodAverage(method, list(nodes), kinds),
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


def _write(result: SegmentationResult, experiment: Experiment, out: Path) -> None:
    out.mkdir(parents=True)
    weights = experiment.training_plan().model().state_dict()
    keeps = experiment.training_plan().local_params or ()
    card = {"kind": WEIGHTS_KIND, "config": result.config.to_dict(), "facts": {"rounds": result.config.rounds}}
    sent = {name: tensor for name, tensor in weights.items() if name not in keeps}
    if sent:
        write_weights(out / WEIGHTS, sent, card)
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
