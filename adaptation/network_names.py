"""Names of segmentation networks and modalities, and their checks, without importing the libraries behind them."""

from __future__ import annotations

import re
from reprlib import repr as shortened

from ..common.names import check_name
from ..errors import ConfigError, UsageError

ARCHITECTURES = ("unet", "dynunet", "segresnet")  # MONAI's networks for single slices
NETWORK_SIZES = ("small", "standard", "large")
SITE_NETWORKS = (*ARCHITECTURES, *(f"{name}-{size}" for name in ARCHITECTURES for size in NETWORK_SIZES))
NETWORKS = (*ARCHITECTURES, *(f"{name}3d" for name in ARCHITECTURES))  # and the same for stacks of slices
MODALITY = re.compile(r"[A-Za-z0-9_-]{1,32}")


def dimensions(network: str) -> int:
    """2 for a network that segments single slices, 3 for a network that segments stacks of slices.

    Raises: UsageError for a name that is not in NETWORKS.
    """
    if network not in NETWORKS:
        raise UsageError(f"network is '{network}'; choose one of {', '.join(NETWORKS)}")
    return 3 if network.endswith("3d") else 2


def check_architecture(network: str) -> None:
    """Raises: ConfigError for a network that is not in ARCHITECTURES."""
    if network not in ARCHITECTURES:
        raise ConfigError(f"network is '{network}'; choose one of {', '.join(ARCHITECTURES)}")


def parts_of_site_network(network: str) -> tuple[str, str | None]:
    """Architecture and size of a network that a site chooses, such as "segresnet-large"; None for the size that the
    researcher gives, as in "segresnet". Raises: ConfigError for a network that is not in SITE_NETWORKS."""
    if network not in SITE_NETWORKS:
        raise ConfigError(
            f"network is {shortened(network)}; choose one of {', '.join(ARCHITECTURES)}, or one of them with a size, "
            f"as in {ARCHITECTURES[0]}-{NETWORK_SIZES[-1]} (sizes: {', '.join(NETWORK_SIZES)})"
        )
    architecture, _, size = network.partition("-")
    return architecture, size or None


def check_modality(name: str) -> None:
    """Raises: ConfigError for a name that cannot be part of the name of a tensor or a file."""
    if not isinstance(name, str) or not MODALITY.fullmatch(name):
        raise ConfigError(f"modality is {shortened(name)}; use letters, digits, - and _, at most 32")
    check_name("modality", name)
