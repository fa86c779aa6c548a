"""`fedfactory ...`: its commands, and errors as one line and an exit code."""

from __future__ import annotations

import typer

from .commands import data, demo, researcher, segmenter, site
from .commands.terminal import fail
from .errors import FedFactoryError

app = typer.Typer(
    help="Train a data factory across hospitals, draw labelled synthetic volumes, adapt a segmenter to each site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (demo, data, researcher, segmenter):
    app.add_typer(part.commands)
app.add_typer(site.commands, name="site")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; every error the user can act on becomes one line and an exit code."""
    command = typer.main.get_command(app)
    try:
        command.main(args=arguments, prog_name="fedfactory")
    except FedFactoryError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1)
