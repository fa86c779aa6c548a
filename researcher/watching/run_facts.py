"""What is known of a run from the files in its folder: progress, numbers by site, who was missing and why."""

from __future__ import annotations

import math
import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from ...errors import one_line
from ..round_records import ReceivedUpdate, RoundEvent, SiteAnswers, add_answers, answers_needed
from ..run_state import CURVES, PREVIEWS, RESULTS, STATE, RunState

if TYPE_CHECKING:
    from ..segmentation import SegmentationResult

MAX_NAME = 80  # characters of a name or a reason that came from elsewhere
TITLES = {  # of charts; other names are shown with spaces
    "loss": "loss",
    "loss_discriminator": "loss of the discriminator",
    "loss_generator": "loss of the generator",
    "loss_guidance": "loss of the guidance",
    "loss_path": "loss of the path length",
    "loss_r1": "R1 penalty",
    "quality_distance": "kernel distance of synthetic slices (0 is best)",
    "quality_layout": "layout of synthetic slices (1 is best)",
    "quality_contrast": "contrast of synthetic slices (1 is best)",
    "augment_p": "strength of augmentation",
    "images_per_second": "images per second",
    "own_dice": "Dice of the sites' own models",
    "global_dice": "Dice of the average",
    "own_hd95": "HD95 of the sites' own models",
    "global_hd95": "HD95 of the average",
    "epsilon": "epsilon spent per training patient",
}
SEGMENTATION_CURVES = re.compile(r"loss|epsilon|(?:own|global)_(?:.+_)?(?:dice|hd95)")


@dataclass(frozen=True)
class Chart:
    """A number over the rounds.

    Attributes:
        title: what is shown.
        rounds: (N,) numbers of rounds, rising, counted from 1.
        series: name of a site, domain or pair to N values; None where nothing was measured. A site or domain has the
            same place in all charts of a run, and so the same colour.
    """

    title: str
    rounds: list[int]
    series: dict[str, list[float | None]]


@dataclass(frozen=True)
class Missed:
    """Rounds in a row that a site missed for one reason, see `RoundEvent`.

    Attributes:
        site: name of the node, or its id if it never answered.
        kind: "absent", "lost", "failed" or "rejected".
        reason: one line of text.
        first: number of the first such round, counted from 1.
        last: number of the last one.
    """

    site: str
    kind: str
    reason: str
    first: int
    last: int

    @property
    def rounds(self) -> str:
        """Such as "round 3", or "rounds 3 to 7"."""
        return f"round {self.first}" if self.first == self.last else f"rounds {self.first} to {self.last}"


@dataclass(frozen=True)
class TableFacts:
    """A table of texts: heading of each column, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run. All texts are of one line, without signs that command a terminal.

    Attributes:
        name: of the folder.
        trains: what is trained, in words.
        settings: name to value of what the run was started with.
        round_done: number of finished rounds.
        rounds: number of planned rounds.
        finished: whether the run is complete.
        seconds_left: estimate; 0 if it is finished or no round is.
        changed: when a round last finished or the run began, in seconds since 1970.
        sites: who answered and how much each site sent.
        numbers: the newest numbers by domain or site.
        note: about the numbers, such as their unit.
        charts: numbers over the rounds.
        shared_anatomy: pair of domains to its newest score; 0 is chance, 1 is all.
        alarms: reasons to doubt that labels carry over between domains.
        missed: rounds that sites missed, and why.
        previews: number of a round to the picture of that round.
    """

    name: str
    trains: str
    settings: dict[str, str]
    round_done: int
    rounds: int
    finished: bool
    seconds_left: float
    changed: float
    sites: TableFacts
    numbers: TableFacts
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    shared_anatomy: dict[str, float] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    previews: dict[int, Path] = field(default_factory=dict)

    @property
    def progress(self) -> str:
        """Rounds and the time that is left, in words."""
        done = f"round {self.round_done} of {self.rounds}"
        if self.finished:
            return f"{done}, finished"
        return f"{done}, about {self.seconds_left / 60:.0f} min left" if self.round_done else f"{done}, just begun"


def state_file(folder: Path) -> Path:
    """The file from which a run is known: that of `train`, or that of `train-segmenter`."""
    state = Path(folder) / STATE
    return Path(folder) / RESULTS if not state.is_file() and (Path(folder) / RESULTS).is_file() else state


def gather(folder: str | Path) -> RunFacts:
    """What is known of the run in a folder that `train` or `train-segmenter` writes.

    Raises: UsageError if there is no run, CheckpointError if its file is damaged.
    """
    folder = Path(folder)
    path = state_file(folder)
    if path.name == RESULTS:
        from ..segmentation import SegmentationResult  # only now: slow to import

        return _of_segmentation(folder, SegmentationResult.load(folder), path)
    return _of_factory(folder, RunState.load(folder), path)


