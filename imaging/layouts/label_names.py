"""Names of files by which label maps are told from images."""

from __future__ import annotations

import re

SEPARATORS = " _.-"
_WORDS = (
    "segmentations?|segm|segs?|dseg|aseg|gt|ground[ _-]?truths?|truth|label[ _-]?maps?|labels?|lbls?|masks?|msk|manual|"
    "annotations?|annot|brainmask|delineations?"
)
_LAST_WORDS = "lesions?"  # only at the very end: lesion_001 may be a case
# What may follow the word: numbers, versions, readers, and who made it.
_TAIL = r"(?:[ _.-]?(?:v|r|reader|rater|observer)?\d{1,4}|[ _.-](?:final|new|edited|corrected|auto|manual|expert))"
ENDING = re.compile(rf"(?:^|[ _.-])(?:(?:{_WORDS}){_TAIL}*|{_LAST_WORDS})$", re.IGNORECASE)
BEGINNING = re.compile(rf"^(?:{_WORDS})[ _.-]?(?=\d+$)", re.IGNORECASE)  # segmentation-0
PREFIX = re.compile(rf"^(?:{_WORDS})[ _.-]", re.IGNORECASE)  # tells a label map only where the rest is an image's name
_IMAGE_WORDS = "images?|img|imaging|volumes?|vol|scan|raw|orig|original"
IMAGE_ENDING = re.compile(rf"(?:^|[ _.-])(?:{_IMAGE_WORDS})$", re.IGNORECASE)
IMAGE_BEGINNING = re.compile(rf"^(?:{_IMAGE_WORDS})(?=[ _.-]?\d)[ _.-]?", re.IGNORECASE)


def is_label_name(name: str, label_key: str | None = None) -> bool:
    """Whether a name, without the file's ending, is one that people give to label maps.

    Args:
        name: such as `case1_seg`, `case1.seg`, `segmentation-0` or `mask`.
        label_key: another word that ends the names of label maps.
    """
    return bool(ENDING.search(name) or BEGINNING.match(name)) or _ends_in(name, label_key)


def without_label_words(name: str, label_key: str | None = None) -> str:
    """What is left of the name of a label map: that of its image, or "" for a name such as `mask`."""
    if label_key and _ends_in(name, label_key):
        return name[: -len(label_key)].rstrip(SEPARATORS)
    if BEGINNING.match(name) or not ENDING.search(name):
        return BEGINNING.sub("", name)
    return ENDING.sub("", name)


def without_image_words(name: str) -> str:
    """The name of an image without the part that says so, which label maps lack: `1001` of `1001_image`."""
    return IMAGE_ENDING.sub("", name) if IMAGE_ENDING.search(name) else IMAGE_BEGINNING.sub("", name)


def without_label_prefix(name: str) -> str:
    """A name without a word for label maps in front of it, such as `case1` of `seg_case1`."""
    return PREFIX.sub("", name)


def before_ending(name: str, ending: str) -> str | None:
    """What stands before an ending and its separator; "" if there is nothing else, None for another ending."""
    if not _ends_in(name, ending):
        return None
    return name[: len(name) - len(ending)].rstrip(SEPARATORS)


def _ends_in(name: str, ending: str | None) -> bool:
    """Whether a name ends in a word, which is the whole name or follows a separator; case does not count."""
    if not ending or not name.casefold().endswith(ending.casefold()):
        return False
    before = name[: len(name) - len(ending)]
    return not before or before[-1] in SEPARATORS
