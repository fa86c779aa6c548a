"""Phase two at a site: a segmenter for its own images from a labelled factory, while no other site is online."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adaptation.adapt import adapt, draw_slices, read_synthetic, synthetic_labels, training_set
from ..adaptation.choices import ENGINES
from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..adaptation.engine.training_loop import LoopConfig
from ..adaptation.explained_intensity import explained_intensity
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.labelled_slices import LabelledSlices, joined
from ..adaptation.network_names import dimensions
from ..adaptation.networks.translator_network import EncoderConfig
from ..adaptation.segmenter import Segmenter
from ..adaptation.segmenter_card import SiteAssessment, TrainingFacts
from ..adaptation.training.segmenter_training import SegmenterData
from ..adaptation.training.translator_training import TranslatorConfig, TranslatorData, train_translator
from ..errors import ConfigError, StoreError, UsageError
from ..generative.metrics.alarm import MIN_SHARED_ANATOMY, alarms
from ..generative.metrics.quality import site_quality
from ..generative.metrics.shared_anatomy import shared_anatomy
from .labelling import labelled_slices
from .store.derived.pseudo_labels import pseudo_label_facts
from .store.slice_store import SliceStore

NUM_EVALUATIONS = 5  # of a training that chooses among its states
OWN_LABELLED_SHARE = 0.25  # of a batch: the site's own labelled slices, if there are any
VALIDATION_VOLUMES = 10  # synthetic subjects on which states are compared
VALIDATION_SEED_OFFSET = 1_000_000  # from the seeds of the subjects that are trained on
# The adapted segmenter's explained grey levels over those of the first guess: good runs had at least 1.07, bad ones
# at most 0.65.
MIN_EXPLAINED_RATIO = 0.85
# Of the six first guesses of a study at two sites, those with at most this agreement of views had Dice below .55.
DOUBTFUL_AGREEMENT = 0.8
FACTORY_AND_OWN, OWN_SLICES = "factory and own slices", "own slices"  # what a segmenter was trained on


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a site gets its segmenter.

    Attributes:
        engine: "segmenter" trains a network on labelled synthetic slices of the site's domain and on the site's own
            slices with pseudo-labels; "translator" (published) trains an encoder that translates the site's slices
            into the labelled domain, where the factory's label branch segments them.
        segmenter: how a segmenter is trained.
        translator: how a translator is trained.
        volumes: number of synthetic subjects to draw, at least 1.
        one_target_slice: train also on the middle labelled slice of each of the site's labelled training cases.
        keep: number of states to return, 1 to NUM_EVALUATIONS, the best ones on synthetic validation slices; 1 returns
            the last state.
        patience: evaluations without a better state after which training stops; 0 trains to the end.

    Raises: ConfigError for an unknown engine or a value out of range.
    """

    engine: str = "segmenter"
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    volumes: int = 90
    one_target_slice: bool = False
    keep: int = 1
    patience: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine is '{self.engine}'; choose one of {', '.join(ENGINES)}")
        if self.volumes < 1:
            raise ConfigError(f"volumes is {self.volumes}; it must be at least 1")
        if not 1 <= self.keep <= NUM_EVALUATIONS:
            raise ConfigError(f"keep is {self.keep}; it must be from 1 to {NUM_EVALUATIONS}")
        if self.patience < 0:
            raise ConfigError(f"patience is {self.patience}; it must be at least 0")

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"segmenter": self.segmenter.to_dict(), "translator": self.translator.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Adaptation:
        """Raises: ConfigError for unknown or impossible settings."""
        try:
            translator = dict(values["translator"])
            encoder = EncoderConfig(**translator.pop("encoder"))
            parts = {
                "segmenter": SegmenterConfig.from_dict(values["segmenter"]),
                "translator": TranslatorConfig(encoder=encoder, **translator),
            }
            return cls(**{**values, **parts})
        except (KeyError, TypeError, UsageError) as error:
            raise ConfigError(f"these settings of an adaptation cannot be used ({error}); correct them") from None

    @property
    def validates(self) -> bool:
        """Whether states are compared on validation slices during the training."""
        return self.keep > 1 or self.patience > 0 or self.engine == "translator"

    def loop(self, folder: Path | None) -> LoopConfig:
        """How the training loop evaluates; `folder` keeps its curves and its unfinished state."""
        return LoopConfig(
            evaluations=NUM_EVALUATIONS if self.validates else 1,
            keep=self.keep,
            patience=self.patience,
            folder=folder,
        )


