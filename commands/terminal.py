"""What all commands share: the terminal, and how an error is told there."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
SOME_FAILED = 3  # exit code

Seed = Annotated[int, typer.Option(min=0, help="Repeats a run.")]


def fail(message: str, code: int) -> NoReturn:
    errors.print(f"fedfactory: {message}", markup=False)
    sys.exit(code)


def print_alarms(texts: list[str]) -> None:
    for text in texts:
        console.print(f"alarm: {text}; labels may not carry over there", style="bold red", markup=False)


def quiet_framework() -> None:
    """Fed-BioMed's log stays in its own files; on the terminal only errors."""
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR")
