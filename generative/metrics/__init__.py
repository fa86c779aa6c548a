"""How good a factory's slices are, measured without any label."""
