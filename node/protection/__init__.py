"""The guard of a node: what runs, what leaves, and by which seeds."""
