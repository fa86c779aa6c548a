"""A whole federation on this machine, on simulated subjects, with a report."""