def previews_of(folder: Path) -> dict[int, Path]:
    """Number of a round, rising, to the picture of synthetic slices that was written after it."""
    found = {
        int(match[1]): path
        for path in (folder / PREVIEWS).glob("round_*.png")
        if (match := re.fullmatch(r"round_(\d{1,9})\.png", path.name)) and path.is_file() and not path.is_symlink()
    }
    return dict(sorted(found.items()))


def missed_rounds(events: Iterable[RoundEvent], names: Mapping[str, str]) -> list[Missed]:
    """The events with those of rounds in a row put together, in the order of their first rounds.

    Args:
        events: sites that did not count in a round.
        names: node id to the name that is shown, where it is known.
    """
    found: list[Missed] = []
    newest: dict[str, int] = {}  # node id to its last entry in `found`
    for event in events:
        name = names.get(event.node) or _shown(event.node)
        entry = Missed(name, _shown(event.kind), _shown(event.reason, 300), event.round, event.round)
        if event.node in newest:
            before = found[newest[event.node]]
            # A round that was repeated is an event of the same number.
            follows = event.round - before.last in (0, 1)
            if follows and (before.kind, before.reason) == (entry.kind, entry.reason):
                found[newest[event.node]] = Missed(name, entry.kind, entry.reason, before.first, event.round)
                continue
        newest[event.node] = len(found)
        found.append(entry)
    return found


def _of_factory(folder: Path, state: RunState, path: Path) -> RunFacts:
    federation, config = state.federation, state.config
    history = {domain: _by_round(rows) for domain, rows in state.history.items()}
    # The newest value of every number: some are not measured in every round.
    newest = {
        domain: dict(ChainMap(*(rows[n] for n in sorted(rows, reverse=True)))) for domain, rows in history.items()
    }
    pairs = [(measured.round, measured.pairs) for measured in state.shared_anatomy]
    charts = _charts({_shown(domain): rows for domain, rows in history.items()})
    if pairs:
        names = list(dict.fromkeys(pair for _, scores in pairs for pair in scores))
        series = {_shown(name): [_finite(scores.get(name)) for _, scores in pairs] for name in names}
        charts.insert(0, Chart("shared anatomy (0 is chance, 1 is all)", [number for number, _ in pairs], series))
    weights = "encrypted sums" if federation.secagg else federation.transport
    return RunFacts(
        name=_shown(folder.resolve().name),
        trains=f"a factory of the domains {', '.join(_shown(domain) for domain in config.domains)}",
        settings={
            "tag": _shown(federation.tag),
            "slices": _slices(config.image_size, config.image_channels),
            "rounds": ", then ".join(f"{part.rounds} of {part.updates_per_round} updates" for part in state.stages),
            "nodes in a round": str(federation.nodes_per_round or "all"),
            "answers needed": answers_needed(state.min_answers, state.quorum_changes),
            "weights": f"{weights}, sites count by {federation.weighting}",
            "seed": str(state.seed),
        },
        round_done=state.round_done,
        rounds=state.rounds,
        finished=state.round_done >= state.rounds,
        seconds_left=state.seconds_left(),
        changed=path.stat().st_mtime,
        sites=_sites(state.answers, state.events),
        numbers=_newest("domain", newest),
        charts=[*charts, *_attendance(state.answers, state.events, state.round_done)],
        shared_anatomy={_shown(pair): score for pair, score in (pairs[-1][1] if pairs else {}).items()},
        alarms=[_shown(text, 300) for text in state.alarms()],
        missed=missed_rounds(state.events, _names(state.answers)),
        previews=previews_of(folder),
    )


def _of_segmentation(folder: Path, result: SegmentationResult, path: Path) -> RunFacts:
    from ..segmentation import score_headings, score_table

    config, run = result.config, result.run
    answers: dict[str, SiteAnswers] = {}
    for number, updates in enumerate(result.history, start=1):
        add_answers(answers, number, updates)
    done = min(len(result.history), config.rounds)  # one more round only scores the average
    finished = run.finished if run is not None else done >= config.rounds
    left = 0.0 if finished or not done else (config.rounds - done) * result.seconds / len(result.history)
    settings = {}
    if run is not None:
        needed = answers_needed(run.min_nodes, run.quorum_changes)
        settings = {"tag": _shown(run.tag), "answers needed": needed}
    settings |= {
        "slices": _slices(config.size, config.channels),
        "label values": str(config.classes),
        "updates in a round": str(config.updates),
        "seed": str(config.seed),
    }
    if config.private:
        settings["epsilon planned"] = f"{config.dp_epsilon:g} per training patient"
    rows = [[_shown(cell) for cell in row] for row in score_table(result)]
    return RunFacts(
        name=_shown(folder.resolve().name),
        trains=f"segmenters by {config.method}",
        settings=settings,
        round_done=done,
        rounds=config.rounds,
        finished=finished,
        seconds_left=left,
        changed=path.stat().st_mtime,
        sites=_sites(answers, result.events),
        numbers=TableFacts(score_headings(result), rows),
        note="epsilon is per training patient" if config.private else "HD95 is in mm, of pictures in pixels",
        charts=[
            *_segmentation_charts(result.history, _names(answers)),
            *_attendance(answers, result.events, len(result.history)),
        ],
        missed=missed_rounds(result.events, _names(answers)),
    )


