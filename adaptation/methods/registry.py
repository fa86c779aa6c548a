"""The federated segmentation methods by name."""

from __future__ import annotations

from .catalogue import describe
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
    method.description.name: method
    for method in (
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
    """The class of the method called `name`. Raises: UsageError for an unknown name."""
    return METHODS[describe(name).name]


def make_method(config: MethodConfig) -> FederatedMethod:
    """Raises: UsageError for an unknown name, ConfigError for options it does not have."""
    return method_named(config.method)(config)
