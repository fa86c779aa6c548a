"""Names that people give or sites announce: of domains, modalities, nodes, tags and classes, checked in one place.

Names come from other sites and become parts of paths, cells of tables and lines of a terminal. They are checked where
they are entered and again where they arrive.
"""

from __future__ import annotations

import re
from reprlib import repr as shortened

from ..errors import ConfigError

MAX_LENGTH = 64  # characters, as in DICOM
NOT_IN_FILES = frozenset('/\\<>:"|?*')  # signs that separate folders, or that Windows refuses
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # names of devices on Windows


def check_label(what: str, name: object) -> str:
    """A name that is shown: letters of any language, spaces and other signs, but none that commands a terminal.

    Args:
        what: is named, for the message.
        name: of unknown origin.

    Returns: the name.
    Raises: ConfigError unless it is a text of 1 to 64 printable characters, without spaces around it, that does not
        begin with a dot or a dash.
    """
    if not isinstance(name, str) or not _is_label(name):
        raise ConfigError(
            f"{what} is {_shown(name)}; it must have 1 to {MAX_LENGTH} printable characters, no space at its ends, and "
            "no dot or dash in front"
        )
    return name


def check_name(what: str, name: object) -> str:
    """A name that may also be part of a file's name on any system.

    Returns: the name.
    Raises: ConfigError if it is no label, see `check_label`, separates folders, ends with a dot, or is a device's.
    """
    if not isinstance(name, str) or not _is_label(name) or not _is_part_of_path(name):
        raise ConfigError(
            f"{what} is {_shown(name)}; it must be a name that a file can have: 1 to {MAX_LENGTH} printable signs, "
            f"none of {' '.join(sorted(NOT_IN_FILES))}, no dot or dash in front"
        )
    return name


def as_file_name(text: str) -> str:
    """A text that names something at this site, such as a case, as part of a file's name.

    What a file's name cannot have becomes _, and so does what would hide the file or look like an option.
    """
    plain = "".join(sign if sign.isprintable() and sign not in NOT_IN_FILES else "_" for sign in text)
    plain = re.sub(r"^[.\-]|[. ]$", "_", plain) or "_"
    return f"_{plain}" if RESERVED.fullmatch(plain) else plain


def _is_label(name: str) -> bool:
    return 0 < len(name) <= MAX_LENGTH and name.isprintable() and name == name.strip() and name[0] not in ".-"


def _is_part_of_path(name: str) -> bool:
    return not NOT_IN_FILES & set(name) and name[-1] != "." and not RESERVED.fullmatch(name)


def _shown(name: object) -> str:
    """A value of unknown size and type for a message."""
    if not isinstance(name, str):
        return shortened(name)
    return f"'{name[:80]}'" if name.strip() else f"'{name[:80]}', which is empty"
