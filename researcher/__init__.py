"""What the study lead runs: phase one as a Fed-BioMed experiment, and the one-machine demonstration."""

from .experiment import factory_experiment

__all__ = ["factory_experiment"]