def _segmentation_charts(history: Sequence[Mapping[str, ReceivedUpdate]], names: Mapping[str, str]) -> list[Chart]:
    """Charts with one series per node."""
    rows: dict[str, dict[int, Mapping[str, float]]] = {name: {} for name in names.values()}
    for number, updates in enumerate(history, start=1):
        for node, update in updates.items():
            rows[names[node]][number] = {
                name: value for name, value in update.numbers.items() if SEGMENTATION_CURVES.fullmatch(name)
            }
    return _charts(rows)


def _names(answers: Mapping[str, SiteAnswers]) -> dict[str, str]:
    """Node id to the name to show: with the id, if several nodes have the same name."""
    shown = {node: _shown(known.node_name) for node, known in answers.items()}
    return {
        node: f"{name} ({_shown(node)})" if list(shown.values()).count(name) > 1 else name
        for node, name in shown.items()
    }


def _charts(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[Chart]:
    """One chart for every number that was measured at all, in the order of TITLES.

    Args:
        rows: name of a series to the number of a round to numbers by name.
    """
    found = {name for by_round in rows.values() for numbers in by_round.values() for name in numbers}
    known = list(TITLES)
    charts = []
    for name in sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name)):
        measured = sorted({number for by_round in rows.values() for number in by_round if name in by_round[number]})
        series = {
            label: [_finite(by_round.get(number, {}).get(name)) for number in measured]
            for label, by_round in rows.items()
        }
        if any(value is not None for values in series.values() for value in values):
            charts.append(Chart(_title(name), measured, series))
    return charts


def _by_round(rows: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Round to its curves, as means over the nodes of a domain."""
    collected: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        own = collected.setdefault(int(row["round"]), {})
        for name, value in row.items():
            if name.startswith(CURVES) and _finite(value) is not None:
                own.setdefault(name, []).append(value)
    return {
        number: {name: sum(values) / len(values) for name, values in numbers.items()}
        for number, numbers in collected.items()
    }


def _attendance(answers: Mapping[str, SiteAnswers], events: Sequence[RoundEvent], rounds: int) -> list[Chart]:
    """How many sites counted in each round, and how many did not; no chart before the first round."""
    numbers = list(range(1, rounds + 1))
    if not numbers:
        return []
    counted = Counter(number for site in answers.values() for number in site.rounds)
    missing = Counter(number for rounds_ in _missing(answers, events).values() for number in rounds_)
    series = {"counted": [counted[number] for number in numbers], "missed": [missing[number] for number in numbers]}
    return [Chart("number of sites in a round", numbers, series)]


def _missing(answers: Mapping[str, SiteAnswers], events: Iterable[RoundEvent]) -> dict[str, set[int]]:
    """Node id to the rounds that went on without the node. A repeated round may have counted in the end."""
    found: dict[str, set[int]] = {}
    for event in events:
        found.setdefault(event.node, set()).add(event.round)
    return {node: rounds - set(answers[node].rounds if node in answers else ()) for node, rounds in found.items()}


def _sites(answers: Mapping[str, SiteAnswers], events: Sequence[RoundEvent]) -> TableFacts:
    """A row for each node that answered or was missed."""
    missing, names, rows = _missing(answers, events), _names(answers), []
    for node in dict.fromkeys([*answers, *missing]):
        known = answers.get(node, SiteAnswers(node_name=node))
        last = str(known.rounds[-1]) if known.rounds else "never"
        missed = str(len(missing.get(node, ())))
        size = "" if known.num_bytes is None else decimal(known.num_bytes)
        name = names.get(node) or _shown(node)
        rows.append([name, _shown(known.domain), str(len(known.rounds)), last, missed, size])
    return TableFacts(["site", "domain", "rounds counted", "last", "missed", "weights received"], rows)


def _newest(what: str, newest: Mapping[str, Mapping[str, float]]) -> TableFacts:
    """The newest numbers, one row per name."""
    terms = sorted({term for numbers in newest.values() for term in numbers})
    head = [what, *(term.removeprefix("loss_").replace("_", " ") for term in terms)]
    rows = [
        [_shown(name), *(f"{numbers[term]:.3g}" if term in numbers else "" for term in terms)]
        for name, numbers in newest.items()
    ]
    return TableFacts(head, rows)


def _title(name: str) -> str:
    return TITLES.get(name) or _shown(name.replace("_", " "))


def _shown(text: str, length: int = MAX_NAME) -> str:
    """A text that may come from a node: of one line and bounded length, without signs that command a terminal."""
    line = one_line(str(text))
    return line if len(line) <= length else line[: length - 3] + "..."


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _slices(size: int, channels: int) -> str:
    return f"{size} px, {channels} channel{'s' if channels > 1 else ''}"
