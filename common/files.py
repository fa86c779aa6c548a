"""Writing results for their owner alone, and so that no half-written file stays behind.

Files are written under a temporary name first, then renamed. What this package writes shows patients or was made from
their images, so nobody but its owner may read it, unless `restrict_access` says that the group may.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError

OWNER_ALONE, OWNER_AND_GROUP = 0o077, 0o027  # what is taken from everybody else, as a umask
_taken = OWNER_ALONE


def restrict_access(*, share_group: bool = False) -> None:
    """Let everything that this process writes from now on be for its owner alone, or be readable by its group too.

    This also sets the process's umask, so that it holds for files that libraries write, and for child processes.
    """
    global _taken  # noqa: PLW0603
    _taken = OWNER_AND_GROUP if share_group else OWNER_ALONE
    os.umask(_taken)


def taken_from_others() -> int:
    """The permissions that this process takes from what it writes, see `restrict_access`."""
    return _taken


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, for its owner alone, see `restrict_access`; nothing if it is there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o777 & ~_taken, exist_ok=True)


def open_for_writing(path: Path) -> BinaryIO:
    """A new or emptied binary file for its owner alone, see `restrict_access`."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666 & ~_taken), "wb")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk, so that a power cut cannot undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: str | os.PathLike, suffix: str | None = None, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Args:
        path: final file; its folder is created if necessary.
        suffix: ending of the temporary name, for writers that choose a format by it (default: that of `path`).
        durable: whether to wait until the file and its name are on the disk.
    """
    path = Path(path)
    make_folder(path.parent)
    ending = "".join(path.suffixes[-2:]) if suffix is None else suffix
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=ending)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_taken)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new temporary folder that becomes `path` on success and disappears on any error.

    Raises: UsageError if `path` exists and is not an empty folder.
    """
    path = Path(path)
    refuse_existing(path)
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_taken)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_file(path: str | os.PathLike | None, advice: str) -> None:
    """Raises UsageError with the advice if there is no file at `path`. None passes: an option that was left out."""
    if path is not None and not Path(path).is_file():
        raise UsageError(f"{path}: no such file; {advice}")


def require_folder(path: str | os.PathLike | None, advice: str) -> None:
    """Raises UsageError with the advice if there is no folder at `path`. None passes."""
    if path is not None and not Path(path).is_dir():
        raise UsageError(f"{path}: no such folder; {advice}")


def require_file_or_folder(path: str | os.PathLike, advice: str) -> None:
    """Raises UsageError with the advice if there is nothing at `path`."""
    if not Path(path).exists():
        raise UsageError(f"{path}: no such file or folder; {advice}")


def require_weights(path: str | os.PathLike | None, *kinds: str) -> None:
    """Raises UsageError if there is no file at `path`; `kinds` are the kinds of files that would do. None passes."""
    require_file(path, f"give a {' or '.join(kinds)} written by fedfactory")


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises UsageError if `path` is a file or a folder with something in it."""
    path = Path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise UsageError(f"{path} exists and is not empty; choose another path or remove it")
    elif path.exists():
        raise UsageError(f"{path} exists and is not a folder; choose another path")


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal, in bounded memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal; characters that UTF-8 cannot have are written as escapes."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def encoding_of(content: bytes) -> str:
    """The encoding of a text: UTF-16 if its byte order mark says so, or else UTF-8, with or without such a mark."""
    return "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def read_lines(path: str | os.PathLike) -> list[str]:
    """Lines of a text file, without empty lines and comments (#).

    Raises: UsageError if the file is missing or not a text file.
    """
    try:
        content = Path(path).read_bytes()
        lines = content.decode(encoding_of(content)).splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error}); give a UTF-8 text file") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def write_json(path: str | os.PathLike, content: object, *, compact: bool = False, durable: bool = False) -> None:
    """Write `content` as JSON, atomically: readable, or compact, which takes a fraction of the time; `durable` waits
    until it is on the disk."""
    text = json.dumps(content, indent=None if compact else 2, ensure_ascii=False)
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
