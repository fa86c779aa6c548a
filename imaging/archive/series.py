"""DICOM series: which files belong together, and reading them as a volume. Headers are never copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VolumeError
from ..volumes import MAX_VOXELS, Volume
from .folder_content import content_of
from .headers import read_header
from .optional_packages import plain_text
from .series_checks import MAX_UNEVENNESS, refuse_unusable
from .slices import Slice, frames_affine

# Transfer syntaxes without compressed pixels, and names of the usual others.
UNPACKED = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
JPEG = "1.2.840.10008.1.2.4."
PACKINGS = {
    f"{JPEG}50": "JPEG", f"{JPEG}51": "JPEG", f"{JPEG}57": "lossless JPEG", f"{JPEG}70": "lossless JPEG",
    f"{JPEG}80": "JPEG-LS", f"{JPEG}81": "JPEG-LS", f"{JPEG}90": "JPEG 2000", f"{JPEG}91": "JPEG 2000",
    f"{JPEG}102": "MPEG-4 video", f"{JPEG}201": "HTJ2K", f"{JPEG}202": "HTJ2K", f"{JPEG}203": "HTJ2K",
    "1.2.840.10008.1.2.5": "RLE", "1.2.840.10008.1.2.1.99": "deflate",
}  # fmt: skip
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def find_series(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The image series in a folder, without its subfolders: files in slice order by identifier.

    Objects that are no images, damaged files, and copies of slices are left out; see `folder_content.content_of` for
    what they are.
    """
    itk_library()
    return {series.key: series.files for series in content_of(list(Path(folder).iterdir())).series}


def read_series(files: Sequence[Path]) -> Volume:
    """Read one series, in the scanner's own values (rescale slope and intercept applied).

    Args:
        files: files of the series in slice order, see `find_series`; or one file of several frames, which are brought
            into slice order.

    Returns: float32 volume; its third stored axis is the slice axis.
    Raises: VolumeError if the files cannot be read, are colour images, or make no volume, see
        `series_checks.refuse_unusable`.
    """
    itk, where = itk_library(), Path(files[0]).parent
    slices = _checked(files)
    try:
        reader = _reader(files)
        reader.Update()
        image = reader.GetOutput()
        uneven = _unevenness(image)
        data = np.moveaxis(itk.array_from_image(image), (0, 1, 2), (2, 1, 0))
        affine, spacing = _affine(image, slices), float(image.GetSpacing()[2])
    except VolumeError:
        raise
    except Exception as error:  # ITK raises RuntimeError with a page of text
        raise _unreadable(where, error, slices) from None
    if data.shape[2] != len(slices):
        raise VolumeError(f"{where}: has {data.shape[2]} slices and {len(slices)} in its headers; export it again")
    if len(files) < len(slices):
        return Volume(np.ascontiguousarray(data[:, :, [piece.frame for piece in slices]]), affine)
    if uneven > MAX_UNEVENNESS * spacing:
        raise VolumeError(f"{where}: gaps between slices differ by up to {uneven:.2f} mm; give evenly spaced slices")
    return Volume(np.ascontiguousarray(data), affine)


def read_grid(files: Sequence[Path]) -> tuple[tuple[int, int, int], np.ndarray]:
    """The grid on which `read_series` gives a series, from its headers alone.

    Args:
        files: files of the series in slice order, see `find_series`.

    Returns: shape (columns, rows, slices), and the (4, 4) affine, voxel index to millimetres (RAS+).
    Raises: VolumeError if the headers cannot be read, or are those of colour images.
    """
    where, placed = Path(files[0]).parent, _checked(files)
    try:
        reader = _reader(files)
        reader.UpdateOutputInformation()
        image = reader.GetOutput()
        columns, rows, slices = (int(side) for side in image.GetLargestPossibleRegion().GetSize())
        return (columns, rows, slices), _affine(image, placed if slices > len(files) else ())
    except VolumeError:
        raise
    except Exception as error:
        raise _unreadable(where, error, placed) from None


def _checked(files: Sequence[Path]) -> list[Slice]:
    """The slices of a series in their order. Raises: VolumeError if they make no volume."""
    try:
        headers = [(Path(file), read_header(Path(file))) for file in files]
    except OSError as error:
        raise VolumeError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
    for path, header in headers:
        if header is None:
            raise VolumeError(f"{path.parent}: {path.name} is no DICOM file; copy it again")
    return refuse_unusable([header for _, header in headers if header is not None])


