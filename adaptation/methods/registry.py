"""The classes of the federated segmentation methods by name."""

from __future__ import annotations

from .catalogue import describe
from .cmc import CMC
from .federated_averaging import FederatedAveraging, FederatedNorms, FederatedProximal, LocalTraining
from .fedicra import FedICRA
from .fedmix import FedMix
from .gaze_supervision import GazeSupervision
from .hssf import HSSF
from .interface.federated_method import FederatedMethod
from .interface.method_config import MethodConfig
from .lssl import LSSL

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


def make_method(config: MethodConfig) -> FederatedMethod:
    """The method that a configuration names.

    Raises: UsageError for an unknown name, ConfigError for options that the method does not have.
    """
    return METHODS[describe(config.method).name](config)
