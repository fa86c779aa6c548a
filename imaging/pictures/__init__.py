"""Two-dimensional pictures: reading and writing, masks, layouts of folders, and contours."""
