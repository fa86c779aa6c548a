"""The choices of every `compatibility` setting, in a module that needs nothing else to be installed."""

COMPATIBILITY = ("none", "published")  # "published": do as the published program (RobustMedSeg) did, with its errors
