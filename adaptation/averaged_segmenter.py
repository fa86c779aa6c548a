"""The average of a federated training as a segmenter: for sites that have no file of their own from it."""

from __future__ import annotations

from pathlib import Path

from ..common.sketches import sketch
from ..common.weights_file import load_strictly, read_card, read_weights, refuse_misfit
from ..errors import CheckpointError, UsageError
from ..imaging.slice_format import SliceFormat
from .methods.interface.method_config import MethodConfig
from .methods.interface.site_round import SiteContext
from .segmenter import KIND, Segmenter
from .segmenter_card import FEDERATED, FederatedDesign, SegmenterCard

AVERAGE = "federated segmenter"  # kind of the file that a researcher keeps of a run
WHOLE = ("fedavg", "fedprox")  # methods whose average is a segmenter, the same one for every site


def load_segmenter(path: str | Path, fmt: SliceFormat) -> Segmenter:
    """A segmenter from its own file, or from the average that `train-segmenter` writes.

    Args:
        path: either file.
        fmt: of the slices that an average is to segment: it holds no format, since every site has an intensity window
            of its own. A segmenter's own file keeps its format.

    Raises: UsageError if the file is missing, or an average is no segmenter by itself or one for other slices;
        CheckpointError if the file is damaged or of another kind.
    """
    if read_card(path, kind=(KIND, AVERAGE))["kind"] == KIND:
        return Segmenter.load(path)
    weights, values = read_weights(path, kind=AVERAGE)
    try:
        method = MethodConfig.from_dict(values["config"])
    except (UsageError, KeyError, TypeError) as error:
        raise _unusable(path, error) from None
    if method.method not in WHOLE:
        raise UsageError(
            f"{path}: is the average of {method.method}; only that of {' or '.join(WHOLE)} is a segmenter by itself"
        )
    for name in ("size", "channels", "colour"):
        if getattr(method, name) != getattr(fmt, name):
            raise UsageError(f"{path}: {name} is {getattr(method, name)}; the slices have {getattr(fmt, name)}")
    card = SegmenterCard(
        classes=method.classes,
        network=FEDERATED,
        federated=FederatedDesign(method=method, context=SiteContext()),
        single_objects=method.single_objects,
    )
    described = {"format": fmt.to_dict(), **card.to_dict()}
    try:
        sketched = sketch(lambda: Segmenter.from_dict(described), tensors=len(weights))  # before memory is taken
        refuse_misfit(sketched.network, weights, path)
        segmenter = Segmenter.from_dict(described)
    except UsageError as error:
        raise _unusable(path, error) from None
    load_strictly(segmenter.network, weights, path)
    return segmenter


def _unusable(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: its card is not usable ({error}); give an average as it was written")
