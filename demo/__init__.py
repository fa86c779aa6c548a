"""A demonstration on this machine: a federation with simulated subjects, both phases, and a report."""
