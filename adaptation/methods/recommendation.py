"""In which order methods are recommended, by what labels the sites have: one table. Importable without PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

SUPERVISING = frozenset({"dense", "scribble", "point", "block", "box", "image", "gaze"})  # kinds of labels


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What labels sites have together, and the methods to try then.

    Attributes:
        says: the situation in a sentence.
        methods: names, the first choice first. Methods that are not listed come last, in the catalogue's order.
    """

    says: str
    methods: tuple[str, ...]


# The order is that of the study (docs/methods-results.md) where it has been run: "dense" (on hearts FedBN was above
# FedAvg and level with local training, which comes last because it is what sites do without us), "weak", "mixed" and
# what is said of modalities. Elsewhere it follows what each method was made for.
SITUATIONS: dict[str, Situation] = {
    "unlabelled": Situation(
        says="No site has labels: only public slices that all sites have can teach a network.",
        methods=("hssf", "lssl"),
    ),
    "fixations": Situation(
        says="Some site has fixations of readers' eyes.",
        methods=("gaze", "fedavg", "fedbn", "fedprox", "local"),
    ),
    "modalities": Situation(
        says="The sites have two modalities or more. So far, a federation for each was better than one for all.",
        methods=("cmc", "fedbn", "fedicra", "fedavg", "fedprox", "local"),
    ),
    "dense": Situation(
        says="All sites have drawn masks for all slices.",
        methods=("fedbn", "fedavg", "fedprox", "fedicra", "local"),
    ),
    "mixed": Situation(
        says="Some sites have drawn masks, others weaker labels or none.",
        methods=("fedmix", "fedavg", "fedbn", "fedprox", "fedicra", "local"),
    ),
    "weak": Situation(
        says="No site has drawn masks.",
        methods=("fedbn", "fedavg", "fedprox", "fedicra", "local"),
    ),
}


def situation_of(kinds: Sequence[Collection[str]], modalities: Collection[str] = ()) -> str:
    """The key in `SITUATIONS` that fits.

    Args:
        kinds: of the labels of each site, "none" for slices without labels.
        modalities: that sites named.
    """
    held = [SUPERVISING & set(site) for site in kinds]
    together = set().union(*held)
    if not together:
        return "unlabelled"
    if "gaze" in together:
        return "fixations"
    if len(set(modalities)) > 1:
        return "modalities"
    if "dense" not in together:
        return "weak"
    return "dense" if all(site == {"dense"} for site in kinds) else "mixed"


def in_order(situation: str, names: Sequence[str]) -> list[str]:
    """The methods' names in the order in which they are recommended in a situation, a key in `SITUATIONS`."""
    first = [name for name in SITUATIONS[situation].methods if name in names]
    return [*first, *(name for name in names if name not in first)]
