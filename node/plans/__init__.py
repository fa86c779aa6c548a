"""Training plans of the installed package, and what of them may leave the node."""
