"""What a file that belongs to no case is, as far as its name tells."""

from __future__ import annotations

import os
from pathlib import Path

from ..archive.headers import is_dicom
from ..pictures.decoding import MASK_ENDINGS
from ..volume_files import SUFFIXES

SYSTEM_FILES = {"thumbs.db", "desktop.ini", "autorun.inf", "ehthumbs.db", "icon\r"}
ABOUT_DATA = {"dataset.json", "dataset_description.json", "dataset_fingerprint.json", "dicomdir"}
TEXTS = (
    ".txt", ".md", ".rst", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".htm", ".html", ".css", ".url", ".bib", ".log",
    ".ppt", ".pptx",
)  # fmt: skip
SIDECARS = (".json", ".yaml", ".yml", ".xml", ".cfg", ".ini", ".bval", ".bvec", ".toml", ".sha256", ".md5")
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods")
PROGRAMS = (
    ".exe", ".dll", ".so", ".bat", ".sh", ".ps1", ".py", ".pyc", ".ipynb", ".r", ".m", ".js", ".jar", ".class", ".ico",
    ".inf", ".lnk", ".app", ".msi",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz")
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".opdownload", ".!ut")
MUST_CHANGE = {ARCHIVES: "an archive, which must be unpacked", UNFINISHED: "a download that has not ended"}
UNREAD_IMAGE = "an image of a kind that is not read"
OTHER_IMAGES = (
    ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".mnc", ".mgz", ".mgh", ".par", ".rec", ".head", ".brik", ".vtk",
    ".npy", ".npz", ".mat", ".h5", ".hdf5", ".svs", ".czi",
)  # fmt: skip
NAMES_OF_TEXTS = {"readme", "license", "licence", "copying", "changes", "changelog", "citation", "authors", "notice"}


def passed_over(name: str) -> str | None:
    """Why a file of this name is left alone, as a short phrase; None if the name does not tell that it should be."""
    low = name.lower()
    base, ending = os.path.splitext(low)
    if low in SYSTEM_FILES or low.endswith("~"):
        return "a file of the operating system or an editor"
    if low in ABOUT_DATA:
        return "a description of the data set"
    if ending in TEXTS or (base.split(".")[0] in NAMES_OF_TEXTS and not low.endswith(SUFFIXES)):
        return "a text"
    if ending in SIDECARS:
        return "facts beside the images, which are not needed"
    if ending in TABLES:
        return "a table, which is no label of a case"
    if ending in PROGRAMS:
        return "a program"
    return None


def what_it_is(path: str) -> str:
    """A file that belongs to no case as a noun with its article, such as "a volume"."""
    low = os.path.basename(path).lower()
    if low.endswith(SUFFIXES):
        return "a volume"
    if low.endswith(MASK_ENDINGS):
        return "a picture"
    if low.endswith(OTHER_IMAGES):
        return UNREAD_IMAGE
    for endings, what in MUST_CHANGE.items():
        if low.endswith(endings):
            return what
    if low.endswith((".dcm", ".ima")) or is_dicom(Path(path)):
        return "a DICOM file"
    return "a file of a kind that is not read"
