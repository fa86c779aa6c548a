"""Labels as an image archive keeps them: DICOM segmentations and structure sets, on the grid of an image series."""
