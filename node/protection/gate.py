"""The one way by which the result of a round leaves a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...common.files import sha256_of_text
from .guarded_round import GuardedRound
from .numbers import leaving_numbers

MAX_MESSAGE = 300  # signs of a message about a failed round


class GateError(Exception):
    """Something that was not declared would leave. The text is for the site's ledger alone."""


@dataclass(kw_only=True)
class Passed:
    """What a round sends, for the ledger.

    Attributes:
        tensors: name, shape, type and bytes of each.
        size: bytes of all tensors, or of the encrypted numbers.
        numbers: name to value.
        withheld: names of numbers that stay.
    """

    tensors: list[tuple[str, tuple[int, ...], str, int]] = field(default_factory=list)
    size: int = 0
    numbers: dict[str, object] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)


def check_reply(reply: Any, round_: GuardedRound, *, samples: int) -> Passed:
    """Hold a successful reply against what the plan declared, and round and withhold its numbers in place.

    Args:
        reply: the framework's `TrainReply`.
        round_: in which it was made.
        samples: number of training slices that the site announced.

    Raises: GateError if a tensor was not declared or has another shape, if the sample size is not the announced
        one, or if the reply holds anything else.
    """
    passed = Passed()
    if reply.encrypted:
        _check_encrypted(reply, passed, round_)
    else:
        if reply.encryption_factor:
            raise GateError("an encryption factor without encryption")
        _check_tensors(reply.params, passed, round_)
    if reply.optim_aux_var:
        raise GateError("auxiliary variables of an optimizer, which no plan declares")
    if reply.sample_size is not None and not 0 <= reply.sample_size <= samples:
        raise GateError(f"sample_size is {reply.sample_size}, and the site announced {samples} slices")
    kept, withheld = leaving_numbers(reply.optimizer_args or {}, round_.policy)
    reply.optimizer_args = dict(kept)
    passed.numbers, passed.withheld = dict(kept), list(withheld)
    return passed


def _check_tensors(params: Any, passed: Passed, round_: GuardedRound) -> None:
    if params is None:
        params = {}
    if not isinstance(params, Mapping):
        raise GateError(f"weights of type {type(params).__name__}; they must be a table of tensors")
    if undeclared := sorted(set(params) - set(round_.tensors)):
        raise GateError(f"{len(undeclared)} tensors that the plan did not declare, such as {undeclared[0]!r}")
    for name, tensor in params.items():
        if not isinstance(tensor, torch.Tensor):
            raise GateError(f"{name} of type {type(tensor).__name__}; it must be a tensor")
        if tuple(tensor.shape) != tuple(round_.tensors[name]):
            raise GateError(f"{name} of shape {tuple(tensor.shape)}; declared is {tuple(round_.tensors[name])}")
        size = tensor.numel() * tensor.element_size()
        passed.tensors.append((name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), size))
        passed.size += size


def _check_encrypted(reply: Any, passed: Passed, round_: GuardedRound) -> None:
    if not isinstance(reply.params, Sequence) or isinstance(reply.params, (str, bytes)):
        raise GateError(f"encrypted weights of type {type(reply.params).__name__}; they must be a list of numbers")
    if not all(isinstance(number, int) for number in reply.params):
        raise GateError("encrypted weights that are no whole numbers")
    if not round_.tensors:
        raise GateError("encrypted weights that the plan did not declare")
    passed.tensors = [(name, tuple(shape), "encrypted", 0) for name, shape in round_.tensors.items()]
    passed.size = sum((number.bit_length() + 7) // 8 for number in reply.params)


def digest_of(settings: object) -> str:
    """SHA-256 over a text of what a researcher sent, so that equal settings are recognised in the ledger."""
    return sha256_of_text(repr(_ordered(settings)))


def _ordered(value: object) -> object:
    """The value with its tables sorted by name, at any depth; tensors by shape alone, since weights are no setting."""
    if isinstance(value, Mapping):
        return [(str(name), _ordered(value[name])) for name in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return [_ordered(part) for part in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value
