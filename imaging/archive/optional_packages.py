"""The packages that read and write DICOM objects, which only `fedfactory[dicom]` installs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import FedFactoryError, UsageError, VolumeError
from .headers import MEMORY_FAULTS, read_header


def pydicom_package() -> Any:
    """The package `pydicom`, which then keeps its log to itself. Raises: UsageError if it is not installed."""
    package = _package("pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # what matters becomes an error of this package
    return package


def highdicom_package() -> Any:
    """The package `highdicom`. Raises: UsageError if it is not installed."""
    return _package("highdicom")


@contextmanager
def damage_reported(message: str) -> Iterator[None]:
    """Turn every error of the DICOM packages into one VolumeError, and keep their warnings back.

    Texts of these packages may quote a header, hence a patient: only the kind of the error is told.

    Args:
        message: what is wrong, in which file, and what to do; `{kind}` becomes the kind of the error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FedFactoryError:
        raise
    except Exception as error:  # the packages raise many types for damaged files, all with one meaning here
        raise VolumeError(message.replace("{kind}", type(error).__name__)) from None


def read_object(path: Path) -> Any:
    """A whole DICOM file as a `pydicom` data set.

    Raises: UsageError if pydicom is not installed; VolumeError for a file that would take much more memory
        than it has bytes; other types for damaged files, see `damage_reported`.
    """
    pydicom = pydicom_package()
    header = read_header(path)
    if header is not None and header.fault.startswith(MEMORY_FAULTS):  # others show when it is read
        raise VolumeError(f"{path}: {header.fault}; export or copy it again")
    return pydicom.dcmread(path)


def plain_text(value: object) -> str:
    """A name of a file as one line that can be printed."""
    return "".join(sign if sign.isprintable() else " " for sign in str(value)).strip()


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(
            f'{name} is not installed; DICOM segmentations and structure sets need it: pip install "fedfactory[dicom]"'
        ) from None
