"""Layouts of volumes that public data sets and other programs have."""
