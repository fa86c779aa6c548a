"""A localiser finds the place of the structures in an image of the whole body, around which slices are then cut.

It is a segmenter of coarse slices of whole images. Its file is that of a segmenter, or a labelled factory with which it
travels.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import ndimage

from ..common.progress import track
from ..common.sketches import sketch
from ..common.weights_file import fingerprint, load_strictly, read_weights, refuse_misfit
from ..errors import CheckpointError, ConfigError, FedFactoryError, UsageError, VolumeError
from ..imaging.case_files import CaseFiles
from ..imaging.image_reader import read_image
from ..imaging.images import Image
from .inference import slice_probabilities
from .labelled_factory import KIND as LABELLED_FACTORY
from .labelled_factory import LOCALISER
from .segmenter import KIND as SEGMENTER
from .segmenter import Segmenter

DECIMALS = 2  # of places in millimetres, as in the table that `fedfactory locate` writes
PARTS = 0.1  # of the largest object's size: smaller objects are taken for errors
ODD_SIZE = 3.0  # times smaller or larger than all cases of the labelled site: no structures, or not all of them
RIM = 0.02  # share of the voxels at either end of the structures that do not count for their middle


@dataclass(frozen=True)
class FoundPlace:
    """What a localiser has found in an image.

    Attributes:
        centre: the middle of the structures in scanner millimetres, the world coordinates of NIfTI.
        millilitres: their volume.
    """

    centre: tuple[float, float, float]
    millilitres: float


@dataclass(frozen=True)
class Localiser:
    """A segmenter that finds the place of the structures; a source of centres, see `CentreSource`.

    Attributes:
        path: its file, for messages.
        segmenter: of whole coarse slices; all labels above 0 are structures.

    Raises: ConfigError if the segmenter sees only a part of its slices.
    """

    path: Path
    segmenter: Segmenter
    # One image at a time: PyTorch uses all cores for it, and its memory does not grow with the number of workers.
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        plan, size = self.segmenter.card.plan, self.segmenter.format.size
        if plan is not None and plan.window < size:
            raise ConfigError(
                f"{self.path}: this segmenter sees {plan.window} of its slices' {size} pixels, so it cannot find what "
                "lies elsewhere; give a localiser, made by `fedfactory train-localiser`"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the network's weights and the card: equal for the same localiser in different files."""
        card = json.dumps(self.segmenter.to_dict(), sort_keys=True)
        return hashlib.sha256((fingerprint(self.segmenter.network.state_dict()) + card).encode()).hexdigest()

    def find(self, case: str, image: Image) -> FoundPlace:
        """The place of the structures.

        Raises: VolumeError that names the case if nothing is found, or something of a size that no structures have.
        """
        with self._lock:
            try:
                found = find_place(image, self.segmenter)
            except VolumeError as error:
                raise VolumeError(f"{case}: {error}") from None
        smallest, largest = self.segmenter.card.volumes or (0.0, math.inf)
        if found is not None and smallest / ODD_SIZE <= found.millilitres <= largest * ODD_SIZE:
            return found
        what = "nothing"
        if found is not None:
            what = f"{found.millilitres:.2g} ml ({smallest:g} to {largest:g} ml at the labelled site)"
        raise VolumeError(
            f"{self.path}: finds {what} in {case}; write a table with `fedfactory locate`, add a row for this case, "
            "and give the table as `centres`"
        )

    def voxel_in(self, case: str, image: Image) -> np.ndarray:
        """See `CentreSource`."""
        return np.linalg.inv(image.affine)[:3] @ [*self.find(case, image).centre, 1.0]


def find_place(image: Image, segmenter: Segmenter) -> FoundPlace | None:
    """The place of the structures in an image; None if nothing is found.

    Objects that are much smaller than the largest one do not count. If the structures are one connected object, as the
    segmenter has learnt from its labelled site, only the largest object counts. The centre is the middle between the
    ends of what is left along each axis, so that slices around it lose as little as possible on either side.

    Args:
        image: of the segmenter's channels.
        segmenter: of whole coarse slices; all labels above 0 are structures.

    Raises: VolumeError for an image without contrast.
    """
    grid, probabilities = slice_probabilities(image, [segmenter])
    labels = segmenter.tidied(probabilities.argmax(1).astype(np.uint8))
    shown = np.zeros(labels.shape, dtype=bool)
    shown[grid.kept_pixels] = labels[grid.kept_pixels] > 0
    objects, count = ndimage.label(shown)
    if not count:
        return None
    sizes = np.bincount(objects.ravel())
    sizes[0] = 0
    places = np.nonzero((sizes >= PARTS * sizes.max())[objects])
    slice_, row, column = (float(np.quantile(values, [RIM, 1 - RIM]).mean()) for values in places)
    x, y, z = (round(value, DECIMALS) for value in grid.millimetres_of((slice_, row, column)))
    return FoundPlace((x, y, z), float(len(places[0]) * grid.pixel_volume / 1000))


def load_localiser(path: str | Path) -> Localiser:
    """The localiser in a labelled factory's or a segmenter's file.

    Raises: UsageError if the file is missing, holds no localiser, or a segmenter that is none; CheckpointError if it is
        damaged or of another kind.
    """
    tensors, card = read_weights(path, kind=(LABELLED_FACTORY, SEGMENTER))
    if card["kind"] == LABELLED_FACTORY:
        card = card.get("localiser")
        tensors = {name.removeprefix(LOCALISER): t for name, t in tensors.items() if name.startswith(LOCALISER)}
    if card is None:
        raise UsageError(f"{path}: has no localiser; give one that was made by `fedfactory train-localiser`")
    try:
        sketched = sketch(lambda: Segmenter.from_dict(card), tensors=len(tensors))  # before memory is taken
        refuse_misfit(sketched.network, tensors, path)
        segmenter = Segmenter.from_dict(card)
    except UsageError as error:
        raise CheckpointError(f"{path}: its card is not usable ({error}); give a localiser's file") from None
    load_strictly(segmenter.network, tensors, path)
    return Localiser(Path(path), segmenter)


def locate(cases: Sequence[CaseFiles], localiser: Localiser) -> tuple[dict[str, FoundPlace], dict[str, str]]:
    """Find the structures in several images.

    Args:
        cases: images; labels are not read.
        localiser: what finds them.

    Returns: places by name of the case, and for each other case the reason in one sentence.
    """
    places, failed = {}, {}
    for case in track(cases, "locating"):
        try:
            image = read_image(case.channels, fmt=localiser.segmenter.format, reading=case.reading)
            places[case.name] = localiser.find(case.name, image)
        except FedFactoryError as error:
            failed[case.name] = " ".join(str(error).split())
    return places, failed
