"""What all commands share: the terminal, and errors in the words that were typed."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperCommand

from ..errors import UsageError, plain_lines

if TYPE_CHECKING:
    from ..imaging.accounting.account import Accounting
    from ..node.connection.check import Check


class PlainConsole(Console):
    """A terminal that shows texts as they are, whoever wrote them: names, cells of tables, sources of plans.

    There is no markup and no emoji code in them, and signs that could command the terminal or turn the direction of a
    line appear as escapes.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a cell, a title or a line; its width is that of what is shown."""
        return super().render_str(plain_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is written, in parts of one style."""
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else plain_lines(segment.text)
            yield segment if shown == segment.text else Segment(shown, segment.style)


console, errors = PlainConsole(), PlainConsole(stderr=True)
SOME_FAILED = 3  # exit code
STATE_STYLES = {"problem": "bold red", "warning": "yellow", "ok": "green"}  # of a check
VERBS = (
    "is|are|has|have|and|must|needs?"  # an argument's name at the beginning of a message is followed by one of these
)


class Commands(typer.Typer):
    """The commands of one file; their errors name flags, see `with_flags`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return super().command(name, cls=FlagNamingCommand, **options)


class FlagNamingCommand(TyperCommand):
    """A command that reports a wrong argument under the flag that declares it."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        with self._errors_name_flags():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:
        with self._errors_name_flags():
            return super().invoke(ctx)

    @contextmanager
    def _errors_name_flags(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            flags = {param.name: param.opts[0] for param in self.params if param.opts[0].startswith("-")}
            error.args = (with_flags(str(error), flags),)
            raise


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message of a library error with flags in the place of argument names.

    Replaced are a name at the beginning ("size is 3; ..."), names in backticks, and names with an underscore, which no
    English sentence contains. Parts of a path stay as they are.

    Args:
        message: begins with the argument's name, if it is about an argument.
        flags: by argument name, the flag that declares it, such as `--label-kind` for `label_kind`.
    """
    names = "|".join(map(re.escape, flags)) or "(?!)"
    message = re.sub(rf"^({names})(?=,? (?:{VERBS})\b)", lambda found: flags[found[1]], message)
    message = re.sub(rf"`({names})`", lambda found: flags[found[1]], message)
    return re.sub(
        r"(?<![\w./\\-])[a-z0-9]+(?:_[a-z0-9]+)+(?![\w/\\-]|\.\w)",
        lambda found: flags.get(found[0], found[0]),
        message,
    )


def fail(message: str, code: int) -> NoReturn:
    """Print the message as one line on stderr and end the program with this exit code."""
    errors.print(f"fedfactory: {' '.join(message.splitlines())}", markup=False)
    sys.exit(code)


def key_and_value(argument: str, text: str, form: str) -> tuple[str, str]:
    """Both sides of the first `=` in `text`.

    Args:
        argument: name of the command's argument, for the error.
        text: what was typed.
        form: what was wanted, such as "NAME=VALUE".

    Raises: UsageError if there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{argument} is '{text}'; write {form}")
    return key, value


def require_one_of(**given: object) -> None:
    """Raises: UsageError unless exactly one of these arguments has a value other than None and ""."""
    names = [f"`{name}`" for name in given]
    present = [name for name, value in zip(names, given.values(), strict=True) if value not in (None, "")]
    if len(present) != 1:
        found = f"{' and '.join(present)} are given" if present else f"{' and '.join(names)} are missing"
        raise UsageError(f"{found}; give either {' or '.join(names)}")


def print_alarms(texts: list[str]) -> None:
    """Print the alarms of a factory's domains, one per line."""
    for text in texts:
        console.print(f"alarm: {text}; labels may not carry over there", style="bold red", markup=False)


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of checks, with what to do below each that found something. Exits with 1 if there is a problem."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        # Lines are not broken: a remedy is copied from here.
        console.print(
            Text.assemble((f"{check.state:<9}", STATE_STYLES[check.state]), f"{check.name:<{width}}  {check.found}")
        )
        if check.remedy:
            console.print(Text.assemble(" " * (9 + width), "  ", (f"-> {check.remedy}", "bold")))
    counts = Counter(check.state for check in checks)
    console.print(f"problems: {counts['problem']}, warnings: {counts['warning']}, ok: {counts['ok']}", markup=False)
    if counts["problem"]:
        raise typer.Exit(1)


def quiet_framework() -> None:
    """Let Fed-BioMed print errors alone on the terminal; its log files stay complete."""
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR")


def print_unused(accounting: Accounting, *, name: str = "", on: Console | None = None) -> None:
    """`print_accounting`, if not all entries of the folder were used."""
    if accounting.count("used") < accounting.entries:
        print_accounting(accounting, name=name, on=on)


def print_accounting(
    accounting: Accounting, *, name: str = "", apart_from: Iterable[str] = (), on: Console | None = None
) -> None:
    """Print what became of the entries of a folder: the numbers, and a line for each kind that was not used.

    Args:
        name: of the folder, before each line.
        apart_from: reasons that are printed elsewhere.
        on: where; None is standard output.
    """
    for line in (accounting.summary(), *accounting.lines(apart_from=apart_from)):
        (on or console).print(name + line, markup=False)
