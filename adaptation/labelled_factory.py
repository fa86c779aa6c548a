"""A factory that draws labelled slices, and its file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.records import read_record, record_to_dict
from ..common.sketches import sketch
from ..common.weights_file import IMPOSSIBLE, load_strictly, read_card, read_weights, refuse_misfit, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory_facts import FactoryFacts
from ..generative.factory_file import KIND as EXPORTED
from ..generative.factory_file import TrainedFactory, load_factory
from ..generative.networks.build import make_generator
from ..generative.networks.generator import Synthesis
from ..generative.synthesis import synthesise_volume
from .labelled_slices import LabelAgreement
from .networks.label_branch import BranchEnsemble, LabelBranch
from .segmenter import Segmenter
from .segmenter_card import MAX_CLASSES

MAX_BRANCHES = 20
KIND = "labelled factory"
VIEWS = ("view", "own")
LOCALISER, DISTILLED = "localiser.", "distilled."  # before the names of their weights
Labeller = Callable[[Synthesis], Tensor]  # of slices (B, C, S, S): their labels (B, S, S) uint8


@dataclass(frozen=True, kw_only=True)
class LabelledFactoryCard:
    """What is recorded with the label branches of a factory.

    Raises: ConfigError for an impossible number of classes, an unknown entry of `labels_from`, or scores of other
        classes.

    Attributes:
        classes: number of label values, background included; 2 to 255.
        labelled_domain: the domain whose labels the branches were trained with.
        agreement: mean foreground Dice of the branches' labels with the validation labels, in [0, 1]; NaN if those
            have no foreground.
        validated_on: which slices the validation labels belong to.
        labels_from: by domain, "view" (the labels are read from the features that the same latent has in the labelled
            domain) or "own" (from the domain's own features).
        distilled: how far the labels of the distilled branch agree with the ensemble's, on slices that it was not
            trained on; None if there is no such branch.
    """

    classes: int
    labelled_domain: str
    agreement: float
    validated_on: str
    labels_from: dict[str, str]
    distilled: LabelAgreement | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ConfigError(f"classes is {self.classes}; it must be from 2 to {MAX_CLASSES}, background included")
        for domain, view in self.labels_from.items():
            if view not in VIEWS:
                raise ConfigError(f"labels_from of domain '{domain}' is '{view}'; choose one of {', '.join(VIEWS)}")
        if self.distilled is not None and len(self.distilled.dice) != self.classes - 1:
            raise ConfigError(
                f"dice of distilled has {len(self.distilled.dice)} scores; it must have {self.classes - 1}, one for "
                "each foreground class"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the inverse of `from_dict`."""
        return record_to_dict(self)

    @classmethod
    def from_dict(cls, values: object) -> LabelledFactoryCard:
        """The card in a file or message, whose other entries are ignored.

        Raises: ConfigError for missing or wrongly typed entries.
        """
        return read_record(cls, values, extra="ignore")


def drawn_labels_card(config: FactoryConfig) -> LabelledFactoryCard:
    """The card of a factory that draws labels with its images, as it was exported: which sites had labels is not known.
    Every slice has the labels that were drawn with it."""
    return LabelledFactoryCard(
        classes=config.classes,
        labelled_domain="",
        agreement=math.nan,
        validated_on="nothing",
        labels_from=dict.fromkeys(config.domains, "own"),
    )


@dataclass(frozen=True, kw_only=True)
class _Networks:
    """The entries of a file from which the networks of a labelled factory are built; see `TrainedFactory`."""

    config: FactoryConfig
    spacing: float
    height: float
    facts: FactoryFacts
    robust: dict[str, object]
    branches: int
    localiser: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if self.config.classes and self.branches:
            raise ConfigError(f"branches is {self.branches}, but the generator draws labels itself; it must be 0")
        if not self.config.classes and not 1 <= self.branches <= MAX_BRANCHES:
            raise ConfigError(f"branches is {self.branches}; it must be from 1 to {MAX_BRANCHES}")


@dataclass
class DrawingFactory:
    """A factory that draws slices with their labels.

    Attributes:
        factory: the generator that draws.
        branches: label branches, the best first; the mean of their probabilities gives the labels. Empty if
            the generator draws labels itself.
        card: what is known of the labels.
        distilled: a single branch that was trained to give the labels of all together; None if there is none.
    """

    factory: TrainedFactory
    branches: list[LabelBranch]
    card: LabelledFactoryCard
    distilled: LabelBranch | None = field(default=None, kw_only=True)

    @classmethod
    def load(cls, path: str | Path) -> DrawingFactory:
        """A labelled factory, or an exported one that draws labels with its images.

        Raises: UsageError if the file is missing or its factory draws images alone, CheckpointError if it is damaged or
            of another kind.
        """
        if read_card(path, kind=(KIND, EXPORTED))["kind"] == KIND:
            return LabelledFactory.load(path)
        factory = load_factory(path)
        if not factory.config.classes:
            raise UsageError(f"{path}: this factory draws images alone; run `fedfactory label` at a site with labels")
        return DrawingFactory(factory, [], drawn_labels_card(factory.config))

    @property
    def class_names(self) -> dict[int, str]:
        """Names by label value, of the classes whose names are known."""
        return {}

    @property
    def original_values(self) -> dict[str, int]:
        """Values of the labelled site's files by label value, where they were not class numbers."""
        return {}

    def to(self, device: torch.device | str) -> DrawingFactory:
        for network in (self.factory.generator, *self.branches, *filter(None, [self.distilled])):
            network.to(device)
        return self

    def shown_for_labels(self, domain: str) -> str:
        """The domain whose feature maps give the labels of a domain's slices."""
        labelled = self.card.labelled_domain
        # Where the domain enters at the palette alone, features are equal in all views.
        again = self.card.labels_from[domain] == "view" and self.factory.config.domain_enters != "head"
        return labelled if again else domain

    @torch.no_grad()
    def labels(self, synthesis: Synthesis) -> Tensor:
        """(B, S, S) uint8: the labels drawn with the slices, or those of the branches' mean probabilities."""
        if synthesis.labels is not None:
            return synthesis.labels.argmax(dim=1).to(torch.uint8)
        return BranchEnsemble(self.branches).labels(synthesis)

    @torch.no_grad()
    def draw_volume(
        self,
        domain: str,
        heights: Tensor,
        *,
        seed: int,
        z: Tensor | None = None,
        encoding: Tensor | None = None,
        truncation: float = 1.0,
        labeller: Labeller | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One synthetic subject: images (N, C, S, S) float32 in [-1, 1] and labels (N, S, S) uint8.

        Raises: ConfigError for an unknown domain.

        Args:
            heights: (N,) in [0, z_bins - 1], see `subject_heights`.
            seed: of the noise, and of the latent if none is given; the same arguments give the same volume.
            z: (1, latent_dim), the subject's latent.
            encoding: (encoding_dim,), the domain's mean embedding, or None.
            truncation: see `synthesise_volume`.
            labeller: gives the labels; None for `labels`, see `choose_labeller`.
        """
        config, labelled, labels_of = self.factory.config, self.shown_for_labels(domain), labeller or self.labels
        if z is None:
            z = torch.randn(1, config.latent_dim, generator=torch.Generator().manual_seed(seed))

        def walk(shown: str) -> Iterator[Synthesis]:
            rng = torch.Generator().manual_seed(seed + 1)  # the same noise in every view
            given = encoding if shown == domain else None
            options = {"rng": rng, "z": z, "encoding": given, "truncation": truncation}
            return synthesise_volume(self.factory.generator, heights, domain=config.domain_index(shown), **options)

        images, labels = [], []
        views = walk(labelled) if labelled != domain else itertools.repeat(None)
        for part, view in zip(walk(domain), views, strict=False):
            images.append(part.image.clamp(-1, 1).cpu().numpy())
            labels.append(labels_of(part if view is None else view).cpu().numpy())
        return np.concatenate(images), np.concatenate(labels)


@dataclass
class LabelledFactory(DrawingFactory):
    """A factory that draws labelled slices, with what a labelled site adds for the other sites.

    Attributes:
        robust: the labelled site's segmenter, trained with random contrasts; gives every site first labels of its own
            images.
        localiser: finds the place of the structures in whole images, see `Localiser`; None if there is none.
    """

    robust: Segmenter
    localiser: Segmenter | None = None

    @property
    def class_names(self) -> dict[int, str]:
        return self.robust.card.names

    @property
    def original_values(self) -> dict[str, int]:
        return self.robust.card.original_values

    def save(self, path: str | Path) -> None:
        tensors = {
            f"{prefix}{name}": tensor
            for prefix, network in self._networks().items()
            for name, tensor in network.state_dict().items()
        }
        write_weights(path, tensors, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> LabelledFactory:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or of another kind."""
        if read_card(path, kind=(KIND, EXPORTED))["kind"] == EXPORTED:
            raise CheckpointError(
                f"{path}: is a factory as it was exported, without a first guess; run `fedfactory label` at a site "
                "with labels"
            )
        tensors, card = read_weights(path, kind=KIND)
        try:
            sketched = sketch(lambda: cls.from_dict(card), tensors=len(tensors))
            for network, weights in sketched._with_weights(tensors):  # before memory is taken for what the card claims
                refuse_misfit(network, weights, path)
            made = cls.from_dict(card)
        except UsageError as error:
            raise CheckpointError(f"{path}: {error}; give a file written by `fedfactory label`") from None
        for network, weights in made._with_weights(tensors):
            load_strictly(network, weights, path)
        return made

    def _networks(self) -> dict[str, nn.Module]:
        """Every network by what comes before the names of its weights in a file."""
        named = {f"branch{number}.": branch for number, branch in enumerate(self.branches)}
        networks = {"g_ema.": self.factory.generator, "robust.": self.robust.network, **named}
        if self.localiser is not None:
            networks[LOCALISER] = self.localiser.network
        if self.distilled is not None:
            networks[DISTILLED] = self.distilled
        return networks

    def _with_weights(self, tensors: dict[str, Tensor]) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """Each network with what a file holds for it."""
        for prefix, network in self._networks().items():
            yield network, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able."""
        factory = self.factory
        return {
            "kind": KIND,
            "config": factory.config.to_dict(),
            "spacing": factory.spacing,
            "height": factory.height,
            "facts": factory.facts.to_dict(),
            "robust": self.robust.to_dict(),
            "branches": len(self.branches),
            "localiser": None if self.localiser is None else self.localiser.to_dict(),
            **self.card.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: object) -> LabelledFactory:
        """A labelled factory of the described kind with random weights, to load weights into.

        Raises: UsageError for a description that is not usable.
        """
        try:
            card, parts = LabelledFactoryCard.from_dict(values), read_record(_Networks, values, extra="ignore")
            parts.config.domain_index(card.labelled_domain)
            if parts.config.classes not in (0, card.classes):
                raise ConfigError(f"classes is {card.classes}; the generator draws {parts.config.classes}")
            for domain in parts.config.domains:
                if domain not in card.labels_from:
                    raise ConfigError(f"labels_from has no entry for domain '{domain}'; it must have one for each")
            generator = make_generator(parts.config).eval()
            branches = [LabelBranch.for_generator(generator, card.classes).eval() for _ in range(parts.branches)]
            if card.distilled is not None and not branches:
                raise ConfigError("distilled has scores, but there are no branches to compare with")
            distilled = None if card.distilled is None else LabelBranch.for_generator(generator, card.classes).eval()
            factory = TrainedFactory(
                generator=generator, latest={}, spacing=parts.spacing, height=parts.height, facts=parts.facts
            )
            robust = Segmenter.from_dict(parts.robust)
            localiser = None if parts.localiser is None else Segmenter.from_dict(parts.localiser)
        except (KeyError, UsageError, *IMPOSSIBLE) as error:
            raise UsageError(f"its card is not usable ({error})") from None
        return cls(factory, branches, card, robust, localiser, distilled=distilled)
