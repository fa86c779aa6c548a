"""Segmentation: segmenters, their training and use, labelled factories, federated methods."""
