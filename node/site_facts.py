"""What a site announces about its slices, so that the researcher sees before the first round whether sites agree."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from reprlib import repr as shortened

from .. import __version__
from ..adaptation.network_names import check_modality, parts_of_site_network
from ..common.json_text import parse_json
from ..common.names import check_label, check_name
from ..errors import ConfigError
from .site_choices import SiteChoices, digest
from .site_data.single_objects import single_objects_of
from .store.derived.pseudo_labels import pseudo_label_facts
from .store.prepare_config import LABEL_KINDS
from .store.slice_store import SliceStore

INTRODUCTION = "fedfactory slice store "  # how the description of a registered store begins
CONVENTIONS = ("plane", "crop", "compatibility", "intensities")  # that all sites of an experiment should share
INTENSITIES = "standardised per volume, 0.1 to 99.9 % of the site"
MAX_COUNT = 2**31
MAX_TEXT_LENGTH = 200
MAX_NAMES = 256  # of classes
MAX_SPACING = 1000.0  # millimetres per pixel
LABEL_VALUE = re.compile(r"[0-9]{1,3}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModalityFacts:
    """What a site announces about its slices of one modality.

    Attributes:
        slices: number of training slices.
        classes: number of label values including background; 0 without labels.
        label_kinds: kind of label to number of training slices.
    """

    slices: int
    classes: int
    label_kinds: dict[str, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModalityFacts:
        """Raises: ConfigError for missing or impossible values."""
        return cls(
            slices=_whole_number(values, "slices", least=0),
            classes=_whole_number(values, "classes", least=0),
            label_kinds=checked_label_kinds(values.get("label_kinds")),
        )


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What a site announces about its store, without a path and without a case name.

    Attributes:
        version: of fedfactory at the site.
        domain: name of the site's scanner, modality or organ.
        size: pixels per side of a slice.
        z_bins: number of height bins.
        channels: number of channels of a slice.
        colour: whether these are red, green and blue.
        plane: which plane a slice shows.
        crop: how volumes were cropped.
        compatibility: whether slices were made as the published program made them.
        intensities: how intensities were scaled.
        slices: number of training slices.
        classes: number of label values including background; 0 without labels.
        label_kinds: kind of label to number of training slices.
        patients: number of training patients; None if the site announced none.
        spacing: millimetres per pixel; None if the site announced none.
        class_names: name by label value, of the classes whose names the site announces.
        network: that the site chose for itself; None leaves it to the researcher.
        public_digest: SHA-256 of the public slices that the site holds; None without any.
        single_objects: labels of the structures that are one connected object in the training volumes, see
            `learn_single_objects`; None where no volume has dense labels.
        modalities: name to facts, for a site that named the modality of its slices.
        pseudo_labels: number of training slices with pseudo-labels, which are no annotations; see `PseudoLabelFacts`.
    """

    version: str
    domain: str
    size: int
    z_bins: int
    channels: int
    colour: bool
    plane: str
    crop: str
    compatibility: str
    intensities: str
    slices: int
    classes: int
    label_kinds: dict[str, int]
    patients: int | None = None
    spacing: float | None = None
    class_names: dict[str, str] = field(default_factory=dict)
    network: str | None = None
    public_digest: str | None = None
    single_objects: tuple[int, ...] | None = None
    modalities: dict[str, ModalityFacts] = field(default_factory=dict)
    pseudo_labels: int = 0

    def to_dict(self) -> dict[str, object]:
        """As JSON gives it back: with lists, no tuples."""
        single = None if self.single_objects is None else list(self.single_objects)
        return {**asdict(self), "single_objects": single}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SiteFacts:
        """Read what a site announced. Additional entries are ignored: a site with another version may announce more.

        Args:
            values: parsed JSON that came from the network.

        Raises: ConfigError for missing or impossible values.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"what a site announces is {shortened(values)}; it must be a table")
        return cls(
            domain=check_name("domain", values.get("domain")),
            **{name: _text(values, name) for name in ("version", *CONVENTIONS)},
            **{name: _whole_number(values, name, least=1) for name in ("size", "z_bins", "channels")},
            colour=_yes_or_no(values, "colour"),
            **{name: _whole_number(values, name, least=0) for name in ("slices", "classes")},
            label_kinds=checked_label_kinds(values.get("label_kinds")),
            patients=None if values.get("patients") is None else _whole_number(values, "patients", least=0),
            spacing=_spacing(values.get("spacing")),
            class_names=_class_names(values.get("class_names", {})),
            network=_network(values.get("network")),
            public_digest=checked_digest(values.get("public_digest")),
            single_objects=_single_objects(values.get("single_objects")),
            modalities=_modalities(values.get("modalities")),
            pseudo_labels=_whole_number({"pseudo_labels": 0, **values}, "pseudo_labels", least=0),
        )


def store_facts(store: SliceStore, choices: SiteChoices) -> SiteFacts:
    """What a researcher must know of a store to see whether sites agree."""
    fmt, pseudo = store.format, pseudo_label_facts(store)
    return SiteFacts(
        version=__version__,
        domain=store.domain,
        size=fmt.size,
        z_bins=fmt.z_bins,
        channels=fmt.channels,
        colour=fmt.colour,
        plane=fmt.plane,
        crop=fmt.crop,
        compatibility=fmt.compatibility,
        intensities=INTENSITIES,
        slices=len(store.slices("train")),
        classes=store.classes,
        label_kinds=store.label_kinds(),
        patients=len({case.patient for case in store.cases if case.split == "train" and case.count}),
        spacing=fmt.spacing,
        class_names=_announced_names(store) if choices.announce_class_names else {},
        network=choices.network or None,
        public_digest=digest(SliceStore(choices.public)) if choices.public else None,
        single_objects=single_objects_of(store),
        modalities={
            name: ModalityFacts(slices=len(part.slices("train")), classes=part.classes, label_kinds=part.label_kinds())
            for name, part in choices.stores(store).items()
        },
        pseudo_labels=0 if pseudo is None else pseudo.slices,
    )


def description_of(facts: SiteFacts) -> str:
    """The description under which a store is registered: one line that `read_facts` reads back."""
    return INTRODUCTION + json.dumps(facts.to_dict())


def read_facts(description: str) -> SiteFacts | None:
    """The facts in a description; None if they are damaged or if something else wrote the description."""
    try:
        return SiteFacts.from_dict(parse_json(description.removeprefix(INTRODUCTION)))
    except (ConfigError, ValueError, AttributeError, RecursionError):
        return None


def checked_label_kinds(value: object) -> dict[str, int]:
    """Kind of label to number of slices, from parsed JSON. Raises: ConfigError for anything else."""
    if not isinstance(value, dict):
        raise ConfigError(f"label_kinds is {shortened(value)}; it must be a table of kinds and numbers of slices")
    if not value.keys() <= set(LABEL_KINDS):
        raise ConfigError(f"label_kinds is {shortened(value)}; choose kinds from {', '.join(LABEL_KINDS)}")
    return {kind: _whole_number(value, kind, least=0) for kind in value}


def checked_digest(value: object) -> str | None:
    """A SHA-256 as 64 hexadecimal digits, or None, from parsed JSON. Raises: ConfigError for anything else."""
    if value is None or (isinstance(value, str) and SHA256.fullmatch(value)):
        return value
    raise ConfigError(f"public_digest is {shortened(value)}; it must be a SHA-256 of 64 hexadecimal digits")


def _whole_number(values: Mapping[str, object], name: str, *, least: int) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
        raise ConfigError(f"{name} is {shortened(value)}; it must be a whole number from {least} to {MAX_COUNT}")
    return value


def _yes_or_no(values: Mapping[str, object], name: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shortened(value)}; it must be true or false")
    return value


def _text(values: Mapping[str, object], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT_LENGTH or not value.isprintable():
        raise ConfigError(f"{name} is {shortened(value)}; it must have 1 to {MAX_TEXT_LENGTH} printable characters")
    return value


def _network(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"network is {shortened(value)}; it must be the name of a network")
    parts_of_site_network(value)
    return value


def _single_objects(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(type(label) is int and 0 <= label <= 254 for label in value):
        raise ConfigError(f"single_objects is {shortened(value)}; it must be a list of labels from 0 to 254")
    return tuple(value)


def _announced_names(store: SliceStore) -> dict[str, str]:
    return {str(value): name for value, name in sorted(store.class_names.items()) if value < store.classes}


def _class_names(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise ConfigError(f"class_names is {shortened(value)}; it must be a table of at most {MAX_NAMES} names")
    for number, name in value.items():
        if not isinstance(number, str) or not LABEL_VALUE.fullmatch(number):
            raise ConfigError(f"class_names has {shortened(number)}; it must have numbers from 0 to 255")
        check_label(f"the name of class {number}", name)
    return dict(value)


def _spacing(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SPACING:
        raise ConfigError(f"spacing is {shortened(value)}; it must be a number above 0, at most {MAX_SPACING:g} mm")
    return float(value)


def _modalities(value: object) -> dict[str, ModalityFacts]:
    if not isinstance(value, dict) or not all(isinstance(facts, dict) for facts in value.values()):
        raise ConfigError(f"modalities is {shortened(value)}; it must be a table of names and facts")
    for name in value:
        check_modality(name)
    return {name: ModalityFacts.from_dict(facts) for name, facts in value.items()}