def adapt_site(
    store_dir: str | Path,
    out: str | Path,
    *,
    factory_file: str | Path | LabelledFactory | None = None,
    synthetic: str | Path | None = None,
    adaptation: Adaptation | None = None,
    work: Path | None = None,
    device: str = "cpu",
) -> Segmenter:
    """Train a site's segmenter and write it.

    With a labelled factory and the engine "segmenter", the factory's first guess is trained further: on the site's own
    slices with the first guess's labels, and on synthetic slices of the site's domain with the factory's labels (for
    the exceptions see `training_set`). With synthetic volumes, a network is trained on those alone.

    Args:
        store_dir: the site's own store; its labels are read for `one_target_slice` only.
        out: segmenter file to write; further states get `_2`, `_3` ... before the ending.
        factory_file: labelled factory, or its file. Give either this or `synthetic`.
        synthetic: folder written by `generate-volumes` for the site's domain.
        adaptation: settings; default: those of `Adaptation`.
        work: folder for curves and for the unfinished state, from which an interrupted run continues.
        device: PyTorch device to train on.

    Returns: the best segmenter.
    Raises: UsageError, StoreError or CheckpointError; then no segmenter is written.
    """
    if (factory_file is None) == (synthetic is None):
        raise UsageError(f"factory_file is {factory_file} and synthetic is {synthetic}; give exactly one of them")
    adaptation, store = adaptation or Adaptation(), SliceStore(store_dir)
    if adaptation.engine == "translator" and factory_file is None:
        raise UsageError(
            "factory_file is None; a translator needs the factory itself, synthetic volumes are not enough"
        )
    if work is not None and adaptation.segmenter.minutes is not None:
        raise UsageError(
            f"minutes is {adaptation.segmenter.minutes} and `work` is {work}; give `updates`: an interrupted run "
            "continues with the number of updates that it began with"
        )
    if not len(store.slices("train")):
        raise StoreError(f"{store.path}: has no training slices; prepare it with cases in the training split")
    few = _one_labelled_slice_per_case(store) if adaptation.one_target_slice else None
    labelled = None
    if factory_file is not None:
        labelled = _open_factory(factory_file, store, few, translator=adaptation.engine == "translator")
    if labelled is None:
        labels = synthetic_labels(synthetic)
    else:
        card = labelled.robust.card
        labels = {"class_names": card.class_names, "original_values": card.original_values}
    facts = TrainingFacts(
        source="factory" if labelled is not None else "synthetic volumes",
        labelled_slices=0 if few is None else len(few.images),
        centred=store.centred,
        chosen_by="synthetic slices that are not trained on" if adaptation.validates else "nothing: the last state",
    )
    training = {"few": few, "loop": adaptation.loop(work), "device": device, "facts": facts}
    if adaptation.engine == "translator":
        segmenters = _train_translators(store, labelled, adaptation, **training)
    else:
        segmenters = _train_segmenters(store, labelled, synthetic, adaptation=adaptation, **training)
    for segmenter in segmenters:
        assessment = None if labelled is None else assess(store, labelled, segmenter)
        segmenter.card = replace(segmenter.card, assessment=assessment, **labels)
    out = Path(out)
    for number, segmenter in enumerate(segmenters, start=1):
        segmenter.save(out if number == 1 else out.with_name(f"{out.stem}_{number}{out.suffix}"))
    return segmenters[0]


