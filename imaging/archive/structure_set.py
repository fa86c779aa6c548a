"""Reading the contours of a DICOM structure set (RTSTRUCT) as a label map on the grid of its image series."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VolumeError
from ..volumes import Volume
from .object_kinds import kind_of_object
from .optional_packages import damage_reported, plain_text, read_object
from .series_planes import SeriesPlanes, read_planes

AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
MAX_OFF_PLANE = 0.05  # of a contour's points from their slice, as a part of the spacing: positions are rounded
DIGITS = 6  # to which positions in pixels are rounded, so that an edge through pixel centres is one for all of them
MAX_VALUE = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class Region:
    """The voxels of one region of interest.

    Attributes:
        name: of the region.
        size: number of voxels.
        slices: by slice, the (columns, rows) mask, packed to bits along the last axis.
    """

    name: str
    size: int
    slices: dict[int, np.ndarray]


def read_structure_set(path: Path, series: tuple[Path, ...]) -> tuple[Volume, dict[int, str]]:
    """Read the closed contours of a structure set as a label map.

    A voxel is inside a region if its centre is inside an odd number of the region's contours on its slice (so a contour
    in another is a hole). An edge through a centre has it inside on its low side alone, so regions that share an edge
    share no voxel. What lies beside the images is cut off. A region that lies inside another one as a whole is cut out
    of it (the inner one wins).

    Args:
        path: the structure set.
        series: files of the images in slice order, see `series.find_series`.

    Returns: a uint16 label map in the stored order and with the affine of `series.read_series(series)`, where regions
        have the values 1, 2, and so on in the order of their ROI numbers; and their names by value. Regions without
        contours, or with points only, have a name and no voxels.
    Raises:
        UsageError: pydicom is not installed.
        VolumeError: the file is damaged or no structure set; it refers to another series or another frame of reference;
            a contour is open or does not lie on a slice, by more than 5 % of the spacing; regions overlap in part, or
            one is covered by others.
    """
    path = Path(path)
    planes = read_planes(series)
    if kind_of_object(path) != "rtstruct":
        raise VolumeError(f"{path}: is no DICOM structure set; give an RTSTRUCT file, or labels as NIfTI")
    with damage_reported(f"{path}: cannot be read as a DICOM structure set ({{kind}}); export or copy it again"):
        dataset = read_object(path)
        if not dataset.get("StructureSetROISequence"):
            raise VolumeError(
                f"{path}: is a structure set without regions; export it again, or remove it if nothing was drawn"
            )
        listed = {int(item.ROINumber): item for item in dataset.StructureSetROISequence}
        if len(listed) < len(dataset.StructureSetROISequence) or len(listed) > MAX_VALUE:
            raise VolumeError(f"{path}: two regions have one number, or there are too many; export it again")
        contours = _contours(path, dataset, listed)
        if not dataset.get("ROIContourSequence"):
            raise VolumeError(
                f"{path}: is a structure set without contours; export it again, or remove it if nothing was drawn"
            )
        _refuse_other_series(path, dataset, contours, planes)
        regions = {
            value: _region(path, plain_text(listed[number].ROIName), contours.get(number, []), planes)
            for value, number in enumerate(sorted(listed), start=1)
        }
    return Volume(_painted(path, regions, planes), planes.affine), {value: r.name for value, r in regions.items()}


def inside(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels have their centre inside an odd number of polygons.

    Args:
        polygons: (n, 2) corners each, columns and rows in pixels; pixel centres are whole numbers. The last corner is
            joined to the first.
        shape: (columns, rows) of the image; polygons may reach beyond it.

    Returns: bool, of `shape`. An edge through a centre has it inside if the polygon goes on towards higher columns, or,
        for an edge along a row, higher rows.
    """
    columns, rows = shape
    # A pixel is inside if an odd number of edges cross its row beyond it; crossings[c] has those from c - 1 to c.
    crossings = np.zeros((columns + 1, rows), dtype=np.uint8)  # modulo 256, which stays odd or even
    for corners in (np.round(polygon, DIGITS) for polygon in polygons):
        (x, y), (next_x, next_y) = corners.T, np.roll(corners, -1, axis=0).T
        ends = np.ceil(np.sort([y, next_y], axis=0))
        low, high = np.clip(ends, 0, rows).astype(np.intp)
        counts = high - low  # of rows that an edge crosses; none for an edge along a row
        edge = np.repeat(np.arange(len(corners)), counts)
        row = low[edge] + np.arange(edge.size) - np.repeat(np.cumsum(counts) - counts, counts)
        slope = (next_x - x)[edge] / (next_y - y)[edge]
        at = np.ceil(np.round(x[edge] + (row - y[edge]) * slope, DIGITS))
        np.add.at(crossings, (np.clip(at, 0, columns).astype(np.intp), row), 1)
    beyond = np.cumsum(crossings[::-1], axis=0, dtype=np.uint8)[::-1][1:]
    return beyond % 2 == 1


