"""What the researcher sends to each site at the start of a round of federated segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from reprlib import repr as shortened

from ...errors import ConfigError
from ..site_facts import checked_digest, checked_label_kinds


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """Settings of one site.

    Attributes:
        site: its index among the sites, from 0.
        label_kinds: kind of label to number of training slices, as the site announced them; None checks nothing.
        public_digest: SHA-256 of the public slices that all sites have; None for methods that need none.
    """

    site: int = 0
    label_kinds: dict[str, int] | None = None
    public_digest: str | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SiteSettings:
        """Read what the researcher sent. Additional entries, which the framework makes, are ignored.

        Args:
            values: what came from the network.

        Raises: ConfigError for impossible values.
        """
        site, label_kinds = values.get("site", 0), values.get("label_kinds")
        if isinstance(site, bool) or not isinstance(site, int) or site < 0:
            raise ConfigError(f"site is {shortened(site)}; it must be a whole number from 0")
        return cls(
            site=site,
            label_kinds=None if label_kinds is None else checked_label_kinds(label_kinds),
            public_digest=checked_digest(values.get("public_digest")),
        )