def assess(store: SliceStore, labelled: LabelledFactory, segmenter: Segmenter) -> SiteAssessment:
    """How well factory and segmenter fit the site's images, computed without a label."""
    chosen = store.slices("train")
    images, factory = store.images[chosen].astype(np.float32), labelled.factory
    domain = factory.config.domain_index(store.domain)
    z_bin = torch.from_numpy(store.z_bin[chosen])
    quality = site_quality(factory.generator, torch.from_numpy(images), z_bin, domain=domain)
    found = alarms(store.domain, quality, _shared_with_labelled(store, labelled))
    volume = store.volume_of_slices()[chosen]
    adapted, first_guess = (explained_intensity(images, model, volume) for model in (segmenter, labelled.robust))
    if adapted < MIN_EXPLAINED_RATIO * first_guess:
        found.append(
            f"{store.domain}: the adapted segmenter's classes explain {adapted:.0%} of the images' grey levels, those "
            f"of the labelled site's segmenter {first_guess:.0%}"
        )
    explained = {"adapted": adapted, "first_guess": first_guess}
    agreement = labelled.robust.agreement(torch.from_numpy(images), volume)
    if len(labelled.robust.card.views) > 1 and math.isnan(agreement):
        found.append(f"{store.domain}: the first guess finds no structure in the site's images")
    elif agreement <= DOUBTFUL_AGREEMENT:
        found.append(
            f"{store.domain}: turned, mirrored or shifted images get other labels by the first guess (Dice "
            f"{agreement:.2f}; good segmenters had more than {DOUBTFUL_AGREEMENT})"
        )
    return SiteAssessment(quality=quality.to_dict(), explained=explained, agreement=agreement, alarms=tuple(found))


def _shared_with_labelled(store: SliceStore, labelled: LabelledFactory) -> float | None:
    """The `shared_anatomy` of a store's domain and the labelled one; None if no label crosses from one to the other.

    None crosses where labels are read in the domain's own view, or are drawn by a factory that was trained with
    pseudo-labels, at a site that has some: there the site's own discriminator saw image and label together.
    """
    config = labelled.factory.config
    if config.classes:  # labels are drawn with the image: what they look like was learnt where labels are
        if config.pseudo_labels and pseudo_label_facts(store) is not None:
            return None
    elif labelled.card.labels_from[store.domain] != "view":
        return None
    pair, scores = {store.domain, labelled.card.labelled_domain}, shared_anatomy(labelled.factory.generator)
    return next((score for names, score in scores.items() if set(names) == pair), None)


def _open_factory(
    factory: str | Path | LabelledFactory, store: SliceStore, few: LabelledSlices | None, *, translator: bool
) -> LabelledFactory:
    """The labelled factory, checked against the store, the site's own labelled slices and the engine."""
    labelled = factory if isinstance(factory, LabelledFactory) else LabelledFactory.load(factory)
    labelled.factory.config.domain_index(store.domain)
    store.require_factory(labelled.factory.config)
    if translator and not labelled.branches:
        raise UsageError(
            "engine is 'translator', which segments by the label branch; this factory draws labels itself and has "
            "none, choose the engine 'segmenter'"
        )
    _require_classes(few, labelled.card.classes, store)
    return labelled


def _train_segmenters(
    store: SliceStore,
    labelled: LabelledFactory | None,
    synthetic: str | Path | None,
    *,
    adaptation: Adaptation,
    few: LabelledSlices | None,
    facts: TrainingFacts,
    **training: Any,
) -> list[Segmenter]:
    """Segmenters, the best first, from a labelled factory or from a folder of synthetic volumes."""
    config, validation = adaptation.segmenter, None
    if labelled is not None:
        # A factory that does not mirror its slices is one of organs with a left and a right, see `label_factory`.
        if not labelled.factory.config.mirror:
            config = replace(config, mirror=False)
        data, validation = _draw_training_set(store, labelled, adaptation)
        own = data.start is not None  # the first guess is trained further on own slices
        facts = replace(facts, source=FACTORY_AND_OWN if data.further else OWN_SLICES if own else facts.source)
    else:
        drawn = read_synthetic(synthetic, store.domain)
        _require_classes(few, drawn.classes, store)
        if adaptation.validates:
            drawn, validation = _split_volumes(drawn)
        data = SegmenterData(labelled=drawn)
    further = data.further if few is None else (*data.further, (few, OWN_LABELLED_SHARE))
    data = replace(data, further=further, validation=validation)
    return adapt(store.format, store.domain, data, config=config, facts=facts, **training)


