"""What a run of federated segmentation needs to go on after it was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...adaptation.methods.interface.method_config import MethodConfig
from ...errors import FederationError, UsageError
from ...node.site_facts import SiteFacts, read_facts
from ..round_records import QuorumChange

UNUSED = ("pseudo_labels",)  # of what sites announce: no federated segmentation reads them


@dataclass(kw_only=True)
class RunProgress:
    """How a run began, and from where it can go on.

    Attributes:
        tag: tag under which the sites registered their data.
        min_nodes: answers without which a round does not count, now.
        facts: node id to what the site announced when the run began.
        public_digest: SHA-256 of the public slices; None for methods without.
        breakpoint: Fed-BioMed's folder of the last finished round; None before the first.
        finished: whether the run is complete.
        quorum_changes: from which rounds on another number of answers was enough.
    """

    tag: str
    min_nodes: int
    facts: dict[str, SiteFacts]
    public_digest: str | None = None
    breakpoint: str | None = None
    finished: bool = False
    quorum_changes: list[QuorumChange] = field(default_factory=list)

    def require_answers(self, count: int, *, round_done: int) -> None:
        """Let the rounds after `round_done` count with `count` answers."""
        if count != self.min_nodes:
            self.quorum_changes.append(QuorumChange(round=round_done + 1, before=self.min_nodes))
            self.min_nodes = count

    def to_dict(self) -> dict[str, object]:
        """JSON values, from which `from_dict` reads the record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunProgress:
        """Raises: ConfigError, TypeError or KeyError if `to_dict` did not write the values."""
        facts = {node: SiteFacts.from_dict(site) for node, site in values["facts"].items()}
        changes = [QuorumChange(**change) for change in values.get("quorum_changes", [])]
        return cls(**{**values, "facts": facts, "quorum_changes": changes})


def require_same_run(
    out: Path, began: tuple[RunProgress, MethodConfig], asked: tuple[RunProgress, MethodConfig]
) -> None:
    """Make sure that an interrupted run is continued with the settings it began with; `min_nodes` may be another one.

    Args:
        out: folder of the run, for the message.
        began: progress and configuration of the run.
        asked: the same of the command that is to continue it.

    Raises: UsageError that names the settings that differ.
    """
    before, now = ({"tag": run.tag, "public": run.public_digest, **_flat(config)} for run, config in (began, asked))
    differing = [name for name in (*before, *now.keys() - before.keys()) if before.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(f"{name} {now.get(name)} in place of {before.get(name)}" for name in differing)
        raise UsageError(
            f"{out}: the run began with other settings ({listed}); resume it with those, or start a new one"
        )


def require_same_stores(out: Path, run: RunProgress, descriptions: Mapping[str, str]) -> None:
    """Make sure that the connected nodes of a run still have the stores with which it began.

    Nodes that are not connected are left to the rounds, and nodes of no part in the run are ignored.

    Args:
        out: folder of the run, for the message.
        run: its progress.
        descriptions: node id to the text under which its data are registered now.

    Raises: FederationError that names each node and what changed, or says that none of the run's nodes is there.
    """
    present = {node: read_facts(text) for node, text in descriptions.items() if node in run.facts}
    if not present:
        raise FederationError(f"{out}: none of the {len(run.facts)} nodes of the run is connected; start them")
    changed = []
    for node, site in sorted(present.items()):
        before, now = run.facts[node].to_dict(), site.to_dict() if site is not None else {}
        if names := [name for name, value in before.items() if name not in UNUSED and now.get(name) != value]:
            changed.append(f"{node}: {', '.join(names)}")
    if changed:
        raise FederationError(
            f"{out}: stores are not registered as when the run began ({'; '.join(changed)}); put them back as they "
            "were, or start a new run"
        )


def _flat(config: MethodConfig) -> dict[str, object]:
    """All settings by name, the method's own among them."""
    values = config.to_dict()
    return {**{name: value for name, value in values.items() if name != "options"}, **values["options"]}
