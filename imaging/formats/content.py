"""What a file is that has the name of another kind, by its first bytes: what people find in the place of an image."""

from __future__ import annotations

LEAST = 540  # bytes from which every kind is told
# How a file begins, what it is, and what to do.
STARTS = (
    (b"version https://git-lfs", "a pointer of Git LFS to the file", "fetch the file with `git lfs pull`"),
    (b"\x1f\x8b", "packed twice by gzip", "unpack it once"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"BZh", "packed by bzip2", "unpack it"),
    (b"\xfd7zXZ\x00", "packed by xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x89PNG", "a PNG picture", "give it the ending .png"),
    (b"\xff\xd8\xff", "a JPEG picture", "give it the ending .jpg"),
    (b"\x89HDF", "an HDF5 or MINC file", "write it as NIfTI"),
    (b"CDF\x01", "a MINC file", "write it as NIfTI"),
    (b"%PDF", "a PDF document", "give the image"),
    (b"NRRD000", "an NRRD file", "give it the ending .nrrd"),
    (b"ObjectType", "a MetaImage file", "give it the ending .mha"),
)
PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")
PLACES = (
    (128, b"DICM", "a DICOM file", "give the folder of its series"),
    (344, b"ni1\x00", "the header of a pair of files (.hdr and .img)", "write it as one NIfTI file"),
    (344, b"n+1\x00", "a NIfTI file", "give it the ending .nii"),
    (257, b"ustar", "a TAR archive", "unpack it"),
)


def what_instead(start: bytes) -> str:
    """What a file is, with what to do, such as "is a ZIP archive; unpack it"; "" if its first bytes do not tell.

    Args:
        start: the first `LEAST` bytes of the file, or all, unpacked where the reader unpacks.
    """
    if not start.strip(b"\0"):
        return "holds zeros, as a copy that was interrupted leaves them; copy it again" if start else "is empty"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:20].lower().startswith(PAGES):
        return "is a web page, as servers send it in the place of a file; download the file again"
    for sign, what, remedy in STARTS:
        if start.startswith(sign):
            return f"is {what}; {remedy}"
    for place, sign, what, remedy in PLACES:
        if start[place : place + len(sign)] == sign:
            return f"is {what}; {remedy}"
    return ""
