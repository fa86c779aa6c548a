"""The values that settings of this room can take by name; importable without PyTorch, for the command line."""

from __future__ import annotations

ENGINES = ("segmenter", "translator")  # of the adaptation
LABELLINGS = ("synthesis", "inversion")  # how a factory's labels are made
# Gradients vanish in float16 unless the loss is scaled, which only the factory's trainer does.
UNSCALED_PRECISIONS = ("float32", "bfloat16")
ROTATION = 0.15  # radians: patients lie that straight in most scanners
REFINEMENTS = ("crf", "none")  # of gaze maps
WEAK_LABEL_KINDS = ("point", "scribble", "block", "box")  # what dense labels can be turned into
LAYOUTS = ("nifti", "nnunet", "images", "slices", "legacy-slices")  # of synthetic volumes
NETWORK_SIZES = ("small", "standard", "large")  # of a planned segmenter
APPEARANCES = ("mild", "strong")  # presets of random appearance
PRECISIONS = ("auto", *UNSCALED_PRECISIONS)
LABEL_WITH = ("auto", "ensemble", "distilled")  # which label branches of a factory
