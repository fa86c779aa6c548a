"""Whether the source of a training plan is what it looks like: an administrator approves what is shown."""

from __future__ import annotations

import re

from ..errors import UsageError

# Python reads a file by an encoding that a comment in its first lines names (PEP 263): other text may hide in it.
COOKIE = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.MULTILINE)
SHOWN = re.compile(r"[\n\x20-\x7e]*")  # line ends and printable ASCII


def refuse_disguised(name: str, source: str) -> None:
    """Refuse a source of which a person may see something else than Python runs.

    That is every sign but printable ASCII (control signs move the cursor, others turn the direction of a line or look
    like letters), and every comment that names an encoding.

    Raises: UsageError that names the plan and the line.
    """
    start = SHOWN.match(source)
    if start is not None and start.end() < len(source):
        sign = source[start.end()]
        line = source.count("\n", 0, start.end()) + 1
        raise UsageError(
            f"the training plan {name} has the sign {sign!a} in line {line}, which may not be shown as it runs; reject "
            "it (`fedbiomed node training-plan reject`), and ask the researcher for a plan in plain ASCII"
        )
    if (cookie := COOKIE.search(source)) is not None:
        line = source.count("\n", 0, cookie.start(1)) + 1
        raise UsageError(
            f"the training plan {name} names an encoding in line {line}, in which other text may hide; reject it "
            "(`fedbiomed node training-plan reject`)"
        )
