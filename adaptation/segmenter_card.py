"""What a segmenter's file records besides the weights: how to build the network, and what it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..common.names import check_name
from ..common.records import read_record, record_to_dict
from ..errors import ConfigError
from ..generative.config import FactoryConfig
from ..imaging.class_names import check_names
from ..imaging.formats.label_values import LARGEST
from .engine.training_plan import TrainingPlan
from .engine.window_inference import SHIFTED_VIEWS
from .methods.interface.method_config import MethodConfig
from .methods.interface.site_round import SiteContext
from .networks.translator_network import EncoderConfig

TRANSLATOR, FEDERATED = "translator", "federated"  # the networks that no training plan describes
MAX_CLASSES = 255  # labels are bytes, and 255 means unlabelled


@dataclass(frozen=True, kw_only=True)
class TranslatorDesign:
    """What a translator network is built from.

    Attributes:
        factory: configuration of the generator that decodes.
        domains: indices of the labelled domain and of the site's domain in that factory.
        encoder: size of the encoder.
    """

    factory: FactoryConfig
    domains: tuple[int, int]
    encoder: EncoderConfig


@dataclass(frozen=True, kw_only=True)
class FederatedDesign:
    """What the network of a federated segmentation method is built from.

    Attributes:
        method: the method and its settings.
        context: whose segmenter it is: site, network and modality.
        weights: "global" (the aggregated model), "own" (the site's own) or "server" (trained at the researcher).
    """

    method: MethodConfig
    context: SiteContext
    weights: str = "global"


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Which data a segmenter was trained on.

    Attributes:
        domain: of the images that it segments.
        slices: number of slices in the training set: synthetic ones, and the site's own with pseudo-labels.
        source: where they came from: "factory", "own slices" (with the first guess's labels), "factory and own slices",
            "synthetic volumes", or "" for the site's own labelled slices.
        labelled_slices: number of the site's own labelled slices added to them.
        chosen_by: by which slices the best state was chosen.
        centred: whether slices are cut around given places, such as a localiser's.
        continued: whether the training began with the network of a first guess, not with random weights.
        epsilon: of the differential privacy of the site's training patients, up to and with the round that wrote the
            file; None for a training without.
        delta: of the same.
    """

    domain: str = ""
    slices: int = 0
    source: str = ""
    labelled_slices: int = 0
    chosen_by: str = ""
    centred: bool = False
    continued: bool = False
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if self.domain:
            check_name("domain", self.domain)


@dataclass(frozen=True, kw_only=True)
class ChosenState:
    """The state of the training that was kept.

    Attributes:
        update: its number, from 1.
        score: mean foreground Dice on validation slices, in [0, 1]; None if there were none.
    """

    update: int
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class SiteAssessment:
    """How well factory and segmenter fit a site's images, computed without labels.

    Attributes:
        quality: distances of synthetic to real slices by name, see `SiteQuality`.
        explained: share of grey-level variance that predicted classes explain, in [0, 1]: by the segmenter ("adapted")
            and by the labelled site's segmenter ("first_guess"), see `explained_intensity`.
        agreement: mean foreground Dice, in [0, 1], of the first guess's labels in single views, turned, mirrored or
            shifted, with those of the mean of all views; NaN where it knows one view only, or finds nothing.
        alarms: reasons to doubt the segmenter, one sentence each.
    """

    quality: dict[str, float]
    explained: dict[str, float]
    agreement: float
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SegmenterCard:
    """The record kept with a segmenter's weights.

    Raises: ConfigError for an unknown network or an impossible number of classes.

    Attributes:
        classes: number of label values, background included; 2 to 255.
        network: "translator", "federated", or the name of a planned network (see `network_names.NETWORKS`).
        plan: network and training of a planned segmenter; None for other networks.
        translator: what a translator is built from; None for other networks.
        federated: what a federated method's network is built from; None for other networks.
        settings: of the training, see `SegmenterConfig` and `TranslatorConfig`.
        training: which data it was trained on.
        chosen: the state that was kept; None where no choice was made.
        assessment: how well it fits the site's images; None where nobody computed it.
        single_objects: labels of the structures of which only the largest connected object is kept; 0 stands for all
            structures together. Learnt from the labelled site, see `learn_single_objects`.
        class_names: name by label value, of the classes that have one at the labelled site.
        original_values: value of each class in the labelled site's files, where these are no class numbers, see
            `LabelValues.originals`; otherwise empty.
        volumes: of a localiser, smallest and largest volume of all structures together among the cases that it was
            trained on, millilitres; None where nobody recorded them.
    """

    classes: int
    network: str
    plan: TrainingPlan | None = None
    translator: TranslatorDesign | None = None
    federated: FederatedDesign | None = None
    settings: dict[str, object] = field(default_factory=dict)
    training: TrainingFacts = field(default_factory=TrainingFacts)
    chosen: ChosenState | None = None
    assessment: SiteAssessment | None = None
    single_objects: tuple[int, ...] = ()
    class_names: dict[str, str] = field(default_factory=dict)
    original_values: dict[str, int] = field(default_factory=dict)
    volumes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        planned = self.network if self.plan is None else self.plan.network
        if self.network != planned or (self.plan is None) != (self.network in (TRANSLATOR, FEDERATED)):
            raise ConfigError(
                f"network is '{self.network}'; it must be that of the plan, or without plan {TRANSLATOR} or {FEDERATED}"
            )
        if self.plan is not None and self.plan.classes != self.classes:
            raise ConfigError(f"classes is {self.classes}, but {self.plan.classes} in the plan; both must be equal")
        try:
            check_names(self.names)
        except ValueError as error:
            raise ConfigError(f"class_names is {self.class_names}; its keys must be label values ({error})") from None
        for label, value in self.original_values.items():
            if not (label.isascii() and label.isdecimal() and int(label) < MAX_CLASSES and abs(value) <= LARGEST):
                raise ConfigError(f"original_values has {label}: {value}; it must be whole numbers by label value")
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ConfigError(f"classes is {self.classes}; it must be from 2 to {MAX_CLASSES}, background included")

    @property
    def channels(self) -> int | None:
        """Channels of the slices that the network takes; None where a federated method's own settings tell."""
        if self.translator is not None:
            return self.translator.factory.image_channels
        return None if self.plan is None else self.plan.channels

    @property
    def names(self) -> dict[int, str]:
        """Name by label value; classes without a name are missing."""
        return {int(value): name for value, name in self.class_names.items()}

    @property
    def originals(self) -> dict[int, int]:
        """The labelled site's own value of each class; empty where the values are class numbers."""
        return {int(label): value for label, value in self.original_values.items()}

    @property
    def views(self) -> tuple[int, ...]:
        """Views of an image in which the network was trained: 0 to 3 quarter turns, 4 to 7 their mirror images; where
        a planned or a federated network knows no quarter turns, also 8 to 11, shifted by a few pixels."""
        trained = self.plan if self.federated is None else self.federated.method
        if trained is None:
            given = self.settings.get("rotation", 0.0)
            rotation, mirror = given if isinstance(given, (int, float)) else 0.0, bool(self.settings.get("mirror"))
        else:
            rotation, mirror = trained.rotation, trained.mirror
        turns = tuple(range(4)) if rotation >= math.pi else (0,)
        mirrored = tuple(4 + view for view in turns) if mirror else ()
        shifted = () if trained is None or len(turns) > 1 else SHIFTED_VIEWS
        return (*turns, *mirrored, *shifted)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the inverse of `from_dict`."""
        return record_to_dict(self)

    @classmethod
    def from_dict(cls, values: object) -> SegmenterCard:
        """The card in a file or message, whose other entries are ignored.

        Raises: ConfigError for missing or wrongly typed entries.
        """
        return read_record(cls, values, extra="ignore")
