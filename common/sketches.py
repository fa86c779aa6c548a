"""Networks without memory: what a card describes, compared with the weights in its file before anything is allocated.

A card of a few bytes can claim a network of terabytes. On PyTorch's meta device a network has names and shapes, and no
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import ConfigError

BESIDE = 200  # tensors that are made on the way and belong to no file
Made = TypeVar("Made")


def sketch(make: Callable[[], Made], *, tensors: int) -> Made:
    """What `make` returns, with networks that have names and shapes, but no values and no memory.

    Args:
        make: builds networks.
        tensors: number of tensors in the file; a card that counts layers without an end is stopped soon after.

    Raises: ConfigError for many more tensors; what `make` raises.
    """
    with torch.device("meta"), _counted(2 * tensors + BESIDE):
        return make()


def parameters_of(network: nn.Module) -> int:
    """Number of values in the parameters and buffers of a network or of its sketch."""
    return sum(values.numel() for values in network.state_dict().values())


@contextmanager
def _counted(most: int) -> Iterator[None]:
    """Stop the building of networks with more than `most` parameters and buffers."""
    count = 0

    def one_more(module: nn.Module, name: str, values: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ConfigError(f"the settings describe more than {most} tensors; use a file as it was written")

    hooks = [
        register_module_parameter_registration_hook(one_more),
        register_module_buffer_registration_hook(one_more),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
