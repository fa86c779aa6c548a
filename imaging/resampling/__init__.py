"""From the voxels of a volume to the pixels of its slices, along axes that are parallel to each other."""
