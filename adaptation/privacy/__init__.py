"""Differential privacy per patient, where training can have it: gradients, noise and its cost."""
