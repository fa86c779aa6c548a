"""What each federated segmentation method is for and what leaves a site with it; importable without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MethodDescription:
    """A method in words, and what it requires of the sites.

    Attributes:
        name: the value of `method` in a configuration and on the command line.
        summary: what the method does, in half a sentence.
        choose: completes "choose this method when ...".
        needs: labels that must exist among the sites.
        leaves: what every site sends to the researcher.
        stays: what never leaves a site.
        needs_public: whether the researcher and all sites must hold the same labelled public slices.
        needs_modalities: whether every site must name the modality of its slices.
        needs_dense: whether at least one site must have dense labels.
        needs_fixations: whether at least one site must have fixations.
    """

    name: str
    summary: str
    choose: str
    needs: str = "labels of any kind at some site"
    leaves: str = "all weights; losses, counts and scores"
    stays: str = "images, labels, optimizer states"
    needs_public: bool = False
    needs_modalities: bool = False
    needs_dense: bool = False
    needs_fixations: bool = False


METHOD_CATALOGUE: dict[str, MethodDescription] = {
    description.name: description
    for description in (
        MethodDescription(
            name="local",
            summary="every site trains for itself, nothing is shared",
            choose="sites may not share anything; the baseline to compare with",
            needs="labels of any kind at every site",
            leaves="losses, counts and scores; no weights",
            stays="the whole model, images, labels, optimizer states",
        ),
        MethodDescription(
            name="fedavg",
            summary="weights are averaged in proportion to the number of labelled slices",
            choose="the sites' images are alike and labels are plentiful",
        ),
        MethodDescription(
            name="fedprox",
            summary="fedavg with a proximal term that keeps each site near the average",
            choose="sites differ and rounds are long",
        ),
        MethodDescription(
            name="fedbn",
            summary="fedavg whose normalisation layers stay at their site",
            choose="contrast differs between sites",
            leaves="all weights but those of normalisation layers; losses, counts and scores",
            stays="normalisation layers, images, labels, optimizer states",
        ),
        MethodDescription(
            name="fedicra",
            summary="scribbles, points, boxes or masks; a personalised model for each site",
            choose="labels are sparse and of different kinds, and each site wants its own model",
            leaves="all weights; the mean mixing weight of each higher layer; losses, counts and scores",
            stays="how a site mixes each of its own and the average's weights, images, labels, optimizer states",
        ),
        MethodDescription(
            name="fedmix",
            summary="pixel, box or image labels, or none; one global model; at least one site has pixel labels",
            choose="one site has drawn masks and the others have boxes, image labels or nothing",
            needs="drawn masks at one site",
            leaves="all weights of both networks; losses, numbers of accepted slices and scores",
            needs_dense=True,
        ),
        MethodDescription(
            name="gaze",
            summary="eye fixations or masks; one global model",
            choose="readers look at scans and nobody draws masks; there is one target structure",
            needs="fixations at one site; others may have masks",
            leaves="all weights of the networks of all levels; losses, counts and scores",
            stays="images, labels, fixations and the settings with which a site reads them, optimizer states",
            needs_fixations=True,
        ),
        MethodDescription(
            name="hssf",
            summary="no labels except on public slices that all sites have; every site chooses and keeps its network",
            choose="weights may not leave, networks differ and nobody has labels",
            needs="labelled slices that all sites may have",
            leaves="predictions on the public slices; losses, counts and scores; no weights",
            stays="the whole network, images, labels, optimizer states",
            needs_public=True,
        ),
        MethodDescription(
            name="lssl",
            summary="no labels except on public slices that all sites have; equal networks whose weights are averaged",
            choose="nobody has labels, networks are equal and weights may leave",
            needs="labelled slices that all sites may have",
            needs_public=True,
        ),
        MethodDescription(
            name="cmc",
            summary="two modalities that need not be aligned, few labels; a site may lack one of the modalities",
            choose="sites show the same organs in two modalities and have few labels",
            needs="two modalities among the sites, labels at some site",
            needs_modalities=True,
        ),
    )
}


def describe(name: str) -> MethodDescription:
    """The description of the method called `name`. Raises: UsageError for an unknown name."""
    if name not in METHOD_CATALOGUE:
        raise UsageError(f"method is '{name}'; choose one of {', '.join(METHOD_CATALOGUE)}")
    return METHOD_CATALOGUE[name]
