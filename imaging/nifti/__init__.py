"""What NIfTI files say about where their voxels lie."""
