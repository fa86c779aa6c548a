"""A site's slice store as a Fed-BioMed dataset."""

from __future__ import annotations

import numpy as np
import torch
from fedbiomed.common.dataset import CustomDataset
from fedbiomed.common.logger import logger
from torch import Tensor

from ...errors import FedFactoryError, NodeDataError, StoreError
from ...generative.config import FactoryConfig
from ..site_data.training_slices import known_labels
from ..store.derived.embedding import load_guide, site_embedding
from ..store.derived.pseudo_labels import pseudo_label_facts
from ..store.slice_store import SliceStore
from .error_redaction import redact_errors


class SliceDataset(CustomDataset):
    """The training slices of one site. Set `config` on the instance before the framework calls `read`.

    Attributes:
        config: of the factory.
        store: the site's slice store.
        chosen: (N,) int64 numbers of the training slices.
        encoding: (encoding_dim,) mean image embedding of the site; None if `config.encoding_dim` is 0.
        guide: image encoder and embedding for the guidance; None if `config.clip_weight` is 0.
        labels: (N, S, S) uint8, labels of the chosen slices, 255 where the site does not know them, or with
            `config.pseudo_labels` has no pseudo-label either; None if `config.classes` is 0.
    """

    config: FactoryConfig

    @redact_errors
    def read(self) -> None:
        """Open the store. Raises: NodeDataError with a text that may leave the site; details go to the site's log."""
        try:
            self.store = SliceStore(self.path)
            self.store.require_factory(self.config)
        except FedFactoryError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError(
                f"this site's slice store cannot be used with {self.config.image_size} px, "
                f"{self.config.image_channels} channels and {self.config.z_bins} bins; see the node's log"
            ) from None
        if self.store.domain not in self.config.domains:
            raise NodeDataError(
                f"domain is '{self.store.domain}' at this site; it must be one of the experiment's, "
                f"{', '.join(self.config.domains)}"
            )
        self._read_embedding()
        self.chosen = self.store.slices("train")
        if len(self.chosen) < self.config.batch_size:
            raise NodeDataError(
                f"this site has {len(self.chosen)} training slices; a batch needs at least {self.config.batch_size}"
            )
        self._read_labels()

    def _read_labels(self) -> None:
        classes = self.config.classes
        if not classes:
            self.labels = None
            return
        labelled = any(kind != "none" for kind in self.store.label_kinds())
        if labelled and self.store.classes != classes:
            raise NodeDataError(
                f"the labels of this site have {self.store.classes} classes, background included, and the factory "
                f"draws {classes}; they must be equal"
            )
        try:
            facts = pseudo_label_facts(self.store) if self.config.pseudo_labels else None
            if facts is not None and facts.classes != classes:
                raise NodeDataError(
                    f"the pseudo-labels of this site have {facts.classes} classes, background included, and the "
                    f"factory draws {classes}; they must be equal"
                )
            self.labels = known_labels(self.store, classes, with_pseudo_labels=facts is not None)
        except StoreError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError("the pseudo-labels of this site cannot be used; see the node's log") from None

    def _read_embedding(self) -> None:
        config = self.config
        try:
            self.encoding = site_embedding(self.store, config.encoding_dim) if config.encoding_dim else None
            self.guide = load_guide(self.store) if config.clip_weight else None
        except FedFactoryError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError(
                f"encoding_dim is {config.encoding_dim} and clip_weight {config.clip_weight}; this site's store needs "
                "image embeddings that fit, see the node's log"
            ) from None

    def __len__(self) -> int:
        return len(self.chosen)

    @redact_errors
    def get_item(self, index: int) -> dict[str, Tensor]:
        """{"image": (C, S, S) float32 in [-1, 1], "z_bin": () int64} of one slice, and "labels": (S, S) uint8, 255
        where they are not known, if the factory draws labels."""
        number = self.chosen[index]
        image = torch.from_numpy(self.store.images[number].astype(np.float32))
        item = {"image": image, "z_bin": torch.tensor(self.store.z_bin[number])}
        return item if self.labels is None else {**item, "labels": torch.from_numpy(self.labels[index])}
