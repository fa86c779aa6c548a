"""fedfactory: federated data factories and segmentation under uneven labels, as a Fed-BioMed plugin."""

from .errors import FedFactoryError

__version__ = "0.1.0"
__all__ = ["FedFactoryError", "__version__"]
