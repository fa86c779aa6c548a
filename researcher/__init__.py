"""What the study lead runs: phase one, federated segmentation and adaptation at distant sites, with Fed-BioMed."""

from typing import TYPE_CHECKING

from ..common.lazy_imports import lazy_names

if TYPE_CHECKING:
    from .experiment import factory_experiment

__all__ = ["factory_experiment"]

# At first use: `researcher.node_selection` is also read where a command only checks what was typed.
__getattr__ = lazy_names(__name__, {"factory_experiment": "experiment"})