def patient_digest(files: Sequence[Path]) -> str | None:
    """A digest that is equal for series of one patient; None if the headers name no patient.

    It has no key, so whoever has it finds the identifier by trying: it is for memory, never for a file or a message,
    see `pseudonyms.pseudonym`.
    """
    try:
        header = read_header(Path(files[0]))
    except OSError:  # reading the series reports what is wrong
        return None
    patient = "" if header is None else header.values.get("PatientID", "")
    return hashlib.sha256(f"fedfactory/{patient}".encode()).hexdigest()[:16] if patient else None


def _reader(files: Sequence[Path]) -> Any:
    """An `itk.ImageSeriesReader` of the files, not yet run."""
    itk, first = itk_library(), Path(files[0])
    header = _header(first)
    if header.GetNumberOfComponents() != 1:
        raise VolumeError(f"{first.parent}: colour images, expected one grey value per pixel")
    frames = header.GetDimensions(2) if header.GetNumberOfDimensions() > 2 else 1
    if header.GetDimensions(0) * header.GetDimensions(1) * frames * len(files) > MAX_VOXELS:
        raise VolumeError(f"{first.parent}: the headers claim more than {MAX_VOXELS} voxels; at most so many are read")
    reader = itk.ImageSeriesReader[itk.Image[itk.F, 3]].New(FileNames=[str(file) for file in files])
    reader.SetImageIO(itk.GDCMImageIO.New())
    reader.ForceOrthogonalDirectionOff()  # a tilted gantry is a shear, which the affine can hold
    return reader


def _affine(image: Any, slices: Sequence[Slice]) -> np.ndarray:
    """(4, 4), voxel index to millimetres (RAS+), of an ITK image, whose world is LPS.

    Args:
        slices: in their order. Where they are frames of one file, their own places count: ITK takes the first frame for
            the lowest.
    """
    if len({piece.header.path for piece in slices}) < len(slices):
        return LPS_TO_RAS @ frames_affine(slices)
    affine = np.eye(4)
    affine[:3, :3] = itk_library().array_from_matrix(image.GetDirection()) * np.array(
        image.GetSpacing(), dtype=np.float64
    )
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


def _header(path: Path) -> Any:
    """The header of a file, an `itk.GDCMImageIO`."""
    header = itk_library().GDCMImageIO.New()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


def _unevenness(image: Any) -> float:
    """Largest deviation of the gaps between slices from their mean, in millimetres, as ITK measured it."""
    dictionary = image.GetMetaDataDictionary()
    key = "ITK_non_uniform_sampling_deviation"
    return float(dictionary[key]) if dictionary.HasKey(key) else 0.0


def _unreadable(where: Path, error: Exception, slices: Sequence[Slice]) -> VolumeError:
    """The error of a series that ITK does not read."""
    packing = slices[0].header.values.get("TransferSyntax", "")
    if packing not in UNPACKED:
        return VolumeError(
            f"{where}: its pixels are packed ({plain_text(PACKINGS.get(packing, packing))[:64]}), and ITK does not "
            "unpack them: they are damaged, or of a kind that it does not know; export the series uncompressed"
        )
    return VolumeError(f"{where}: cannot be read as a DICOM series ({_reason(error)}); copy it again")


def _reason(error: Exception) -> str:
    """The last line of a long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


@cache
def itk_library() -> Any:
    """The ITK package, which has no types, with everything loaded that this module calls.

    ITK loads its parts when they are first named, and changes the working folder of the whole process meanwhile. Other
    threads that open relative paths in that moment find no file. Whoever reads files in threads and meets ones that
    need ITK calls this function before the threads start; `find_series` does.
    """
    import itk  # takes seconds, and only DICOM needs it

    itk.array_from_image(itk.image_from_array(np.zeros((1, 1, 1), np.float32)))
    _ = itk.GDCMSeriesFileNames, itk.GDCMImageIO, itk.ImageSeriesReader[itk.Image[itk.F, 3]]
    itk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters becomes an error of this package
    return itk
