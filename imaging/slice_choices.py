"""The values that slices and settings of their format can take; importable without NumPy, for the command line."""

from __future__ import annotations

PLANES = ("axial", "coronal", "sagittal", "acquired", "stored")  # see `fedfactory.imaging.volumes.orientation`
CROPS = ("air", "none")  # see `fedfactory.imaging.cropping`
CONTENTS = ("volumes", "pictures")
COMPATIBILITY = ("none", "published")  # "published": do as the published program (RobustMedSeg) did, with its errors
MAX_CHANNELS = 8  # of an image
UNLABELLED = 255  # label of pixels that nobody annotated
