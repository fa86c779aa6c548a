"""What a site's administrator chooses for federated segmentation, kept in a file beside the store."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..adaptation.network_names import check_modality, parts_of_site_network
from ..common.files import write_json
from ..common.json_text import read_json
from ..common.records import read_record
from ..errors import ConfigError, StoreError, UsageError
from .store.slice_store import SliceStore

CHOICES_SUFFIX = ".choices.json"  # after the store's name


@dataclass(frozen=True, kw_only=True)
class SiteChoices:
    """The choices of one site; an empty value is no choice.

    Attributes:
        network: architecture of the site's own network, for methods in which sites may have different ones.
        public: folder of the slice store that the researcher and all sites have.
        modality: of the store's slices.
        others: modality to folder of a further store of this site.
        announce_class_names: whether researchers see the names of the store's classes.
    """

    network: str = ""
    public: str = ""
    modality: str = ""
    others: dict[str, str] = field(default_factory=dict)
    announce_class_names: bool = True

    def stores(self, store: SliceStore) -> dict[str, SliceStore]:
        """Modality to store; empty if the modality was not chosen. Raises: UsageError or StoreError."""
        if not self.modality:
            return {}
        return {self.modality: store, **{name: SliceStore(path) for name, path in self.others.items()}}

    def check(self, store: SliceStore) -> None:
        """Raises: UsageError or StoreError for choices that contradict each other or do not fit the store."""
        if self.network:
            parts_of_site_network(self.network)
        if self.others and not self.modality:
            raise UsageError(
                f"others is {', '.join(self.others)}, modality is empty; choose the modality of the store itself too"
            )
        if self.modality in self.others:
            raise UsageError(f"modality is '{self.modality}', which others has too; choose different names")
        for name in filter(None, (self.modality, *self.others)):
            check_modality(name)
        others = {**self.others, **({"public": self.public} if self.public else {})}
        for name, path in others.items():
            other = SliceStore(path)
            if other.format.size != store.format.size:
                raise UsageError(
                    f"{path} ({name}): its slices have {other.format.size} px, those of {store.path} "
                    f"{store.format.size}; prepare both with the same size"
                )
            if (other.format.channels, other.format.colour) != (store.format.channels, store.format.colour):
                raise UsageError(
                    f"{path} ({name}): its slices have {other.format.channels} channels, those of {store.path} "
                    f"{store.format.channels}; prepare both alike"
                )
        if self.public and (kinds := set(SliceStore(self.public).label_kinds())) != {"dense"}:
            raise UsageError(
                f"{self.public}: its label kinds are {', '.join(sorted(kinds))}; all public slices need dense labels"
            )

    def save(self, store: SliceStore) -> None:
        """Write the choices beside the store."""
        write_json(_choices_file(store.path), asdict(self))

    @classmethod
    def load(cls, store: SliceStore) -> SiteChoices:
        """The choices beside the store; empty ones if there is no file. Raises: StoreError for a damaged file."""
        path = _choices_file(store.path)
        if not path.is_file():
            return cls()
        try:
            return read_record(cls, read_json(path))
        except (OSError, ValueError, ConfigError):
            raise StoreError(f"{path}: the file is damaged; register the store again") from None


def digest(store: SliceStore) -> str:
    """SHA-256 over splits, label kinds and checksums of all cases: equal for stores with the same slices and labels."""
    lines = [f"{case.split} {case.label_kind} {case.count} {case.checksum}" for case in store.cases]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _choices_file(store: Path) -> Path:
    return store.with_name(store.name + CHOICES_SUFFIX)
