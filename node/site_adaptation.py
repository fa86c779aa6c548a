"""Phase two at a site: its own segmenter from a labelled factory; no other site need be online."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adaptation.adapt import adapt, draw_slices, mix, read_synthetic, training_set
from ..adaptation.choices import ENGINES
from ..adaptation.explained_intensity import explained_intensity
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.labelled_slices import LabelledSlices
from ..adaptation.networks.network_names import dimensions
from ..adaptation.networks.translator_network import EncoderConfig
from ..adaptation.segmenter import Segmenter
from ..adaptation.segmenter_card import SiteAssessment, TrainingFacts
from ..adaptation.training.segmenter_training import SegmenterConfig, SegmenterData
from ..adaptation.training.training_loop import LoopConfig
from ..adaptation.training.translator_training import TranslatorConfig, TranslatorData, train_translator
from ..errors import ConfigError, StoreError, UsageError
from ..generative.metrics.alarm import alarms
from ..generative.metrics.quality import site_quality
from ..generative.metrics.shared_anatomy import shared_anatomy
from .labelling import labelled_slices
from .store.slice_store import SliceStore

EVALUATIONS = 5  # at a training whose states are validation
VALIDATION_SAMPLES = 10  # synthetic subjects they are judged by
FAR = 1_000_000  # from the seeds of those that are trained on
EXPLAINED = 0.85  # of what the first guess explains; good runs had 1.07 and more, bad ones .65 at most


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a site gets its segmenter. Raises: ConfigError for an unknown engine, or where it cannot do what is asked.

    Attributes:
        engine: "segmenter": a network learns from labelled synthetic slices of the site's domain and from the site's
            own with another site's guess; "translator": an encoder learns to show the site's slices as the labelled
            domain's, and the factory's label branch reads them (the published way).
        segmenter, translator: how each is trained.
        volumes: synthetic subjects to draw.
        one_target_slice: learn also from the middle labelled slice of each of the site's labelled training cases.
        keep: states to keep, the best ones on synthetic slices that are not trained on; 1 keeps the last.
        patience: looks without a better state after which training stops; 0 trains to the end.
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
        if self.volumes < 1 or not 1 <= self.keep <= EVALUATIONS or self.patience < 0:
            raise ConfigError(f"volumes must be at least 1, keep from 1 to {EVALUATIONS}, patience not negative")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"translator": self.translator.to_dict()}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Adaptation:
        """Raises: ConfigError for unknown or impossible settings."""
        try:
            translator = dict(given["translator"])
            encoder = EncoderConfig(**translator.pop("encoder"))
            parts = {
                "segmenter": SegmenterConfig(**given["segmenter"]),
                "translator": TranslatorConfig(encoder=encoder, **translator),
            }
            return cls(**{**given, **parts})
        except (KeyError, TypeError, UsageError) as error:
            raise ConfigError(f"these settings of an adaptation are not usable ({error})") from None

    @property
    def choosing(self) -> bool:
        """Whether states are validation."""
        return self.keep > 1 or self.patience > 0 or self.engine == "translator"

    def loop(self, folder: Path | None) -> LoopConfig:
        return LoopConfig(
            evaluations=EVALUATIONS if self.choosing else 1, keep=self.keep, patience=self.patience, folder=folder
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
    """Phase two at a site.

    With a factory and the engine "segmenter", half of the training is synthetic slices of the site's domain with the
    factory's labels, half the site's own slices with the robust segmenter's labels (for exceptions see
    `lessons`). The first know the tissue, the second the scanner. With synthetic volumes: those alone.

    Args:
        store_dir: the site's own store; its labels, if it has any, are read for `one_target_slice` alone.
        out: segmenter file; further states get `_2`, `_3` ... before the ending.
        factory_file: labelled factory to draw from, its file or itself, or
        synthetic: folder written by `generate-volumes` for the site's domain. Exactly one of the two.
        work: folder for curves and for the unfinished state, from which an interrupted run goes on.

    Returns: the best segmenter. Raises: UsageError, StoreError or CheckpointError; then no segmenter is written.
    """
    if (factory_file is None) == (synthetic is None):
        raise UsageError(f"factory_file is {factory_file} and synthetic is {synthetic}; give exactly one of them")
    adaptation, store = adaptation or Adaptation(), SliceStore(store_dir)
    if not len(store.slices("train")):
        raise StoreError(f"{store.path}: has no training slices to adapt to")
    few = _one_slice_each(store) if adaptation.one_target_slice else None
    labelled, validation = None, None
    if factory_file is not None:
        labelled = factory_file if isinstance(factory_file, LabelledFactory) else LabelledFactory.load(factory_file)
        labelled.factory.config.domain_index(store.domain)
        store.require(size=labelled.factory.config.image_size, z_bins=labelled.factory.config.z_bins)
        _require_classes(few, labelled.card.classes, store)
    facts = TrainingFacts(
        source="factory" if labelled is not None else "synthetic volumes",
        labelled_slices=0 if few is None else len(few.images),
        chosen_by="synthetic slices that are not trained on" if adaptation.choosing else "nothing: the last state",
    )
    loop = adaptation.loop(work)
    if adaptation.engine == "translator":
        if labelled is None:
            raise UsageError(
                "factory_file is None; a translator needs the factory itself, synthetic volumes are not enough"
            )
        made = _translators(store, labelled, adaptation, few, loop=loop, device=device, facts=facts)
    else:
        config = adaptation.segmenter
        if labelled is not None:
            data, validation = _drawn(store, labelled, adaptation)
        else:
            data = read_synthetic(synthetic, store.domain)
            _require_classes(few, data.classes, store)
            if adaptation.choosing:
                data, validation = _held_back(data)
        own = _own(store, data.classes) if config.self_training else None
        slices = SegmenterData(labelled=data, unlabelled=own, own_labelled=few, validation=validation)
        options = {"config": config, "facts": facts, "loop": loop, "device": device}
        made = adapt(store.format, store.domain, slices, **options)
    if labelled is not None:
        for one in made:
            one.card = replace(one.card, assessment=_assessment(store, labelled, one))
    out = Path(out)
    for number, one in enumerate(made, start=1):
        one.save(out if number == 1 else out.with_name(f"{out.stem}_{number}{out.suffix}"))
    return made[0]


def _drawn(
    store: SliceStore, labelled: LabelledFactory, adaptation: Adaptation
) -> tuple[LabelledSlices, LabelledSlices | None]:
    """What a segmenter learns from, and what its states are judged by."""
    seed = adaptation.segmenter.seed
    slices = None
    if dimensions(adaptation.segmenter.network) == 3:  # as many as the site's own volumes have
        slices = max(2, round(float(np.median([case.count for case in store.cases]))))
    drawn = draw_slices(labelled, store.domain, volumes=adaptation.volumes, seed=seed, slices=slices)
    own = _own(store, drawn.classes)
    where = (store.format, store.domain, adaptation.segmenter)
    data = training_set(own.images, drawn, labelled.robust, *where, own.volume)
    if not adaptation.choosing:
        return data, None
    return data, draw_slices(labelled, store.domain, volumes=VALIDATION_SAMPLES, seed=seed + FAR, slices=slices)


def _translators(
    store: SliceStore,
    labelled: LabelledFactory,
    adaptation: Adaptation,
    few: LabelledSlices | None,
    **training: Any,
) -> list[Segmenter]:
    config, home = adaptation.translator, labelled.card.labelled_domain
    source = draw_slices(labelled, home, volumes=adaptation.volumes, seed=config.seed)
    validation = draw_slices(labelled, home, volumes=VALIDATION_SAMPLES, seed=config.seed + FAR)
    own = store.images[store.slices("train")]
    if config.target_synthesis:
        drawn = draw_slices(labelled, store.domain, volumes=adaptation.volumes, seed=config.seed)
        few = drawn if few is None else mix(drawn, few)
    data = TranslatorData(source=source, validation=validation, unlabelled=own, own_labelled=few)
    return train_translator(labelled, store.domain, store.format, config=config, data=data, **training)


def _own(store: SliceStore, classes: int) -> LabelledSlices:
    """The site's training slices, without labels."""
    chosen = store.slices("train")
    images = store.images[chosen].astype(np.float32)
    return LabelledSlices(images, np.zeros(images.shape, np.uint8), classes, _volume_of(store)[chosen])


