"""The segmentation engine: a planned network, strong augmentation, random contrast, inference by windows."""
