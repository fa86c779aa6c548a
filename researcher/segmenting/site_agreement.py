"""Whether sites can train a segmenter together by a method: checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ... import __version__
from ...adaptation.methods.catalogue import MethodDescription
from ...adaptation.methods.interface.method_config import MethodConfig
from ...errors import FederationError, UsageError
from ...node.site_choices import digest
from ...node.site_facts import CONVENTIONS, ModalityFacts, SiteFacts, read_facts
from ...node.store.slice_store import SliceStore
from .site_labels import held_labels, label_numbers

SHARED_SETTINGS = ("version", "size", "channels", "colour", *CONVENTIONS)  # in which stores must not differ
NOT_READABLE = "not registered by this version; run `fedfactory site add` there again"


@dataclass(frozen=True)
class Disagreement:
    """A setting in which the sites' stores differ, so that nothing can be trained.

    Attributes:
        setting: its name in `SiteFacts`.
        values: node id to the site's value.
        sites: ids of the nodes whose value is not that of most sites, or of another version than the researcher's.
    """

    setting: str
    values: dict[str, str]
    sites: list[str]

    @property
    def text(self) -> str:
        """All values, and whose is unlike the others."""
        listed = ", ".join(f"{node}: {value}" for node, value in self.values.items())
        return f"{self.setting} differs ({listed}), unlike the others: {', '.join(self.sites)}"


def agreed_facts(descriptions: Mapping[str, str]) -> dict[str, SiteFacts]:
    """What the sites announced about their stores, if they agree.

    Args:
        descriptions: node id to the text under which its data are registered (`fedfactory site add`).

    Returns: node id to the site's facts.
    Raises: FederationError if a description is not readable, or if the stores differ in version, image size or
        conventions.
    """
    read = {node: read_facts(text) for node, text in descriptions.items()}
    if unreadable := sorted(node for node, site in read.items() if site is None):
        raise FederationError(f"{', '.join(unreadable)}: {NOT_READABLE}")
    facts = {node: site for node, site in read.items() if site is not None}
    require_agreement(facts)
    return facts


def require_agreement(facts: Mapping[str, SiteFacts]) -> None:
    """Raises: FederationError that names a setting in which stores differ, whatever the method, and each site's value.

    Args:
        facts: node id to the site's facts.
    """
    if found := disagreements_of(facts):
        texts = "; ".join(disagreement.text for disagreement in found)
        raise FederationError(
            f"sites do not agree: {texts}; prepare all stores with the same settings and the same version"
        )


def disagreements_of(facts: Mapping[str, SiteFacts]) -> list[Disagreement]:
    """The settings in which the stores must not differ, and do.

    Args:
        facts: node id to the site's facts.
    """
    found = []
    for setting in SHARED_SETTINGS:
        values = {node: getattr(site, setting) for node, site in sorted(facts.items())}
        counted = list(values.values())
        usual = __version__ if setting == "version" else max(sorted(set(counted)), key=counted.count, default=None)
        if odd := [node for node, value in values.items() if value != usual]:
            found.append(Disagreement(setting, {node: _shown(value) for node, value in values.items()}, odd))
    return found


def agreed_config(
    method: MethodDescription, facts: Mapping[str, SiteFacts], public: SliceStore | None, **settings: Any
) -> MethodConfig:
    """The configuration of a method, completed by what follows from the stores: size, channels, classes, modalities,
    single objects.

    Args:
        method: description of the method.
        facts: node id to the site's facts.
        public: slice store that all sites have too; None without one.
        settings: further settings of `MethodConfig`; `classes` for sites whose numbers of label values differ.

    Raises: ConfigError, see `MethodConfig`; UsageError or FederationError if sites lack what the method needs.
    """
    options = dict(settings.pop("options", {}))
    wanted = settings.pop("classes", None)
    first = next(iter(facts.values()))
    if method.needs_public:
        _require_public(method.name, facts, public, first)
        options["public_slices"] = len(public.slices("train"))
    elif public is not None:
        raise UsageError(f"public is {public.path}; leave it out, since {method.name} uses no public slices")
    if method.needs_modalities:
        options["modalities"] = agreed_modalities(method.name, facts)
    sites = {
        "classes": agreed_classes(method, facts, public.classes if public is not None else None, wanted=wanted),
        "size": first.size,
        "channels": first.channels,
        "colour": first.colour,
        "sites": len(facts),
        "single_objects": agreed_single_objects(facts),
    }
    return MethodConfig(method=method.name, **sites, options=options, **settings)


def agreed_single_objects(facts: Mapping[str, SiteFacts]) -> tuple[int, ...]:
    """Labels of the structures that are one connected object at every site that announces such."""
    known = [set(site.single_objects) for site in facts.values() if site.single_objects is not None]
    return tuple(sorted(set.intersection(*known))) if known else ()


def misfit_of(method: MethodDescription, facts: Mapping[str, SiteFacts]) -> str | None:
    """Why a method cannot train with sites that agree; None if it can. The same checks precede every training.

    Args:
        method: description of the method.
        facts: node id to the site's facts.
    """
    try:
        require_labels(method, facts)
        if method.needs_public:
            require_common_public_slices(facts)
        if method.needs_modalities:
            agreed_modalities(method.name, facts)
        agreed_classes(method, facts)
    except (UsageError, FederationError) as error:
        return str(error)
    return None


def require_labels(method: MethodDescription, facts: Mapping[str, SiteFacts]) -> None:
    """Make sure that the sites have the labels that a method needs.

    Args:
        method: description of the method.
        facts: node id to the site's facts.

    Raises: UsageError if no site has them.
    """
    if method.needs_public:
        return
    held = held_labels(facts)
    if not held - {"none"}:
        raise UsageError(f"0 of {len(facts)} sites have labels; {method.name} needs labels at one site or more")
    if method.needs_dense and "dense" not in held:
        raise UsageError(f"0 of {len(facts)} sites have dense labels; {method.name} needs at least one")
    if method.needs_fixations and "gaze" not in held:
        raise UsageError(f"0 of {len(facts)} sites have fixations; {method.name} needs them at one site or more")


def require_common_public_slices(facts: Mapping[str, SiteFacts], expected: str | None = None) -> None:
    """Make sure that all sites have the same public slices.

    Args:
        facts: node id to the site's facts.
        expected: SHA-256 of the researcher's public slices; None takes what most sites have.

    Raises: FederationError that names the sites with other public slices, or without any.
    """
    digests = [site.public_digest for site in facts.values() if site.public_digest]
    wanted = expected or max(sorted(digests), key=digests.count, default=None)
    if lacking := sorted(node for node, site in facts.items() if wanted is None or site.public_digest != wanted):
        nodes = ", ".join(lacking)
        raise FederationError(f"{nodes}: other or no public slices; run `fedfactory site add --public STORE` there")


def agreed_modalities(method: str, facts: Mapping[str, SiteFacts]) -> list[str]:
    """The modalities of all sites, sorted.

    Raises: FederationError that names sites without a modality, UsageError if there is one modality only.
    """
    if lacking := sorted(node for node, known in facts.items() if not known.modalities):
        nodes = ", ".join(lacking)
        raise FederationError(f"{nodes}: no modality registered; run `fedfactory site add --modality NAME` there")
    names = sorted({name for known in facts.values() for name in known.modalities})
    if len(names) < 2:
        raise UsageError(f"{method} needs two modalities; all sites have {names[0]} only")
    return names


def agreed_classes(
    method: MethodDescription,
    facts: Mapping[str, SiteFacts],
    public: int | None = None,
    *,
    wanted: int | None = None,
) -> int:
    """The number of label values, background included, that a method trains with.

    Args:
        method: description of the method; the labels of modalities count for those that need modalities.
        facts: node id to the site's facts.
        public: number of label values of the public slices; None without any.
        wanted: number that the researcher asks for, with which sites may have fewer; None asks for agreement.

    Raises: FederationError if sites' labels differ in number, UsageError if `wanted` is below the largest.
    """
    parts: dict[str, SiteFacts | ModalityFacts] = dict(facts)
    if method.needs_modalities:
        parts |= {f"{node} {name}": part for node, site in facts.items() for name, part in site.modalities.items()}
    largest = max(2, public or 0, *(part.classes for part in parts.values()))
    if wanted is not None:
        if wanted < largest:
            raise UsageError(f"classes is {wanted}; the sites' labels have {largest} values, background included")
        return wanted
    numbers = label_numbers(parts) | ({"public slices": public} if public is not None and public > 1 else {})
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{node}: {count}" for node, count in sorted(numbers.items()))
        raise FederationError(
            f"sites do not agree on the number of label values ({listed}); prepare all with the same labels, or give "
            f"`classes` {largest} if some sites only lack cases of the last structures"
        )
    return largest


def _require_public(
    method: str, facts: Mapping[str, SiteFacts], public: SliceStore | None, of_sites: SiteFacts
) -> None:
    if public is None:
        raise UsageError(f"public is None; {method} needs labelled slices that all sites have registered too")
    for name in ("size", "channels", "colour"):
        ours, theirs = getattr(public.format, name), getattr(of_sites, name)
        if ours != theirs:
            raise UsageError(f"{public.path}: {name} of the public slices is {ours}; it must be the sites', {theirs}")
    if set(public.label_kinds()) != {"dense"}:
        raise UsageError(f"{public.path}: public slices need dense labels; choose a store where all have them")
    require_common_public_slices(facts, digest(public))


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
