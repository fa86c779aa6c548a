"""The records of a site's part in a round: what it works with, what it keeps and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import nn

from ....errors import NodeDataError
from ...labels.candidate_labels import SiteSlices
from ...network_names import check_modality
from ...privacy.private_updates import PrivateUpdates

State = TypeVar("State", bound="MethodState")


@dataclass(kw_only=True)
class MethodState:
    """What a method keeps at a site from one round to the next; it is never sent. This base keeps nothing.

    Methods that keep something have a subclass whose fields are tensors, numbers, text, and dictionaries of these, so
    that a node can store it without pickling objects of its own.
    """

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return {known.name: getattr(self, known.name) for known in fields(self)}

    @classmethod
    def from_dict(cls: type[State], values: Mapping[str, object]) -> State:
        """The state that `to_dict` described. Raises: NodeDataError for other fields than this method's."""
        wanted = {known.name for known in fields(cls)}
        if set(values) != wanted:
            raise NodeDataError(
                f"the method's stored state has the fields {sorted(values)}; it must have {sorted(wanted)}: "
                "start a new experiment"
            )
        return cls(**values)


@dataclass(kw_only=True)
class SiteRound:
    """One round at one site.

    Attributes:
        model: the received model, with the parameters that stay local put back in place; changed in place.
        optimizers: by name, with their states of the round before.
        data: the site's training slices.
        site: index of the site, from 0.
        number: of the round, from 1.
        seed: of what the site draws; None takes the configuration's, which the researcher knows.
        state: what the method keeps at this site between rounds; changed in place, never sent.
        network: name of the architecture that the site has chosen; "" if it has not chosen any.
        public: the labelled slices that the researcher and all sites have; None for methods that need none.
        modalities: the training slices by modality, for methods that need modalities; `data` holds all of them.
        private: noise and random numbers of a round with differential privacy; None without.
    """

    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    data: SiteSlices
    site: int
    number: int
    state: MethodState
    seed: int | None = None
    network: str = ""
    public: SiteSlices | None = None
    modalities: dict[str, SiteSlices] = field(default_factory=dict)
    private: PrivateUpdates | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self.model.state_dict().values())).device


@dataclass(frozen=True, kw_only=True)
class SiteContext:
    """Which segmenter of a federated method is meant.

    Attributes:
        site: index of the site.
        network: name of the architecture that the site has chosen; "" for methods without that choice.
        modality: of the images to segment; "" for methods without modalities.
    """

    site: int = 0
    network: str = ""
    modality: str = ""

    def __post_init__(self) -> None:
        if self.modality:
            check_modality(self.modality)


@dataclass(frozen=True)
class SiteUpdate:
    """What a site reports of its round, besides tensors.

    Attributes:
        samples: number of slices used for training; 0 for a site that did not train.
        loss: mean loss of the updates, or the loss that weighs the site in the average; NaN without an update, and
            with differential privacy, which no loss has.
        numbers: further numbers of the method, by name.
    """

    samples: int
    loss: float
    numbers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        """All numbers by name."""
        return {"samples": self.samples, "loss": self.loss, **self.numbers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteUpdate:
        """The update within a site's reply, whose other entries may be anything; only numbers are read."""
        known = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        samples, loss = int(known.pop("samples")), known.pop("loss", math.nan)
        return cls(samples, loss, known)
