"""Predicted label maps against references: scores, their summary and check, warnings about the cases, and a page."""
