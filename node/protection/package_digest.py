"""The digest of the installed package: the code that an approved plan calls."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ... import __file__ as package_file
from ...common.files import sha256_of

PACKAGE = Path(package_file).parent
ROOMS = ("common", "imaging", "generative", "adaptation", "node", "researcher", "demo", "commands")


def package_fingerprint(root: Path = PACKAGE) -> dict[str, str]:
    """Path to SHA-256 of every module of the package, at any depth: the code that an approved plan will call.

    Args:
        root: folder of the package; default: the installed one.
    """
    modules = [*root.glob("*.py"), *(path for room in ROOMS for path in (root / room).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in sorted(modules)}


def digest_of_all(files: dict[str, str]) -> str:
    """One SHA-256 for a whole fingerprint: equal packages have equal digests.

    Args:
        files: path to SHA-256, see `package_fingerprint`.
    """
    return hashlib.sha256("".join(f"{name} {digest} " for name, digest in files.items()).encode()).hexdigest()
