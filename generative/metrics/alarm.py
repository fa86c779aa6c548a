"""When a factory's labels should not be trusted: thresholds for measurements that need no label.

They were set on some runs of a study and evaluated on the others (`benchmarks/shared_anatomy.py`, docs/sharing.md).
"""

from __future__ import annotations

from .site_quality import SiteQuality

MIN_SHARED_ANATOMY = 0.33  # good runs had at least .38, runs whose labels did not carry over at most .30
MAX_KERNEL_DISTANCE = 10.0  # detects gross failure only, since good and bad runs overlap up to 6
MIN_CONTRAST = 0.4  # as a share of the real slices' contrast
MIN_LAYOUT = 0.5  # correlation of mean slices


def alarms(domain: str, quality: SiteQuality | None, shared: float | None) -> list[str]:
    """What is wrong with a domain, one sentence for each finding; empty if nothing is.

    Args:
        domain: name of the domain.
        quality: as a site of the domain measured it; None if not measured.
        shared: the domain's best `shared_anatomy` with another domain, or the score with the labelled domain; None if
            not measured.
    """
    found = []
    if shared is not None and shared < MIN_SHARED_ANATOMY:
        found.append(f"{domain}: it shares little anatomy with the other domains ({shared:.2f}; 0 is chance)")
    if quality is None:
        return found
    if quality.contrast < MIN_CONTRAST:
        found.append(f"{domain}: its synthetic slices have {quality.contrast:.0%} of the real contrast")
    if quality.distance > MAX_KERNEL_DISTANCE:
        found.append(f"{domain}: its synthetic slices are far from real ones (kernel distance {quality.distance:.3g})")
    if quality.layout < MIN_LAYOUT:
        found.append(f"{domain}: bright and dark lie elsewhere than in real slices (correlation {quality.layout:.2f})")
    return found
