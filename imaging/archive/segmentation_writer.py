"""Writing label maps as DICOM segmentations that lie beside their image series in the archive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...common.files import atomic_file
from ...errors import UsageError, VolumeError
from ..volumes import Volume
from .optional_packages import damage_reported, highdicom_package, pydicom_package
from .series_planes import SeriesPlanes, read_headers, read_planes

MAX_SEGMENTS = (
    1024  # each is described at length; labels of more are no classes but, for instance, connected components
)
MAX_NAME = 64  # characters of a label in DICOM (LO)
MAX_OFF_GRID = 0.01  # voxels, between the grids of labels and series
SERIES_NUMBER_STEP = 1000  # to the number of the image series, so that a viewer lists the segmentation below all images
# What a segment shows is not known here beyond its name: the general codes of SNOMED CT.
CATEGORY = ("91723000", "SCT", "Anatomical Structure")
PROPERTY = ("85756007", "SCT", "Tissue")
# May be missing from the images but must be, if empty, in a segmentation.
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
MAY_BE_EMPTY = (*PATIENT, "AccessionNumber", "StudyID", "StudyDate", "StudyTime")


def write_segmentation(
    path: Path, labels: Volume, series: tuple[Path, ...], *, names: Mapping[int, str], algorithm: str
) -> None:
    """Write a label map as a binary DICOM segmentation of an image series, atomically.

    It becomes a new series of the images' study: patient and study come from the headers of the images, so the file is
    as confidential as these, and must stay beside them. Segments are numbered by label value. All values from 1 to the
    highest of `labels` and `names` become segments, those without voxels too; without any voxel, empty frames are
    written, since the format demands frames.

    Args:
        path: the file to write.
        labels: whole numbers from 0 (background) to 1024, on the grid and in the stored order of
            `series.read_series(series)`.
        series: files of the images in slice order, see `series.find_series`.
        names: labels of the segments by value; "class VALUE" for others. A name of 0, the background, is not written.
        algorithm: what made the labels, such as the method and the version of a network, 1 to 64 characters.

    Raises:
        UsageError: highdicom is not installed, there is no class, or a name is none that DICOM can hold.
        VolumeError: the labels lie on another grid than the images, or the headers of the images lack what a
            segmentation must contain.
    """
    planes, where = read_planes(series), Path(series[0]).parent
    _refuse_other_grid(labels, planes, where)
    segments = _segment_names(labels.data, names)
    _refuse_bad_text("algorithm", algorithm)
    highdicom, sources = highdicom_package(), read_headers(series)
    with damage_reported(
        f"{where}: the headers of the images lack what a segmentation needs ({{kind}}); write the labels as NIfTI"
    ):
        _complete(sources, labels.spacing[2], where)
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.ascontiguousarray(labels.data.T.astype(np.uint16)),  # (slices, rows, columns)
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(segments, algorithm, highdicom),
            series_instance_uid=highdicom.UID(),
            series_number=int(sources[0].get("SeriesNumber") or 0) + SERIES_NUMBER_STEP,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="fedfactory",
            manufacturer_model_name="fedfactory",
            software_versions=__version__,
            device_serial_number="none",
            content_label="SEGMENTATION",
            content_description=algorithm,
            series_description=f"Segmentation by {algorithm}"[:MAX_NAME],
            omit_empty_frames=bool(labels.data.any()),
            specific_character_set="ISO_IR 192",  # UTF-8, since names may need other letters than those of the images
        )
        with atomic_file(path, suffix=".dcm") as temporary:
            segmentation.save_as(temporary)


def _refuse_other_grid(labels: Volume, planes: SeriesPlanes, where: Path) -> None:
    if labels.data.shape != planes.shape:
        raise VolumeError(f"labels have shape {labels.data.shape}; they must have that of the images, {planes.shape}")
    corners = np.concatenate([np.zeros((3, 1)), np.diag(labels.data.shape)], axis=1)
    moved = np.linalg.inv(planes.affine) @ labels.affine @ np.concatenate([corners, np.ones((1, 4))])
    if not abs(moved[:3] - corners).max() <= MAX_OFF_GRID:
        raise VolumeError(f"labels lie elsewhere than the images of {where}; give those of the same series")


def _segment_names(data: np.ndarray, names: Mapping[int, str]) -> list[str]:
    """Names of the segments 1, 2, and so on.

    Raises: UsageError for labels or names that cannot be segments.
    """
    lowest, highest = int(data.min()), max([int(data.max()), *names])
    if data.dtype.kind not in "bui" or lowest < 0 or min([0, *names]) < 0 or highest > MAX_SEGMENTS:
        raise UsageError(f"label values go up to {highest}; segments must be whole numbers from 1 to {MAX_SEGMENTS}")
    if highest == 0:
        raise UsageError("labels have no class and no name; a segmentation must have a segment, name its classes")
    found = [names.get(value, f"class {value}") for value in range(1, highest + 1)]
    for name in found:
        _refuse_bad_text("a segment's name", name)
    return found


def _refuse_bad_text(what: str, text: str) -> None:
    if not 1 <= len(text.strip()) <= len(text) <= MAX_NAME or "\\" in text or not text.isprintable():
        raise UsageError(f"{what} is {text!r}; it must have 1 to {MAX_NAME} characters and no backslash")


def _complete(sources: list[Any], spacing: float, where: Path) -> None:
    """Add to the headers in memory what highdicom expects and archives may omit.

    Raises: VolumeError if the images name no frame of reference.
    """
    if not sources[0].get("FrameOfReferenceUID"):
        raise VolumeError(f"{where}: the images name no frame of reference; write the labels as NIfTI")
    for header in sources:
        for keyword in MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, "")
        if not header.get("SliceThickness"):
            header.SliceThickness = pydicom_package().valuerep.DSfloat(spacing, auto_format=True)


def _descriptions(segments: list[str], algorithm: str, highdicom: Any) -> list[Any]:
    """Descriptions of the segments 1, 2, and so on."""
    codes = highdicom.sr.CodedConcept
    identification = highdicom.AlgorithmIdentificationSequence(
        name="fedfactory",
        family=codes("123110", "DCM", "Artificial Intelligence"),
        version=__version__,
        parameters={"algorithm": algorithm},
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes(*CATEGORY),
            segmented_property_type=codes(*PROPERTY),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
            tracking_uid=highdicom.UID(),
            tracking_id=f"fedfactory {number} {name}",
        )
        for number, name in enumerate(segments, start=1)
    ]
