"""The state of a phase-one run: settings, progress, curves, events. One JSON file, written after every round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..common.files import write_json
from ..common.json_text import read_json
from ..errors import CheckpointError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory_facts import FactoryFacts, SharedAnatomy
from ..generative.metrics.alarm import alarms
from ..generative.metrics.site_quality import SiteQuality
from .node_selection import Federation
from .round_records import QuorumChange, ReceivedUpdate, RoundEvent, SiteAnswers, add_answers

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

# Names in a run's folder: the state of `train`, and the results of `train-segmenter`.
CHECKPOINT, STATE, PREVIEWS, RESULTS = "checkpoint.safetensors", "experiment.json", "previews", "results.json"
QUALITY = "quality_"  # prefix of the numbers of a `SiteQuality` in a site's update
PAIR = " / "  # between the names of two domains
CURVES = ("loss_", QUALITY, "augment_p", "images_per_second")  # prefixes of the numbers that are kept for every round
MIN_ANSWERS = 2  # by default: a mean needs at least two sites
RECENT_ROUNDS = 10  # rounds whose mean duration predicts the remaining time


def require_run(out: Path) -> Path:
    """The file with the state of the run in an experiment folder. Raises: UsageError if there is none."""
    path = Path(out) / STATE
    if not path.is_file():
        raise UsageError(f"experiment is {out}; choose a folder that a training run wrote ({STATE} is missing)")
    return path


@dataclass(frozen=True)
class Stage:
    """Part of a run with its own round length and weight of the guidance.

    Published: a second stage of 35 rounds of 200 updates with weight 50.

    Attributes:
        rounds: how often the sites' generators are averaged; at least 1.
        updates_per_round: local updates between two averagings; at least 1.
        clip_weight: weight of the guidance by CLIP image embeddings; None leaves it as configured.
    """

    rounds: int
    updates_per_round: int = 10
    clip_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "updates_per_round"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 1 or more")


@dataclass(kw_only=True)
class RunState:
    """A run of phase one.

    Attributes:
        config: networks and domains, as the run began.
        federation: which nodes take part, and how their updates are averaged.
        stages: stages that follow one another.
        seed: seed of initial weights and of all draws.
        save_every: rounds from one checkpoint to the next.
        round_done: number of finished rounds; a resumed run continues after them.
        breakpoint: folder of Fed-BioMed's breakpoint of the last finished round.
        history: domain to one row per site update: round, losses, augmentation strength, images per second.
        events: sites that did not count in a round, and why.
        seconds: duration of every round in seconds.
        site_updates: node id to the site's update of the last round.
        answers: node id to the rounds in which the node's update counted; of nodes that never answered there is none.
        shared_anatomy: one entry per checkpoint.
        quorum_changes: from which rounds on another number of answers was enough.
    """

    config: FactoryConfig
    federation: Federation
    stages: tuple[Stage, ...]
    seed: int
    save_every: int
    round_done: int = 0
    breakpoint: str | None = None
    history: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    events: list[RoundEvent] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    site_updates: dict[str, ReceivedUpdate] = field(default_factory=dict)
    answers: dict[str, SiteAnswers] = field(default_factory=dict)
    shared_anatomy: list[SharedAnatomy] = field(default_factory=list)
    quorum_changes: list[QuorumChange] = field(default_factory=list)

    def __post_init__(self) -> None:
        for domain in self.config.domains:
            self.history.setdefault(domain, [])

    @property
    def rounds(self) -> int:
        """Number of rounds of all stages."""
        return sum(stage.rounds for stage in self.stages)

    @property
    def min_answers(self) -> int:
        """Answers without which a round does not count: `min_nodes` of the federation; by default two, or one if there
        is one domain only. Never more than the nodes that train in a round."""
        federation = self.federation
        wanted = federation.min_nodes or min(MIN_ANSWERS, len(self.config.domains))
        return min(wanted, federation.nodes_per_round or wanted)

    def require_answers(self, count: int) -> None:
        """Let the rounds that are left count with `count` answers.

        Raises: UsageError if fewer nodes train in a round, and for one answer with encrypted sums.
        """
        federation = self.federation
        if federation.nodes_per_round is not None and count > federation.nodes_per_round:
            raise UsageError(f"min_nodes is {count}; choose at most nodes_per_round ({federation.nodes_per_round})")
        if federation.secagg and count < MIN_ANSWERS:
            raise UsageError(f"min_nodes is {count}; with secagg it must be 2 or more: a sum of one site hides nothing")
        before = self.min_answers
        self.federation = replace(federation, min_nodes=count)
        if self.min_answers != before:
            self.quorum_changes.append(QuorumChange(round=self.round_done + 1, before=before))

    def stage_at(self, number: int) -> Stage:
        """The stage of a round, counted from 1. Raises: ValueError for a round after the last stage."""
        left = number
        for stage in self.stages:
            if left <= stage.rounds:
                return stage
            left -= stage.rounds
        raise ValueError(f"round {number} is after the last stage; use 1 to {self.rounds}")

    def stage_begins(self, number: int) -> bool:
        """Whether a round, counted from 1, is the first of its stage."""
        starts = [1 + sum(stage.rounds for stage in self.stages[:n]) for n in range(len(self.stages))]
        return number in starts

    def config_at(self, number: int) -> FactoryConfig:
        """The configuration in a round, counted from 1."""
        weight = self.stage_at(number).clip_weight
        return self.config if weight is None else replace(self.config, clip_weight=weight)

    def record_round(
        self, number: int, site_updates: dict[str, ReceivedUpdate], experiment: Experiment, *, seconds: float
    ) -> None:
        """Add a finished round.

        Args:
            number: number of the round, counted from 1.
            site_updates: node id to the site's update.
            experiment: the experiment after the round.
            seconds: duration of the round.
        """
        self.round_done, self.site_updates = number, site_updates
        self.seconds.append(round(seconds, 3))
        self.events = list(experiment.strategy().events)
        self.breakpoint = breakpoint_of(experiment)
        add_answers(self.answers, number, site_updates)
        for update in site_updates.values():
            curves = {name: value for name, value in update.numbers.items() if name.startswith(CURVES)}
            self.history[update.domain].append({"round": number, **curves})

    def seconds_left(self) -> float:
        """Estimated seconds until the run ends, from the mean of the last ten rounds."""
        recent = self.seconds[-RECENT_ROUNDS:]
        return (self.rounds - self.round_done) * sum(recent) / max(1, len(recent))

    def facts(self) -> FactoryFacts:
        """What the file of a factory records about the run that made it."""
        return FactoryFacts(
            tag=self.federation.tag,
            seed=self.seed,
            rounds=self.round_done,
            rounds_planned=self.rounds,
            stages=tuple(asdict(stage) for stage in self.stages),
            federation=asdict(self.federation),
            events=len(self.events),
            shared_anatomy=self.shared_anatomy[-1] if self.shared_anatomy else None,
            quality={domain: quality for domain in self.config.domains if (quality := self.quality(domain))},
            alarms=tuple(self.alarms()),
        )

    def quality(self, domain: str) -> dict[str, float]:
        """The newest `SiteQuality` that a site of the domain measured, as a dictionary; empty before the first.

        A site may report anything: a part of it is none, and further names with this prefix are left out.
        """
        names = [part.name for part in fields(SiteQuality)]
        for row in reversed(self.history[domain]):
            found = {name: row[QUALITY + name] for name in names if QUALITY + name in row}
            if len(found) == len(names):
                return found
        return {}

    def alarms(self) -> list[str]:
        """Reasons to doubt that labels carry over between domains, by the newest measurements; empty without any."""
        found = []
        # With pseudo-labels every site's own discriminator sees image and label together: no label crosses domains.
        crossing = self.shared_anatomy and not self.config.pseudo_labels
        pairs = self.shared_anatomy[-1].pairs if crossing else {}
        for domain in self.config.domains:
            scores = [score for pair, score in pairs.items() if domain in pair.split(PAIR)]
            quality = self.quality(domain)
            found += alarms(domain, SiteQuality(**quality) if quality else None, max(scores, default=None))
        return found

    def save(self, out: Path) -> None:
        """Write the state's JSON file into the experiment folder `out`."""
        updates = {node: update.to_dict() for node, update in self.site_updates.items()}
        values = {**asdict(self), "config": self.config.to_dict(), "site_updates": updates}
        write_json(out / STATE, {"made_by": f"fedfactory {__version__}", **values})

    @classmethod
    def load(cls, out: Path) -> RunState:
        """The state in the experiment folder `out`.

        Raises: UsageError if there is no run, CheckpointError if its file is damaged.
        """
        path = require_run(out)
        try:
            return cls._from_dict(read_json(path))
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); choose a run of this version") from None

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> RunState:
        updates = values["site_updates"].items()
        known = {
            "config": FactoryConfig.from_dict(values["config"]),
            "federation": Federation(**values["federation"]),
            "stages": tuple(Stage(**stage) for stage in values["stages"]),
            "events": [RoundEvent(**event) for event in values["events"]],
            "site_updates": {node: ReceivedUpdate.from_dict(update) for node, update in updates},
            "answers": {
                node: SiteAnswers(**{**known, "rounds": tuple(known["rounds"])})
                for node, known in values.get("answers", {}).items()
            },
            "shared_anatomy": [SharedAnatomy(**measured) for measured in values["shared_anatomy"]],
            "quorum_changes": [QuorumChange(**change) for change in values.get("quorum_changes", [])],
        }
        return cls(**{name: value for name, value in values.items() if name != "made_by"} | known)


def breakpoint_of(experiment: Experiment) -> str:
    """The folder of the framework's breakpoint of the round that an experiment has just finished."""
    return str(Path(experiment.experimentation_path()) / f"breakpoint_{experiment.round_current() - 1:04d}")