def _draw_training_set(
    store: SliceStore, labelled: LabelledFactory, adaptation: Adaptation
) -> tuple[SegmenterData, LabelledSlices | None]:
    """What a segmenter is trained on, and the synthetic slices on which its states are compared."""
    seed = adaptation.segmenter.seed
    slices = None
    if dimensions(adaptation.segmenter.network) == 3:  # as many as the site's own volumes have
        slices = max(2, round(float(np.median([case.count for case in store.cases]))))
    drawn = draw_slices(labelled, store.domain, volumes=adaptation.volumes, seed=seed, slices=slices)
    chosen = store.slices("train")
    images, volume = store.images[chosen].astype(np.float32), store.volume_of_slices()[chosen]
    shared = _shared_with_labelled(store, labelled)
    carry_over = shared is None or shared >= MIN_SHARED_ANATOMY
    data = training_set(images, drawn, labelled.robust, volume=volume, labels_carry_over=carry_over)
    if not adaptation.validates:
        return data, None
    seed += VALIDATION_SEED_OFFSET
    return data, draw_slices(labelled, store.domain, volumes=VALIDATION_VOLUMES, seed=seed, slices=slices)


def _train_translators(
    store: SliceStore,
    labelled: LabelledFactory,
    adaptation: Adaptation,
    *,
    few: LabelledSlices | None,
    **training: Any,
) -> list[Segmenter]:
    """Translators, the best first."""
    config, labelled_domain = adaptation.translator, labelled.card.labelled_domain
    source = draw_slices(labelled, labelled_domain, volumes=adaptation.volumes, seed=config.seed)
    validation = draw_slices(
        labelled, labelled_domain, volumes=VALIDATION_VOLUMES, seed=config.seed + VALIDATION_SEED_OFFSET
    )
    own = store.images[store.slices("train")]
    if config.target_synthesis:
        drawn = draw_slices(labelled, store.domain, volumes=adaptation.volumes, seed=config.seed)
        few = drawn if few is None else joined(drawn, few)
    data = TranslatorData(source=source, validation=validation, unlabelled=own, own_labelled=few)
    return train_translator(labelled, store.domain, store.format, config=config, data=data, **training)


def _one_labelled_slice_per_case(store: SliceStore) -> LabelledSlices:
    """The middle one of the slices with foreground, of every labelled training case.

    Raises: StoreError if there is none.
    """
    data = labelled_slices(store)
    chosen, volume = store.labelled_slices("train"), store.volume_of_slices()
    found = []
    for number in np.unique(volume[chosen]):
        of_case = [n for n in np.flatnonzero(volume[chosen] == number) if (data.labels[n] > 0).any()]
        if of_case:
            found.append(of_case[len(of_case) // 2])
    if not found:
        raise StoreError(f"{store.path}: one_target_slice needs a slice with foreground, and no training case has any")
    return LabelledSlices(data.images[found], data.labels[found], data.classes)


def _require_classes(few: LabelledSlices | None, classes: int, store: SliceStore) -> None:
    if few is not None and few.classes != classes:
        raise StoreError(
            f"{store.path}: its labels have {few.classes} values, the synthetic ones {classes}; both must be equal"
        )


def _split_volumes(data: LabelledSlices) -> tuple[LabelledSlices, LabelledSlices]:
    """All but the last tenth of the volumes, and that tenth. Raises: UsageError for a single volume."""
    numbers = np.unique(data.volume)
    if len(numbers) < 2:
        raise UsageError(f"the number of synthetic volumes is {len(numbers)}; choosing among states needs at least 2")
    held_out = np.isin(data.volume, numbers[-max(1, len(numbers) // 10) :])
    return data.part(~held_out), data.part(held_out)
