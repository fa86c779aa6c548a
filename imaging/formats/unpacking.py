"""How far a packed file may unpack: what its header claims, and no more than its own size makes likely.

Deflate packs zeros a thousand times, so a file of a few megabytes can claim gigabytes and hold them. Images of scanners
and cameras pack less than ten times; label maps and masks, of whatever size people make them, up to a thousand times.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO, Protocol

from isal import isal_zlib

from ...errors import VolumeError

MAX_RATIO = 100  # bytes of an unpacked image for each byte of its file, where it is large
IMAGE_BYTES = 1 << 29  # of voxels, as they are worked on, that any file may become: 512 x 512 x 512 of an image
LABEL_BYTES = 1 << 30  # 512 x 512 x 2048 of a label map
PICTURE_BYTES = 384 << 20  # 100 million pixels of three colours and opacity
BLOCK = 1 << 20  # bytes that are unpacked at once
DAMAGED = (zlib.error, isal_zlib.error)  # what unpacking raises, beside errors of the system and EOFError


class Readable(Protocol):
    """What can be read into memory that is there already."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def refuse_bomb(path: object, *, packed: int, unpacked: int, most: int) -> None:
    """Refuse a file that would become much larger in memory than it is.

    Args:
        path: of the file, for the message.
        packed: bytes of the file.
        unpacked: bytes that it becomes, by its header.
        most: bytes that any file may become.

    Raises: VolumeError if it would become more than `most` bytes, and than `MAX_RATIO` times its size.
    """
    if unpacked > max(most, MAX_RATIO * packed):
        raise VolumeError(
            f"{path}: its header claims {unpacked >> 20} MiB in a file of {packed} bytes, more than {MAX_RATIO} times "
            f"as much; such a file is read up to {most >> 20} MiB, so store it unpacked if it is what it should be"
        )


def read_into(file: Readable, buffer: memoryview) -> int:
    """Fill a buffer from a file, without other memory. Returns: bytes read, fewer than its size where the file ends."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done : done + BLOCK])
        if not count:
            break
        done += count
    return done


def unpack_into(file: BinaryIO, unpacker: zlib._Decompress, buffer: memoryview) -> int:
    """Fill a buffer from a deflated file.

    Returns: bytes unpacked: fewer than the buffer's size where the file ends, and one more where it goes on.
    Raises: zlib.error for a damaged file.
    """
    done, packed = 0, b""
    while not unpacker.eof:
        packed = unpacker.unconsumed_tail or file.read(BLOCK)
        if not packed:
            break
        part = unpacker.decompress(packed, min(BLOCK, len(buffer) - done + 1))
        fitting = part[: len(buffer) - done]
        buffer[done : done + len(fitting)] = fitting
        done += len(part)
        if done > len(buffer):
            break
    return done


def unpacks_beyond(file: BinaryIO, limit: int) -> bool:
    """Whether the rest of a file, deflated without a header, unpacks to more bytes than a limit; nothing is kept.

    Raises: zlib.error for a damaged file.
    """
    unpacker, done = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not unpacker.eof and (packed := unpacker.unconsumed_tail or file.read(BLOCK)):
        done += len(unpacker.decompress(packed, BLOCK))
        if done > limit:
            return True
    return False
