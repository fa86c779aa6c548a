"""Training at one site: the loop, and what is trained with it."""
