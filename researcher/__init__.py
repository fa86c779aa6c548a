"""What the study lead runs: both phases and federated segmentation as Fed-BioMed experiments."""

from typing import TYPE_CHECKING

from ..common.lazy_imports import lazy_names

if TYPE_CHECKING:
    from .experiment import factory_experiment

__all__ = ["factory_experiment"]

# At first use: `researcher.node_selection` is also read where a command only checks what was typed.
__getattr__ = lazy_names(__name__, {"factory_experiment": "experiment"})
