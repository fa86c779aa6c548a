"""`fedfactory ...`: puts the commands together and ends an error with one line and an exit code."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from typer.core import TyperGroup

from .commands import data, demo, federated_segmentation, labelled_factory, localiser, researcher, segmenter, site
from .commands.terminal import errors, fail
from .common.fault_log import unforeseen
from .common.files import restrict_access
from .errors import FedFactoryError

MOVED = "`train --method` is now `fedfactory train-segmenter --method`; `train` is for the factory alone"


class AllCommands(TyperGroup):
    """All commands; `train --method` is passed on to `train-segmenter`, as which it existed before."""

    def resolve_command(self, ctx: typer.Context, args: list[str]):  # type: ignore[no-untyped-def]  # typer's own types
        if args[:1] == ["train"] and any(word == "--method" or word.startswith("--method=") for word in args):
            errors.print(f"fedfactory: {MOVED}", markup=False)
            args = ["train-segmenter", *args[1:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=AllCommands,
    help="Train a data factory across hospitals, draw labelled synthetic volumes, adapt a segmenter to each site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def every_command(
    share_group: Annotated[
        bool, typer.Option("--share-group", help="let the group read what is written; otherwise its owner alone can")
    ] = False,
) -> None:
    """What holds for every command."""
    restrict_access(share_group=share_group)


for part in (demo, data, researcher, federated_segmentation, localiser, labelled_factory, segmenter):
    app.add_typer(part.commands)
app.add_typer(site.commands, name="site")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; every error becomes one line and an exit code, and an unforeseen one a traceback in a log."""
    command = typer.main.get_command(app)
    if not sys.warnoptions:  # libraries warn in the words of their code, without the file; who wants that says -W
        warnings.simplefilter("ignore")
    try:
        command.main(args=arguments, prog_name="fedfactory")
    except FedFactoryError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1)
    except MemoryError:
        fail("memory: there is not enough of it; use fewer workers, or a smaller batch or image", 1)
    except Exception as error:  # an error that nobody foresaw
        fail(unforeseen(error, "this command"), 1)
