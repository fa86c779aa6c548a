"""Names of patients from DICOM headers that nobody can search for without the key of their store."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from ...errors import UsageError
from ..patients import patient_of

KEY_FILE = "patients.key"  # in the folder of a store; it is part of nothing that travels
LENGTH = 32  # bytes
UNSALTED = re.compile(r"[0-9a-f]{16}")  # how earlier stores name such patients: by the digest itself
PSEUDONYM = re.compile(r"p-[0-9a-f]{16}")


def pseudonym(key: bytes, digest: str) -> str:
    """The name of a patient in a store, HMAC-SHA256 under the store's key.

    Identifiers of hospitals have few digits: all of them can be tried against a digest without a key in seconds.

    Args:
        key: of the store, see `read_key`.
        digest: of the patient's identifier, see `series.patient_digest`.

    Returns: p- and 16 hexadecimal digits, which no table of patients or name of a file gives by chance.
    """
    return f"p-{hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()[:16]}"


def read_key(folder: Path) -> bytes | None:
    """The key in a folder, 32 bytes; None if there is none. Raises: UsageError if it cannot be read, or is none."""
    path = folder / KEY_FILE
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); let the owner of the store prepare it") from None
    except ValueError:
        key = b""
    if len(key) != LENGTH:
        raise UsageError(f"{path}: is no key of {LENGTH} bytes; put back the one that was made with the store")
    return key


def make_key(folder: Path) -> bytes:
    """Write a new key into a folder, for the owner alone whoever may read the rest. Returns: the key, 32 bytes."""
    key = secrets.token_bytes(LENGTH)
    unfinished = folder / f"{KEY_FILE}.part"
    unfinished.unlink(missing_ok=True)  # of a killed run
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / KEY_FILE)
    return key


class Pseudonyms:
    """The names that a store gives to patients of DICOM headers.

    Args:
        out: folder of the store, where its key is if it has one.
        work: working folder, where a key is made if one is needed first; `commit` brings it into the store.
        known: patients of the store as it is.

    Raises: UsageError if the key cannot be read.
    """

    def __init__(self, out: Path, work: Path, known: Collection[str] = ()) -> None:
        self._out, self._work = out, work
        self._lost = any(PSEUDONYM.fullmatch(patient) for patient in known)  # unless the key is found
        self._key = read_key(out) or read_key(work)

    def of(self, digest: str) -> str:
        """The name of the patient with this digest, see `pseudonym`.

        Raises: UsageError if the store has such names but not its key: patients would get second names, and could be
            trained on while they are held out.
        """
        if self._key is None and self._lost:
            raise UsageError(
                f"{self._out}: its {KEY_FILE} is missing, without which its patients are not known again; put it back, "
                "or prepare into a new folder"
            )
        if self._key is None:
            self._key = make_key(self._work)
        return pseudonym(self._key, digest)

    def instead_of_digests(
        self, patients: Mapping[str, str], *, own: Collection[str], pattern: str | None
    ) -> dict[str, str]:
        """Names for the patients whom an earlier version named by a digest without a key.

        Args:
            patients: of a store, by case.
            own: patients of the site's table, which keep their names, as those do whom the name of a case tells.
            pattern: see `patient_of`.

        Returns: name by digest; it is the one that the same patient gets from a header.
        """
        digests = {
            patient
            for case, patient in patients.items()
            if UNSALTED.fullmatch(patient) and patient not in own and patient != patient_of(case, pattern)
        }
        return {digest: self.of(digest) for digest in sorted(digests)}

    def commit(self) -> None:
        """Bring a new key into the store, before anything that depends on it."""
        if (self._work / KEY_FILE).exists():
            os.replace(self._work / KEY_FILE, self._out / KEY_FILE)
