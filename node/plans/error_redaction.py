"""What a node may say about an error. Fed-BioMed sends the text of an exception to the researcher."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fedbiomed.common.logger import logger

from ...errors import ConfigError, NodeDataError, TrainingError

P = ParamSpec("P")
R = TypeVar("R")
HARMLESS = (NodeDataError, TrainingError, ConfigError)  # ours, of counts, settings and terms alone


def guarded(call: Callable[P, R]) -> Callable[P, R]:
    """Replace any exception but our own by one that names only its kind; its text stays in the node's log."""

    @functools.wraps(call)
    def inner(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return call(*arguments, **options)
        except HARMLESS:
            raise
        except Exception as error:
            logger.error(f"fedfactory: {traceback.format_exc()}")
            raise NodeDataError(f"{type(error).__name__} at this site; its text is in the node's log") from None

    return inner
