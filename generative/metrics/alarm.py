"""When a factory's labels are not to be trusted: thresholds for measurements that need no label.

They were set on runs of a study and judged on others (`benchmarks/sharing.py`, docs/sharing.md).
"""

from __future__ import annotations

from .quality import SiteQuality

LITTLE_SHARED = 0.33  # shared anatomy: good runs had .38 and more, those whose labels did not carry over .30 at most
FAR = 10.0  # kernel distance: only gross failure, since good and bad runs overlap up to 6
COLLAPSED = 0.4  # of the real slices' contrast
WRONG_LAYOUT = 0.5  # correlation of mean slices


def alarms(domain: str, quality: SiteQuality | None, shared: float | None) -> list[str]:
    """What is wrong with a domain, one sentence each; empty for a good one.

    Args:
        quality: as a site of the domain measured it, None if none did yet.
        shared: its best `shared_anatomy` with another domain, or that with the labelled one; None if not measured.
    """
    found = []
    if shared is not None and shared < LITTLE_SHARED:
        found.append(f"{domain}: it shares little anatomy with the other domains ({shared:.2f}; 0 is chance)")
    if quality is None:
        return found
    if quality.contrast < COLLAPSED:
        found.append(f"{domain}: its synthetic slices have {quality.contrast:.0%} of the real contrast")
    if quality.distance > FAR:
        found.append(f"{domain}: its synthetic slices are far from real ones (kernel distance {quality.distance:.3g})")
    if quality.layout < WRONG_LAYOUT:
        found.append(f"{domain}: bright and dark lie elsewhere than in real slices (correlation {quality.layout:.2f})")
    return found
