"""Loss functions of segmenters: pure functions of tensors."""
