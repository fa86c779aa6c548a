"""Reading the image of a case, a volume or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.fault_log import faults_named
from ..errors import VolumeError
from .case_files import ImageFile, Reading
from .images import Image, VolumeImage, on_grid_of
from .pictures.picture_image import is_picture_file, read_picture_image
from .slice_format import SliceFormat
from .volume_files import AS_STORED, read_volume


def read_image(
    files: Sequence[ImageFile | None],
    *,
    fmt: SliceFormat | None = None,
    max_pixels: int | None = None,
    reading: Reading = AS_STORED,
) -> Image:
    """Read an image.

    Args:
        files: one for each channel, see `CaseFiles.channels`.
        fmt: of the slices that are wanted; a picture is then read with its channels, and no finer than they need it.
        max_pixels: of a picture that is read; None is the default of `read_picture`.
        reading: how volumes are read, see `CaseFiles.reading`.

    Raises: VolumeError or UsageError naming the file that cannot be used.
    """
    paths = [file[0] if isinstance(file, tuple) else file for file in files]
    first_path = next(path for path in paths if path is not None)
    with faults_named(first_path):
        return _read_image(files, paths, fmt=fmt, max_pixels=max_pixels, reading=reading)


def _read_image(
    files: Sequence[ImageFile | None],
    paths: Sequence[Path | None],
    *,
    fmt: SliceFormat | None,
    max_pixels: int | None,
    reading: Reading,
) -> Image:
    """`read_image` of channels whose first files are `paths`."""
    first_path = next(path for path in paths if path is not None)
    given = [file for file in files if file is not None]
    pictures = any(is_picture_file(file) for file in given)
    if fmt is not None and fmt.pictures != pictures:
        kinds = ("a picture", "volumes") if pictures else ("a volume", "pictures")
        raise VolumeError(f"{first_path}: is {kinds[0]}; it must be one of the {kinds[1]} that the slices are made of")
    if pictures:
        return read_picture_image(given, fmt=fmt, max_pixels=max_pixels)
    if fmt is not None and len(files) != fmt.channels:
        raise VolumeError(f"{first_path}: is one of {len(files)} channels; an image must have {fmt.channels} here")
    volumes = [None if file is None else read_volume(file, reading=reading) for file in files]
    first = next(volume for volume in volumes if volume is not None)
    same = [None if v is None else on_grid_of(first, v, path) for v, path in zip(volumes, paths, strict=True)]
    return VolumeImage(first_path, same, paths=paths)
