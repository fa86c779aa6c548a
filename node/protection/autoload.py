"""How the guard gets into every Fed-BioMed node of an environment in which fedfactory is installed.

The framework has no hook that runs before it imports what a researcher sent. PyTorch has one: `import torch` calls the
entry points of the group "torch.backends", and a node imports PyTorch before it imports its own main module. This file
is such an entry point. It must import nothing but the standard library, since every `import torch` runs it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NODE_MODULE = "fedbiomed.node.node"  # the last module of a node that is imported: all that is guarded is there by then


class _GuardingLoader(Loader):
    """Executes the node's module as `wrapped` would, then installs the guard."""

    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        from .guard import install  # only now: it imports the framework

        install()


class _NodeFinder(MetaPathFinder):
    """Finds the node's main module, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != NODE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _GuardingLoader(spec.loader)
        return spec


def guard_nodes() -> None:
    """Guard the Fed-BioMed node that this process may become. PyTorch calls this when it is imported."""
    if NODE_MODULE not in sys.modules and not any(isinstance(finder, _NodeFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NodeFinder())
