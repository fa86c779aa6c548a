"""Names of folders and files by which data sets tell pictures from masks."""

from __future__ import annotations

import re
from pathlib import Path
from unicodedata import normalize

# Names are compared in lower case, with blanks and hyphens as underscores.
IMAGE_FOLDERS = ("image", "images", "img", "imgs", "original", "originals", "original_images", "pictures", "photos")
MANUAL_FOLDERS = ("1st_manual",)  # beside it, the folder `mask` is the field of view (DRIVE)
LABEL_FOLDERS = (
    "label", "labels", "mask", "masks", "annotation", "annotations", "ground_truth", "ground_truths", "groundtruth",
    "groundtruths", "gt", "segmentation", "segmentations",
)  # fmt: skip
# Of the challenges of the International Skin Imaging Collaboration, such as ISIC2018_Task1-2_Training_Input.
IMAGE_FOLDER = re.compile(r"is(ic|bi)[_0-9].*_(input|data)")
LABEL_FOLDER = re.compile(r"is(ic|bi)[_0-9].*_groundtruth")
LIKE_MASKS = re.compile(r"mask|label|annot|truth|segment|manual|(^|_)(gt|seg)(_|$)")  # in other names of folders
OTHER_MASKS = {
    "mask": "the field of view",
    "masks": "the field of view",
    "2nd_manual": "a second observer's masks",
}  # beside `1st_manual`

MASK_SUFFIX = re.compile(
    r"(?<=.)[ _-](mask|masks|segmentation|seg|gt|groundtruth|ground_truth|label|labels|lesion|annotation|manual1|1stho)"
    r"([ _-]?\d+)?$",
    re.IGNORECASE,
)
OTHER_SUFFIX = re.compile(r"[ _-](superpixels|manual2|2ndho)$", re.IGNORECASE)  # of files that are passed over
PICTURE_SUFFIX = re.compile(r"[ _-](training|test|image|img|orig|original)$", re.IGNORECASE)  # absent in masks' names


def plain(name: str) -> str:
    """The name of a folder as the lists above have it."""
    return re.sub(r"[ -]+", "_", name.strip().lower())


def is_image_folder(path: Path) -> bool:
    """Whether a folder has a usual name of folders of pictures."""
    name = plain(path.name)
    return name in IMAGE_FOLDERS or IMAGE_FOLDER.fullmatch(name) is not None


def is_label_folder(path: Path) -> bool:
    """Whether a folder has a usual name of folders of masks."""
    name = plain(path.name)
    return name in LABEL_FOLDERS or LABEL_FOLDER.fullmatch(name) is not None


def stem(path: Path) -> str:
    """Name of a file without its ending, composed as `case_name` is."""
    return normalize("NFC", path.name[: -len(path.suffix)] if path.suffix else path.name)


def without_mask_suffix(name: str, label_key: str | None = None) -> str:
    """The stem of a mask without the part that says that it is one; unchanged if it has none.

    Args:
        name: stem of the file.
        label_key: another such part.
    """
    if label_key and (found := re.search(rf"[ _-]{re.escape(label_key)}([ _-]?\d+)?$", name, re.IGNORECASE)):
        return name[: found.start()]
    return MASK_SUFFIX.sub("", name)


def without_picture_suffix(name: str) -> str:
    """The stem of a picture without the part that masks do not have."""
    return PICTURE_SUFFIX.sub("", name)
