"""DICOM as an image archive keeps it: folders of series, and labels (SEG, RTSTRUCT) on the grid of their images."""
