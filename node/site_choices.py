"""What a site's administrator chose for federated segmentation, in a file beside the store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..adaptation.networks.network_names import check_architecture, check_modality
from ..common.files import write_json
from ..errors import StoreError, UsageError
from .store.slice_store import SliceStore

CHOICES = ".choices.json"


@dataclass(frozen=True, kw_only=True)
class SiteChoices:
    """Attributes:
    network: of the site's own, for methods whose sites differ in it. public: folder of the slice store that
        researcher and all sites have.
    modality: of the store's slices. others: by modality, folders of further stores.
    """

    network: str = ""
    public: str = ""
    modality: str = ""
    others: dict[str, str] = field(default_factory=dict)

    def stores(self, store: SliceStore) -> dict[str, SliceStore]:
        """By modality; empty if the site has not said of which its slices are. Raises: StoreError."""
        if not self.modality:
            return {}
        return {self.modality: store, **{name: SliceStore(path) for name, path in self.others.items()}}

    def check(self, store: SliceStore) -> None:
        """Raises: UsageError or StoreError for choices that do not go together, or not with the store."""
        if self.network:
            check_architecture(self.network)
        if self.others and not self.modality:
            raise UsageError("say of which modality the store itself is, too")
        if self.modality in self.others:
            raise UsageError(f"modality '{self.modality}' twice")
        for name in filter(None, (self.modality, *self.others)):
            check_modality(name)
        others = {**self.others, **({"public": self.public} if self.public else {})}
        for name, path in others.items():
            other = SliceStore(path)
            if other.format.size != store.format.size:
                raise UsageError(f"{path} ({name}): slices of {other.format.size} px, the store's {store.format.size}")
        if self.public and set(SliceStore(self.public).label_kinds()) != {"dense"}:
            raise UsageError(f"{self.public}: public slices need dense labels, all of them")

    def save(self, store: SliceStore) -> None:
        write_json(_file(store.path), asdict(self))

    @classmethod
    def load(cls, store: SliceStore) -> SiteChoices:
        """Nothing chosen if there is no file. Raises: StoreError for one that is damaged."""
        path = _file(store.path)
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise StoreError(f"{path}: damaged; register the store again") from None


def digest(store: SliceStore) -> str:
    """SHA-256 that stores with the same slices and labels have in common."""
    lines = [f"{case.split} {case.label_kind} {case.count} {case.checksum}" for case in store.cases]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file(store: Path) -> Path:
    return store.with_name(store.name + CHOICES)
