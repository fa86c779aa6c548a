"""Gradients of which no patient can change more than a given length: clipped per patient, not per slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..losses.partial_losses import loss_per_slice

SLICES_AT_ONCE = 16  # of which gradients are in memory at the same time
Batch = tuple[Tensor, Tensor]  # slices (K, channels, S, S) and candidates (K, C, S, S) of one patient


def clipped_sum(model: nn.Module, patients: Sequence[Batch], clip: float) -> list[Tensor]:
    """The sum over patients of the gradient of a patient's mean loss, each scaled down to at most the norm `clip`.

    A patient who is added or removed changes the sum by at most `clip`, whatever the images, since neither the network
    nor the loss lets slices of one patient see those of another. A gradient that is NaN or infinite counts as 0: an
    error instead would depend on that patient.

    Args:
        model: without batch norm and dropout, in training mode; it has no gradients afterwards.
        patients: slices and candidates of each; all have the same number K of slices.
        clip: largest norm, over all trained parameters together.

    Returns: one tensor for each trained parameter, in the order of `model.parameters()`; zeros without patients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    if not patients:
        return total
    slices = len(patients[0][0])
    at_once = max(1, SLICES_AT_ONCE // slices)
    with _gradients_per_slice(model) as network:
        for first in range(0, len(patients), at_once):
            some = patients[first : first + at_once]
            images, allowed = (torch.cat(parts) for parts in zip(*some, strict=True))
            loss_per_slice(network(images), allowed).sum().backward()
            gradients = [_per_patient(parameter, len(some)) for parameter in parameters]
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # (P,)
            scale = torch.where(norms.isfinite(), clip / norms.clamp(min=clip), 0.0)
            for summed, gradient in zip(total, gradients, strict=True):
                summed.add_(torch.einsum("p,p...->...", scale, gradient.nan_to_num(0.0, 0.0, 0.0)))
            network.zero_grad(set_to_none=True)
    return total


def _per_patient(parameter: nn.Parameter, patients: int) -> Tensor:
    """(P, ...), means over the slices of each patient of Opacus' gradients per slice; zeros for an unused parameter."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        return parameter.new_zeros(patients, *parameter.shape)
    return found.detach().reshape(patients, -1, *parameter.shape).mean(1)


@contextmanager
def _gradients_per_slice(model: nn.Module) -> Iterator[nn.Module]:
    """The model with Opacus' hooks, which write gradients per slice; the model itself is as before afterwards."""
    from opacus.grad_sample import GradSampleModule  # only now: slow to import

    in_place = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in in_place:  # the hooks need the value that an activation would overwrite
        module.inplace = False
    # By PyTorch's transforms: Opacus' faster rule for convolutions reads memory in one order only, so that in another
    # order (channels last, which PyTorch chooses by itself) gradients are wrong and mix patients.
    network = GradSampleModule(model, loss_reduction="sum", force_functorch=True)
    try:
        yield network
    finally:
        network.to_standard_module()
        model.zero_grad(set_to_none=True)
        for module in in_place:
            module.inplace = True
