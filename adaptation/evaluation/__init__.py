"""Predicted label maps against references: scores, their summary, warnings about the cases, and a page."""
