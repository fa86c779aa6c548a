"""Federated segmentation: one interface, one module per method."""
