"""How large the cases of a site are, and which of them are unlike the others or cut by the field of view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import median_abs_deviation

EQUAL_SPACING = 1e-3  # relative difference up to which two voxel sizes are the same
FEWEST_CASES = 3  # fewer have no median that one of them could differ from
OUTLIER_DEVIATIONS = 5.0  # robust standard deviations (1.4826 MAD) of the logarithm


@dataclass(frozen=True, kw_only=True)
class CaseSize:
    """The size of a case.

    Attributes:
        name: of the case.
        shape: (3,) number of voxels along the stored axes.
        spacing: (3,) voxel size along the stored axes, millimetres.
        foreground: volume of all structures together, millilitres; None where it is not known.
        cut_labels: label value to the number of slices in which the label touches the border of the image, see
            `cut_labels`.
    """

    name: str
    shape: Sequence[int]
    spacing: Sequence[float]
    foreground: float | None = None
    cut_labels: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_plane(self) -> list[int]:
        """The two stored axes of a slice."""
        return in_plane_axes(self.spacing)

    @property
    def width(self) -> float:
        """The longer side of the field of view in a slice, millimetres. The shorter side depends on the protocol."""
        return max(self.shape[axis] * self.spacing[axis] for axis in self.in_plane)

    @property
    def pixel(self) -> float:
        """Side of a square pixel with the area of the slices' pixels, millimetres."""
        return float(np.sqrt(np.prod([self.spacing[axis] for axis in self.in_plane])))

    @property
    def slice_distance(self) -> float:
        """From slice to slice, millimetres."""
        (axis,) = {0, 1, 2} - set(self.in_plane)
        return float(self.spacing[axis])


@dataclass(frozen=True)
class _Measure:
    """What is compared among cases.

    Attributes:
        name: in words.
        unit: of the values.
        of: reads it from a case.
        ordinary: factor from the median up to which a value is never an outlier, however equal the others are.
    """

    name: str
    unit: str
    of: Callable[[CaseSize], float | None]
    ordinary: float


# Scanners offer matrices of twice the size, and patients differ by a factor of two in volume; the longer side of the
# field of view is set by the body.
MEASURES = (
    _Measure("field of view", "mm", lambda size: size.width, 1.3),
    _Measure("pixel", "mm", lambda size: size.pixel, 2.5),
    _Measure("slice distance", "mm", lambda size: size.slice_distance, 2.5),
    _Measure("labelled volume", "ml", lambda size: size.foreground, 3.0),
)


def in_plane_axes(spacing: Sequence[float]) -> list[int]:
    """The two stored axes of a slice, for voxels of `spacing` (3,): all but the coarsest, or last of equally coarse."""
    coarsest = max(axis for axis in range(3) if spacing[axis] >= (1 - EQUAL_SPACING) * max(spacing))
    return [axis for axis in range(3) if axis != coarsest]


def cut_labels(labels: np.ndarray, spacing: Sequence[float]) -> dict[str, int]:
    """Label value to the number of slices in which the label touches the border of the image; only those that do.

    Args:
        labels: label map (X, Y, Z); 0 is background.
        spacing: (3,) voxel size along its axes, millimetres.
    """
    axes = in_plane_axes(spacing)
    (across,) = {0, 1, 2} - set(axes)
    rims = []
    for axis in axes:
        if labels.shape[axis] > 1:  # otherwise every voxel touches it
            rims += [np.moveaxis(labels, (across, axis), (0, 1))[:, end] for end in (0, -1)]
    rim = np.concatenate(rims, axis=1) if rims else np.zeros((1, 0), labels.dtype)
    return {str(int(value)): int((rim == value).any(axis=1).sum()) for value in np.unique(rim) if value}


def size_warnings(sizes: Sequence[CaseSize]) -> list[str]:
    """Sentences that name the cases whose size is an outlier of the site, and those with labels that are cut.

    A measure of a case is an outlier if its logarithm is more than five robust standard deviations (1.4826 times the
    median absolute deviation) from the site's median, and the case differs from the median by more than a factor that
    occurs among ordinary scans.

    Args:
        sizes: of all cases of a site.
    """
    found = outliers(sizes)
    sentences = []
    if found:
        sides = {size.name: _described(size) for size in sizes}
        listed = "; ".join(f"{name}, {sides[name]}: {', '.join(reasons)}" for name, reasons in found.items())
        sentences.append(
            f"{_counted(found)} of a size unlike the other cases of the site; check voxel size and patient ({listed})"
        )
    cut = {size.name: size.cut_labels for size in sizes if size.cut_labels}
    if cut:
        listed = "; ".join(
            f"{name}: " + ", ".join(f"label {value} in {count} slices" for value, count in labels.items())
            for name, labels in cut.items()
        )
        sentences.append(f"{_counted(cut)} with labels that touch the border of the image and may be cut ({listed})")
    return sentences


def outliers(sizes: Sequence[CaseSize]) -> dict[str, list[str]]:
    """Case to what is unlike the other cases, each with the value and the median; see `size_warnings`."""
    found: dict[str, list[str]] = {}
    for measure in MEASURES:
        values = {size.name: value for size in sizes if (value := measure.of(size))}
        if len(values) < FEWEST_CASES:
            continue
        logs = np.log(list(values.values()))
        middle = float(np.median(logs))
        limit = max(np.log(measure.ordinary), OUTLIER_DEVIATIONS * float(median_abs_deviation(logs, scale="normal")))
        for (name, value), log in zip(values.items(), logs, strict=True):
            if abs(log - middle) > limit:
                text = f"{measure.name} {value:.3g} {measure.unit}, median {np.exp(middle):.3g} {measure.unit}"
                found.setdefault(name, []).append(text)
    return found


def _described(size: CaseSize) -> str:
    """Voxels and labelled volume of a case in words."""
    voxels, sides = (" x ".join(f"{n:.3g}" for n in triple) for triple in (size.shape, size.spacing))
    labelled = "" if size.foreground is None else f", {size.foreground:.0f} ml labelled"
    return f"{voxels} voxels of {sides} mm{labelled}"


def _counted(cases: Mapping[str, object]) -> str:
    return f"{len(cases)} case{'s' if len(cases) > 1 else ''}"
