"""Keeps file names and patients' data out of the errors that Fed-BioMed sends from a node to the researcher."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fedbiomed.common.logger import logger

from ...errors import ConfigError, NodeDataError, TrainingError

P = ParamSpec("P")
R = TypeVar("R")
# Errors whose text holds counts, settings and names of losses only. All others may quote a path or a patient's name.
SAFE_ERRORS = (NodeDataError, TrainingError, ConfigError)


def redact_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an unsafe exception is replaced by one that names its type only; its text goes to the node's log."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except SAFE_ERRORS as error:
            if error.__cause__ is not None:
                logger.error(f"fedfactory: {error.__cause__}")
            raise
        except Exception as error:
            logger.error(f"fedfactory: {traceback.format_exc()}")
            kind = type(error).__name__
            raise NodeDataError(f"{kind} at this site; its text is in the node's log, use that") from None

    return wrapper
