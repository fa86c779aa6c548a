"""What is computed once from a store's slices and kept beside them, until the slices change."""
