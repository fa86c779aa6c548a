"""The average of a federated training as a segmenter: for sites that have no file of their own from it."""

from __future__ import annotations

from pathlib import Path

from ..common.weights_file import read_card, read_weights
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
        raise CheckpointError(f"{path}: its card is not usable ({error}); give an average as it was written") from None
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
    return Segmenter.with_weights({"format": fmt.to_dict(), **card.to_dict()}, weights, path)
