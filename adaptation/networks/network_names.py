"""Names that a site chooses or gives, without the libraries behind them."""

from __future__ import annotations

import re

from ...errors import ConfigError

ARCHITECTURES = ("unet", "dynunet", "segresnet")  # MONAI's, for slices
MODALITY = re.compile(r"[A-Za-z0-9_-]{1,32}")


def check_architecture(name: str) -> None:
    """Raises: ConfigError for a network that sites cannot choose."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown network '{name}': choose from {', '.join(ARCHITECTURES)}")


def check_modality(name: str) -> None:
    """Raises: ConfigError for a name that cannot be part of a tensor's name or a file's."""
    if not MODALITY.fullmatch(name):
        raise ConfigError(f"modality '{name}': use letters, digits, - and _, at most 32")
