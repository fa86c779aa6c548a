"""Federated segmentation: an interface, and a module for each method."""
