"""The federated segmentation methods by name."""

from __future__ import annotations

from ..errors import UsageError
from .federated_method import (
    FederatedAveraging,
    FederatedMethod,
    FederatedNorms,
    FederatedProximal,
    LocalTraining,
    MethodConfig,
)
from .fedicra import FedICRA
from .fedmix import FedMix
from .gaze_method import GazeSupervision

METHODS: dict[str, type[FederatedMethod]] = {
    kind.name: kind
    for kind in (LocalTraining, FederatedAveraging, FederatedProximal, FederatedNorms, FedICRA, FedMix, GazeSupervision)
}  # fmt: skip


def make_method(config: MethodConfig) -> FederatedMethod:
    """Raises: UsageError for an unknown name, ConfigError for options it does not have."""
    if config.method not in METHODS:
        raise UsageError(f"unknown method '{config.method}': choose from {', '.join(METHODS)}")
    return METHODS[config.method](config)