def _contours(path: Path, dataset: Any, listed: dict[int, Any]) -> dict[int, list[Any]]:
    """Contours with an area by ROI number.

    Raises: VolumeError if contours belong to no region, or are open.
    """
    found: dict[int, list[Any]] = defaultdict(list)
    for item in dataset.get("ROIContourSequence") or ():
        number = int(item.ReferencedROINumber)
        if number not in listed:
            raise VolumeError(f"{path}: has contours of region {number}, which it does not list; export it again")
        for contour in item.get("ContourSequence") or ():
            kind = str(contour.ContourGeometricType)
            if kind in AREAS:
                found[number].append(contour)
            elif kind != "POINT":  # a point, such as an isocentre, covers no voxels
                name = plain_text(listed[number].ROIName)
                raise VolumeError(f"{path}: region {name} has an open contour; close it, or export without the region")
    return found


def _refuse_other_series(path: Path, dataset: Any, contours: dict[int, list[Any]], planes: SeriesPlanes) -> None:
    """Refuse contours that were not drawn on the series."""
    references = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    frames = {str(item.ReferencedFrameOfReferenceUID) for item in dataset.StructureSetROISequence}
    series = {
        str(item.SeriesInstanceUID)
        for reference in references
        for study in reference.get("RTReferencedStudySequence") or ()
        for item in study.get("RTReferencedSeriesSequence") or ()
    }
    images = {
        str(image.ReferencedSOPInstanceUID)
        for several in contours.values()
        for contour in several
        for image in contour.get("ContourImageSequence") or ()
    }
    if planes.frame_of_reference and frames - {planes.frame_of_reference}:
        raise VolumeError(
            f"{path}: lies in another frame of reference than the images; give the series it was made for"
        )
    if images - set(planes.images) or (series and planes.series not in series):
        raise VolumeError(f"{path}: refers to another series than the images; give the series it was made for")
    if not series and not images and not planes.frame_of_reference:
        raise VolumeError(f"{path}: refers to no series and no frame of reference; export it again with references")


def _region(path: Path, name: str, contours: list[Any], planes: SeriesPlanes) -> Region:
    """The voxels of a region of interest."""
    polygons: dict[int, list[np.ndarray]] = defaultdict(list)
    for contour in contours:
        values = _coordinates(contour)
        if values.size % 3 or values.size != 3 * int(contour.get("NumberOfContourPoints") or values.size // 3):
            raise VolumeError(f"{path}: region {name} has a contour with missing coordinates; export it again")
        if not np.isfinite(values).all():
            raise VolumeError(f"{path}: region {name} has a contour with infinite coordinates; export it again")
        near, places = planes.nearest_slice(values.reshape(-1, 3))
        if abs(places[:, 2]).max() > MAX_OFF_PLANE:
            raise VolumeError(
                f"{path}: region {name} has a contour beside the slices of the images; export it on their slices"
            )
        images = [str(image.ReferencedSOPInstanceUID) for image in contour.get("ContourImageSequence") or ()]
        if images and planes.images[near] not in images:
            raise VolumeError(
                f"{path}: region {name} has a contour on slice {near + 1} that names another; export it again"
            )
        if any(np.array_equal(places[:, :2], other) for other in polygons[near]):
            raise VolumeError(f"{path}: region {name} has a contour twice, which would erase it; export it again")
        polygons[near].append(places[:, :2])
    masks = {near: inside(corners, planes.shape[:2]) for near, corners in polygons.items()}
    size = sum(int(mask.sum()) for mask in masks.values())
    return Region(name, size, {near: np.packbits(mask, axis=-1) for near, mask in masks.items()})


def _coordinates(contour: Any) -> np.ndarray:
    """(n,) float64, the numbers of a contour. Not by pydicom, whose objects of each number take hundreds of bytes."""
    stored = contour.get_item("ContourData").value
    if isinstance(stored, bytes):
        parts = stored.decode("ascii").rstrip("\0 ").split("\\")
        return np.fromiter((float(part) for part in parts), np.float64, len(parts))
    return np.array([float(number) for number in contour.ContourData])


def _painted(path: Path, regions: dict[int, Region], planes: SeriesPlanes) -> np.ndarray:
    """Label map of regions that lie apart or inside one another; the largest is painted first.

    Raises: VolumeError, with their names, if regions overlap in part or leave another one without voxels.
    """
    labels = np.zeros(planes.shape, dtype=np.uint16)
    for value in sorted(regions, key=lambda value: -regions[value].size):
        region, below = regions[value], set()
        masks = {at: np.unpackbits(bits, axis=-1, count=planes.shape[1]) == 1 for at, bits in region.slices.items()}
        for at, mask in masks.items():
            below |= set(np.unique(labels[:, :, at][mask]).tolist())
            labels[:, :, at][mask] = value
        if len(below) > 1:
            other = regions[max(below)].name
            raise VolumeError(
                f"{path}: regions {region.name} and {other} overlap in part; a voxel has one label, export regions "
                "that lie apart or inside one another"
            )
    left = set(np.unique(labels).tolist())
    for value, region in regions.items():
        if region.size and value not in left:
            raise VolumeError(f"{path}: region {region.name} is covered by other regions; export it without these")
    return labels
