"""A secret of the site that no researcher knows, and seeds that depend on it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from ...common.files import atomic_file

SECRET_FILE = Path("etc") / "site_secret"  # below the node's folder
LENGTH = 32  # bytes
MAX_SEED = 2**31


def site_secret(root: str | Path) -> bytes:
    """The secret of the node at `root`, 32 bytes; made with the first call and readable by its owner alone."""
    path = Path(root) / SECRET_FILE
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        secret = b""
    if len(secret) != LENGTH:
        secret = secrets.token_bytes(LENGTH)
        write_secret(root, secret)
    return secret


def write_secret(root: str | Path, secret: bytes) -> None:
    """Give a node a known secret of 32 bytes, for simulations that are to be repeated; never for real patients."""
    with atomic_file(Path(root) / SECRET_FILE) as temporary:
        temporary.write_text(secret.hex() + "\n", encoding="ascii")


def mixed_seed(secret: bytes, *parts: object) -> int:
    """A seed in [0, 2**31) that only those who know the secret can derive from the parts (HMAC-SHA256)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hmac.new(secret, text.encode(), hashlib.sha256).digest()[:8], "big") % MAX_SEED
