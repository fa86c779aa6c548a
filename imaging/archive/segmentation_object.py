"""Reading DICOM segmentations as label maps on the grid of their image series."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VolumeError
from ..volumes import Volume
from .object_kinds import LABEL_MAP_UID, is_segmentation_object
from .optional_packages import damage_reported, plain_text, pydicom_package, read_object
from .series_planes import SeriesPlanes, read_planes

MAX_OFF_PLANE = 0.01  # distance of a frame from its slice, as a part of the spacing
MAX_FAR_CORNER = 0.1  # the same at the far corners, where rounded directions add up
MAX_VALUE = np.iinfo(np.uint16).max


def read_segmentation(path: Path, series: tuple[Path, ...]) -> tuple[Volume, dict[int, str]]:
    """Read a DICOM segmentation (binary, fractional or label map) on the grid of the series that it was made for.

    Frames are placed by their position, or where they have none, by the image that they refer to; slices without frames
    are background. Of fractional segments, voxels with more than half of the maximum are inside.

    Args:
        path: the segmentation.
        series: files of the images in slice order, see `series.find_series`.

    Returns: a uint16 label map in the stored order and with the affine of `series.read_series(series)`, where a voxel's
        value is its segment's number, 0 without a segment; and the labels of all segments by number, of those without
        voxels too.
    Raises:
        UsageError: pydicom is not installed.
        VolumeError: the file is damaged or no segmentation; it refers to another series or another frame of reference;
            a frame does not lie on the slices, by more than 1 % of the spacing; or segments overlap.
    """
    path = Path(path)
    pydicom = pydicom_package()
    planes = read_planes(series)
    if not is_segmentation_object(path):
        raise VolumeError(f"{path}: is no DICOM segmentation; give a SEG file, or labels as NIfTI")
    with damage_reported(f"{path}: cannot be read as a DICOM segmentation ({{kind}}); export or copy it again"):
        seg = read_object(path)
        names = _names(path, seg)
        frames = list(seg.PerFrameFunctionalGroupsSequence)
        if len(frames) != int(seg.NumberOfFrames):
            raise VolumeError(f"{path}: has other numbers of frames in its header and its content; export it again")
        _refuse_other_series(path, seg, frames, planes)
        labels = np.zeros(planes.shape[::-1], dtype=np.uint16).T  # a slice lies together in memory, which is faster
        shared = seg.SharedFunctionalGroupsSequence[0] if seg.get("SharedFunctionalGroupsSequence") else None
        # Checked for all frames before any is decoded, since a header may claim frames of any size.
        places = [_place(path, number, _Groups(own, shared), seg, planes) for number, own in enumerate(frames, start=1)]
        for place, own, frame in zip(places, frames, _decoded(seg, pydicom), strict=True):
            numbers = _numbers(path, frame, seg, _Groups(own, shared), names)
            pixels = np.nonzero(numbers)
            voxels = (*place.voxels(*pixels), place.slice)
            _refuse_overlap(path, labels[voxels], numbers[pixels], names)
            labels[voxels] = numbers[pixels]
    return Volume(np.ascontiguousarray(labels), planes.affine), names


class _Groups:
    """Functional groups of one frame: its own, and those that all frames share."""

    def __init__(self, own: Any, shared: Any) -> None:
        self.own, self.shared = own, shared

    def find(self, keyword: str) -> Any:
        """The only item of a group, or None if neither has it."""
        for groups in (self.own, self.shared):
            if groups is not None and groups.get(keyword):
                return groups[keyword].value[0]
        return None

    def images(self) -> set[str]:
        """Identifiers of the images that the frame was derived from."""
        derivations = self.own.get("DerivationImageSequence") or ()
        sources = (source for item in derivations for source in item.get("SourceImageSequence") or ())
        return {str(source.ReferencedSOPInstanceUID) for source in sources}


def _names(path: Path, seg: Any) -> dict[int, str]:
    """Labels of the segments by number, without the background that a label map may describe.

    Raises: VolumeError if numbers are not unique and from 1 to 65535.
    """
    described = [(int(item.SegmentNumber), plain_text(item.SegmentLabel)) for item in seg.SegmentSequence]
    named = [(number, name) for number, name in described if number != 0 or seg.SOPClassUID != LABEL_MAP_UID]
    numbers = [number for number, _ in named]
    if not numbers or len(set(numbers)) < len(numbers) or not 1 <= min(numbers) <= max(numbers) <= MAX_VALUE:
        raise VolumeError(f"{path}: segments must have different numbers from 1 to {MAX_VALUE}; export it again")
    return dict(named)


def _refuse_other_series(path: Path, seg: Any, frames: list[Any], planes: SeriesPlanes) -> None:
    """Refuse a segmentation that was not made for the series."""
    frame_of_reference = str(seg.get("FrameOfReferenceUID") or "")
    if frame_of_reference and planes.frame_of_reference and frame_of_reference != planes.frame_of_reference:
        raise VolumeError(
            f"{path}: lies in another frame of reference than the images; give the series it was made for"
        )
    named = {str(item.SeriesInstanceUID) for item in seg.get("ReferencedSeriesSequence") or ()}
    images = set().union(*(_Groups(own, None).images() for own in frames))
    if planes.series in named or images & set(planes.images):
        return
    if named or images:
        raise VolumeError(f"{path}: refers to another series than the images; give the series it was made for")
    if not frame_of_reference or frame_of_reference != planes.frame_of_reference:
        raise VolumeError(f"{path}: refers to no series and no frame of reference; export it again with references")


@dataclass(frozen=True)
class _Place:
    """Where a frame lies on the grid of the series.

    Attributes:
        slice: of the series.
        start: (2,), column and row of the frame's first pixel.
        steps: (2, 2), change of column and row (second axis) from one pixel to the next along a frame's row, and
            along a frame's column (first axis).
    """

    slice: int
    start: np.ndarray
    steps: np.ndarray

    def voxels(self, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows of the series' grid for (n,) rows and columns of the frame."""
        across, down = self.steps
        x, y = (self.start[axis] + column * across[axis] + row * down[axis] for axis in (0, 1))
        return x, y


