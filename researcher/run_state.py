"""What is known of a run of phase one: settings, progress, curves, events. One JSON file, written after every round."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..common.files import write_json
from ..errors import CheckpointError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory_facts import FactoryFacts, SharedAnatomy
from ..generative.metrics.alarm import alarms
from ..generative.metrics.quality import SiteQuality
from .node_selection import Federation

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

CHECKPOINT, STATE = "checkpoint.safetensors", "experiment.json"
QUALITY = "quality_"
PAIR = " / "  # between the names of two domains
CURVES = ("loss_", "quality_", "augment_p", "images_per_second")  # of a site's report, kept for every round
MIN_ANSWERS = 2  # by default: a mean needs at least two sites


@dataclass(frozen=True)
class Stage:
    """Part of a run.

    Attributes:
        rounds: how often the sites' generators are averaged.
        updates_per_round: local updates in between.
        clip_weight: of the guidance; None leaves it as configured. Published: a second stage of 35 rounds of 200
            updates with weight 50.
    """

    rounds: int
    updates_per_round: int = 10
    clip_weight: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.updates_per_round < 1:
            raise UsageError("rounds and updates per round must be at least 1")


@dataclass
class RunState:
    """A run of phase one.

    Attributes:
        save_every: rounds from one checkpoint to the next.
        round_done: rounds that are finished; where a resumed run goes on.
        breakpoint: Fed-BioMed's breakpoint of that round.
        history: by domain, one row per round it took part in: losses, strength of augmentation, images per second.
        events: rounds in which a site did not count, and why.
        seconds: of every round.
        reports: what the sites told in the last round, by node.
        sharing: at every checkpoint, the round and `shared_anatomy` by pair of domains.
    """

    config: FactoryConfig
    federation: Federation
    stages: tuple[Stage, ...]
    seed: int
    save_every: int
    round_done: int = 0
    breakpoint: str | None = None
    history: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    sharing: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for domain in self.config.domains:
            self.history.setdefault(domain, [])

    @property
    def rounds(self) -> int:
        return sum(stage.rounds for stage in self.stages)

    @property
    def min_answers(self) -> int:
        """Answers without which a round does not count: `min_nodes` of the federation; by default two, or one if there
        is one domain only. Never more than a round asks."""
        federation = self.federation
        wanted = federation.min_nodes or min(MIN_ANSWERS, len(self.config.domains))
        return min(wanted, federation.nodes_per_round or wanted)

    def stage_at(self, number: int) -> Stage:
        """The stage of a round, counted from 1."""
        for stage in self.stages:
            if number <= stage.rounds:
                return stage
            number -= stage.rounds
        raise ValueError(f"round {number} lies behind the last stage")

    def stage_begins(self, number: int) -> bool:
        starts = [1 + sum(stage.rounds for stage in self.stages[:n]) for n in range(len(self.stages))]
        return number in starts

    def config_at(self, number: int) -> FactoryConfig:
        weight = self.stage_at(number).clip_weight
        return self.config if weight is None else replace(self.config, clip_weight=weight)

    def note(self, number: int, reports: dict[str, dict[str, Any]], experiment: Experiment, seconds: float) -> None:
        """Take down a finished round."""
        self.round_done, self.reports = number, reports
        self.seconds.append(round(seconds, 3))
        self.events = list(experiment.strategy().events)
        self.breakpoint = str(Path(experiment.experimentation_path()) / f"breakpoint_{number - 1:04d}")
        for report in reports.values():
            kept = {k: v for k, v in report.items() if k.startswith(CURVES)}
            self.history[report["domain"]].append({"round": number, **kept})

    def seconds_left(self) -> float:
        """By the last ten rounds."""
        recent = self.seconds[-10:]
        return (self.rounds - self.round_done) * sum(recent) / max(1, len(recent))

    def facts(self) -> FactoryFacts:
        """How the factory came about, for its file."""
        return FactoryFacts(
            tag=self.federation.tag,
            seed=self.seed,
            rounds=self.round_done,
            rounds_planned=self.rounds,
            stages=tuple(asdict(stage) for stage in self.stages),
            federation=asdict(self.federation),
            events=len(self.events),
            shared_anatomy=SharedAnatomy(**self.sharing[-1]) if self.sharing else None,
            quality={domain: quality for domain in self.config.domains if (quality := self.quality(domain))},
            alarms=tuple(self.alarms()),
        )

    def quality(self, domain: str) -> dict[str, float]:
        """What a site of the domain last said of the generator's slices; empty before it did."""
        for row in reversed(self.history[domain]):
            found = {k.removeprefix(QUALITY): v for k, v in row.items() if k.startswith(QUALITY)}
            if found:
                return found
        return {}

    def alarms(self) -> list[str]:
        """Why labels may not carry over between domains, by the newest measurements; empty if nothing speaks for it."""
        found = []
        for domain in self.config.domains:
            shared = [v for pair, v in (self.sharing[-1]["pairs"] if self.sharing else {}).items()
                      if domain in pair.split(PAIR)]  # fmt: skip
            quality = self.quality(domain)
            found += alarms(domain, SiteQuality(**quality) if quality else None, max(shared, default=None))
        return found

    def save(self, out: Path) -> None:
        write_json(
            out / STATE, {"made_by": f"fedfactory {__version__}", **asdict(self), "config": self.config.to_dict()}
        )

    @classmethod
    def load(cls, out: Path) -> RunState:
        """Raises: UsageError if there is no run, CheckpointError if its file is damaged."""
        path = Path(out) / STATE
        if not path.is_file():
            raise UsageError(f"{out}: no experiment here ({STATE} is missing); `fedfactory train --out` makes one")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("made_by")
            return cls(
                **{
                    **values,
                    "config": FactoryConfig.from_dict(values["config"]),
                    "federation": Federation(**values["federation"]),
                    "stages": tuple(Stage(**stage) for stage in values["stages"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{path}: not readable ({error})") from None
