"""Federated segmentation before and beside the rounds: whether the sites fit, and what a run leaves behind."""
