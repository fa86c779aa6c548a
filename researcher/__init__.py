"""What the study lead runs: both phases and federated segmentation as Fed-BioMed experiments."""

from .experiment import factory_experiment

__all__ = ["factory_experiment"]
