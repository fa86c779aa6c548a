"""When a factory's labels are not to be trusted: thresholds for measurements that need no label.

They were set on runs of a study and judged on others (`benchmarks/sharing.py`, docs/sharing.md).
"""

from __future__ import annotations

from .quality import SiteQuality

AT_CHANCE = 0.1  # shared anatomy: below, two domains tell no more about each other than two different subjects
COLLAPSED = 0.4  # of the real slices' contrast
FAR = 100.0  # kernel distance
WRONG_LAYOUT = 0.5  # correlation of mean slices


def alarms(domain: str, quality: SiteQuality | None, shared: float | None) -> list[str]:
    """What is wrong with a domain, one sentence each; empty for a good one.

    Args:
        quality: as a site of the domain measured it, None if none did yet.
        shared: its best `shared_anatomy` with any other domain, None if not measured.
    """
    found = []
    if shared is not None and shared < AT_CHANCE:
        found.append(f"{domain}: its anatomy is at chance with the other domains' ({shared:.2f})")
    if quality is None:
        return found
    if quality.contrast < COLLAPSED:
        found.append(f"{domain}: its synthetic slices have {quality.contrast:.0%} of the real contrast")
    if quality.distance > FAR:
        found.append(f"{domain}: its synthetic slices are far from real ones (kernel distance {quality.distance:.3g})")
    if quality.layout < WRONG_LAYOUT:
        found.append(f"{domain}: bright and dark lie elsewhere than in real slices (correlation {quality.layout:.2f})")
    return found