def _place(path: Path, number: int, groups: _Groups, seg: Any, planes: SeriesPlanes) -> _Place:
    """Where a frame lies. Raises: VolumeError if it does not lie pixel on pixel on one slice."""
    which = f"{path}: frame {number}"
    rows, columns = int(seg.Rows), int(seg.Columns)
    images = [planes.images.index(uid) for uid in groups.images() if uid in planes.images]
    position = groups.find("PlanePositionSequence")
    if position is None:
        if len(images) != 1 or (columns, rows) != planes.shape[:2]:
            raise VolumeError(f"{which} has no position, and is not of the size of one image; export it again")
        return _Place(images[0], np.zeros(2, dtype=int), np.eye(2, dtype=int))
    down, across = (float(side) for side in groups.find("PixelMeasuresSequence").PixelSpacing)
    cosines = np.array([float(x) for x in groups.find("PlaneOrientationSequence").ImageOrientationPatient])
    pixel = cosines.reshape(2, 3) * [[across], [down]]
    last = np.array([[columns - 1], [rows - 1]])
    first = np.array([float(x) for x in position.ImagePositionPatient])
    near, corners = planes.nearest_slice(first + np.array([np.zeros(3), *(pixel * last)]))
    if images and near not in images:
        raise VolumeError(f"{which} lies on slice {near + 1} but refers to slice {images[0] + 1}; export it again")
    whole = np.round(corners[:, :2])
    off = abs(corners - np.column_stack([whole, np.zeros(3)]))
    if not (off[0, 2] <= MAX_OFF_PLANE and off[:, 2].max() <= MAX_FAR_CORNER):
        raise VolumeError(f"{which} does not lie on a slice of the images; resample it to the images, or use NIfTI")
    steps = np.round(planes.voxels(pixel) - planes.voxels(np.zeros((1, 3))))[:, :2]
    straight = (
        (abs(steps) @ [1, 1] == 1).all() and steps[0] @ steps[1] == 0 and (whole[1:] == whole[0] + steps * last).all()
    )
    if not (straight and off[0].max() <= MAX_OFF_PLANE and off.max() <= MAX_FAR_CORNER):
        raise VolumeError(f"{which} has other pixels than the images; resample it to the images, or use NIfTI")
    if (whole < 0).any() or (whole >= planes.shape[:2]).any():
        raise VolumeError(f"{which} reaches beyond the images; cut it to the images, or use NIfTI")
    return _Place(near, whole[0].astype(int), steps.astype(int))


def _decoded(seg: Any, pydicom: Any) -> Iterator[np.ndarray]:
    """The frames one by one as they are stored, (rows, columns).

    Raises: ValueError if there are fewer pixels than the header says.
    """
    syntax = seg.file_meta.TransferSyntaxUID
    if seg.BitsAllocated != 1 or syntax.is_encapsulated or not syntax.is_little_endian:
        yield from pydicom.pixels.iter_pixels(seg, raw=True)
        return
    # pydicom 3.0 loses bits of frames that do not begin with a byte: bits follow each other across frames.
    packed, size = np.frombuffer(seg.PixelData, dtype=np.uint8), int(seg.Rows) * int(seg.Columns)
    for number in range(int(seg.NumberOfFrames)):
        first, skipped = divmod(number * size, 8)
        last = first + (skipped + size + 7) // 8
        if last > packed.size:
            raise ValueError("fewer pixels than the header says")
        bits = np.unpackbits(packed[first:last], bitorder="little")[skipped : skipped + size]
        yield bits.reshape(int(seg.Rows), int(seg.Columns))


def _numbers(path: Path, frame: np.ndarray, seg: Any, groups: _Groups, names: dict[int, str]) -> np.ndarray:
    """Segment numbers of a frame's pixels, uint16, 0 without a segment.

    Raises: VolumeError if the segmentation is of no known type, or a segment is not described.
    """
    kind = str(seg.SegmentationType)
    if kind == "LABELMAP":
        numbers = np.where(frame == int(seg.get("PixelPaddingValue") or 0), 0, frame).astype(np.uint16)
        found = set(np.unique(numbers).tolist()) - {0}
    elif kind in ("BINARY", "FRACTIONAL"):
        number = int(groups.find("SegmentIdentificationSequence").ReferencedSegmentNumber)
        inside = frame != 0 if kind == "BINARY" else frame > int(seg.MaximumFractionalValue) / 2
        numbers, found = inside * np.uint16(number), {number}
    else:
        raise VolumeError(f"{path}: its type is unknown; it must be binary, fractional or a label map")
    if unknown := found - names.keys():
        raise VolumeError(f"{path}: segment {min(unknown)} is not described; export it again")
    return numbers


def _refuse_overlap(path: Path, old: np.ndarray, new: np.ndarray, names: dict[int, str]) -> None:
    """Refuse to put segments on voxels that have another one; both are (n,)."""
    clash = (old != 0) & (old != new)
    if clash.any():
        first, second = (f"{value} ({names[value]})" for value in (int(old[clash][0]), int(new[clash][0])))
        raise VolumeError(
            f"{path}: segments {first} and {second} overlap; a voxel has one label, export segments without overlap"
        )
