"""The slice store: preparing images and labels, reading what was prepared."""
