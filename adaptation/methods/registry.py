"""The federated segmentation methods by name."""

from __future__ import annotations

from ...errors import UsageError
from .cmc import CMC
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
from .gaze_supervision import GazeSupervision
from .hssf import HSSF, LSSL

METHODS: dict[str, type[FederatedMethod]] = {
    kind.name: kind
    for kind in (
        LocalTraining,
        FederatedAveraging,
        FederatedProximal,
        FederatedNorms,
        FedICRA,
        FedMix,
        GazeSupervision,
        HSSF,
        LSSL,
        CMC,
    )
}


def method_named(name: str) -> type[FederatedMethod]:
    """Raises: UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}': choose from {', '.join(METHODS)}")
    return METHODS[name]


def make_method(config: MethodConfig) -> FederatedMethod:
    """Raises: UsageError for an unknown name, ConfigError for options it does not have."""
    return method_named(config.method)(config)