def _volume_of(store: SliceStore) -> np.ndarray:
    """(N,) number of the case that a slice belongs to."""
    volume = np.zeros(len(store), np.int64)
    for number, case in enumerate(store.cases):
        volume[case.first : case.first + case.count] = number
    return volume


def _one_slice_each(store: SliceStore) -> LabelledSlices:
    """The middle one of the slices with foreground, of every labelled training case.

    Raises: StoreError if there is none.
    """
    data = labelled_slices(store)
    chosen, volume = store.labelled_slices("train"), _volume_of(store)
    found = []
    for number in np.unique(volume[chosen]):
        mine = [n for n in np.flatnonzero(volume[chosen] == number) if (data.labels[n] > 0).any()]
        if mine:
            found.append(mine[len(mine) // 2])
    if not found:
        raise StoreError(f"{store.path}: one labelled slice is asked for, but no training case has any")
    return LabelledSlices(data.images[found], data.labels[found], data.classes)


def _require_classes(few: LabelledSlices | None, classes: int, store: SliceStore) -> None:
    if few is not None and few.classes != classes:
        raise StoreError(f"{store.path}: its labels have {few.classes} values, the synthetic ones {classes}")


def _held_back(data: LabelledSlices) -> tuple[LabelledSlices, LabelledSlices]:
    """All but a tenth of the volumes, and that tenth. Raises: UsageError for a single volume."""
    numbers = np.unique(data.volume)
    if len(numbers) < 2:
        raise UsageError("states can only be validation with at least two synthetic volumes")
    last = np.isin(data.volume, numbers[-max(1, len(numbers) // 10) :])
    return data.part(~last), data.part(last)


def _assessment(store: SliceStore, labelled: LabelledFactory, segmenter: Segmenter) -> SiteAssessment:
    """How well factory and segmenter fit the site's images, computed without a label."""
    chosen = store.slices("train")
    images, factory = store.images[chosen].astype(np.float32), labelled.factory
    domain = factory.config.domain_index(store.domain)
    z_bin = torch.from_numpy(store.z_bin[chosen])
    quality = site_quality(factory.generator, torch.from_numpy(images)[:, None], z_bin, domain=domain)
    home, shared = {store.domain, labelled.card.labelled_domain}, None
    if labelled.card.labels_from[store.domain] == "view":  # labels read in the domain's own view cross no domains
        shared = next((score for pair, score in shared_anatomy(factory.generator).items() if set(pair) == home), None)
    found = alarms(store.domain, quality, shared)
    volume = _volume_of(store)[chosen]
    own, guess = (explained_intensity(images, one, volume) for one in (segmenter, labelled.robust))
    if own < EXPLAINED * guess:
        found.append(
            f"{store.domain}: the adapted segmenter's classes explain {own:.0%} of the images' grey levels, those of "
            f"the labelled site's segmenter {guess:.0%}"
        )
    explained = {"adapted": own, "first_guess": guess}
    return SiteAssessment(quality=quality.to_dict(), explained=explained, alarms=tuple(found))
