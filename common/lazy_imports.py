"""Names of a package that are imported at their first use, so that a command can answer before PyTorch is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for the `__init__` of a package (PEP 562).

    The `__init__` lists the same names in `__all__`, and imports them under `TYPE_CHECKING` for readers and type
    checkers.

    Args:
        package: name of the package, its `__name__`.
        modules: by public name, the module of the package that defines it, such as `networks.generator`.

    Returns: a function that imports a name, or raises AttributeError for names that the package does not have.
    """

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'; choose one of {', '.join(modules)}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
