"""Memory of a round of a federated segmentation method, estimated from above before anything is built.

The feature maps of the networks are counted, not estimated: a forward pass on PyTorch's meta device, which allocates
nothing, shows what autograd would keep. So each setting of a network counts as it is. What the losses, the optimizers
and the allocator take beside them was measured (`benchmarks/request_memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...adaptation.losses.cmc_losses import channel_consistency
from ...adaptation.methods.cmc import ALL, CMC
from ...adaptation.methods.federated_averaging import FederatedProximal
from ...adaptation.methods.fedicra import FedICRA, crf_window
from ...adaptation.methods.fedmix import FedMix
from ...adaptation.methods.gaze_supervision import GazeSupervision, propagate
from ...adaptation.methods.interface.federated_method import FederatedMethod
from ...adaptation.methods.public_exchange import GRADING_BATCH, exchanged_count
from ...adaptation.methods.public_slice_method import PublicSliceMethod
from ...adaptation.privacy.patient_gradients import SLICES_AT_ONCE as PRIVATE_SLICES
from ...adaptation.segmenter import SLICES_AT_ONCE

BYTES = 4  # of a float32
COUNTED = 2  # slices of the pass that is counted: batch norm refuses a single one
# Resident memory beside that of the tensors: products of convolutions and what the allocator cannot give back. 1.15 to
# 1.7 were measured.
OVERHEAD = 1.7
# Of all float32 copies of the weights: model, received and sent ones, gradient, two moments, and what the optimizer
# needs in passing; the proximal term, adaptive aggregation and states that a site keeps come in addition.
WEIGHT_COPIES, PROXIMAL_COPIES, ADAPTIVE_COPIES, STATE_COPIES = 8, 2, 6, 3
FORWARD_SHARE = 0.5  # of the kept maps that a pass without gradient needs at once; 0.37 to 0.49 were measured
# Maps of the size of a slice beside those of the networks: for each class, and beside them.
SCORES = (3, 0)
LOSS = (16, 16)  # cross entropy, Dice and boxes of one network; 8 and 7 without boxes
LEVEL_LOSS, PEER_LOSS = (12, 8), 2  # of a level of certainty, and for each class and each other level
COUNTED_WINDOW, NEIGHBOUR_MAPS = 3, 3  # neighbours of a pixel that are counted, and maps of each further one
SMALL_MAPS = 1.5  # resident memory of many small maps, beside OVERHEAD: 2.6 times the tensors' was measured
CRF_LOSS, LEARNT_TREES = 4, 3
OWN_SLICE_LOSS, PUBLIC_SLICE_LOSS = (64, 32), (24, 16)
VIEW_BYTES = (36, 40)  # of a public slice's pixel: for each channel, and beside them
PREDICTION_COPIES = 4  # of what travels in place of weights: received, in the model, sent
PSEUDO_LABEL_BYTES = (8, 16, 34)  # of a pixel of FedMix's pseudo-labels: for each channel, each structure, beside them


def method_memory(method: FederatedMethod, model: nn.Module, network: nn.Module, *, slices: int) -> float:
    """Bytes of a round at a site, apart from the site's own slices.

    Args:
        method: what is asked for.
        model: what travels, on the meta device.
        network: what is trained, on the meta device: the model, or a network that stays at its site.
        slices: the site's training slices.
    """
    config = method.config
    pixels = config.size**2
    update = max(_update(method, network), _without_gradient(method, network))
    travelling = sum(buffer.nbytes for buffer in model.buffers())
    held = PREDICTION_COPIES * travelling
    if isinstance(method, PublicSliceMethod):
        per_channel, plain = VIEW_BYTES
        held += sum(public_parts(method)) * pixels * (per_channel * config.channels + plain)
    if isinstance(method, FedMix):
        per_channel, per_structure, plain = PSEUDO_LABEL_BYTES
        held += slices * pixels * (per_channel * config.channels + per_structure * (config.classes - 1) + plain)
    return OVERHEAD * update + held + _weights(method, network)


def kept_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of all tensors that autograd keeps of `run`, apart from the network's parameters."""
    own = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by identity: on the meta device no storage has an address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for name, storage in kept.items() if name not in own)


def public_parts(method: PublicSliceMethod) -> tuple[int, int]:
    """Numbers of public slices that are fitted and that are exchanged, as `PublicSlices` divides them."""
    own = method.options
    exchanged = exchanged_count(own.public_slices, own.held_out)
    return own.public_slices - exchanged or exchanged, exchanged


def _weights(method: FederatedMethod, network: nn.Module) -> float:
    """Bytes of weights, gradients and optimizers, and of gradients per slice with differential privacy."""
    copies = WEIGHT_COPIES
    if isinstance(method, FederatedProximal):
        copies += PROXIMAL_COPIES
    if isinstance(method, FedICRA) and method.options.adaptive:
        copies += ADAPTIVE_COPIES
    if isinstance(method, PublicSliceMethod):
        copies += STATE_COPIES
    if method.config.private:
        copies += 2 * PRIVATE_SLICES  # Opacus' gradients, and the patients' means of them
    return BYTES * copies * sum(parameter.numel() for parameter in network.parameters())


def _without_gradient(method: FederatedMethod, network: Any) -> float:
    """Bytes of a pass that scores, or that predicts public slices."""
    at_once = SLICES_AT_ONCE
    if isinstance(method, PublicSliceMethod):
        at_once = max(at_once, min(GRADING_BATCH, sum(public_parts(method))))
    run = network
    if isinstance(method, GazeSupervision):
        run = network.networks()[0]  # one after the other
    elif isinstance(method, FedMix):
        run = network.first
    elif isinstance(method, CMC):
        run = partial(_one_modality, method, network)
    return at_once * (FORWARD_SHARE * _kept_of_a_slice(method, network, run) + _maps(method, SCORES))


@singledispatch
def _update(method: FederatedMethod, network: Any) -> float:
    """Bytes of the feature maps and losses of an update, by the kind of method."""
    slices = method.config.batch_size
    if method.config.private:
        slices = max(slices, PRIVATE_SLICES)
        for module in network.modules():  # as Opacus' hooks need it
            if getattr(module, "inplace", False):
                module.inplace = False
    return slices * (_kept_of_a_slice(method, network, network) + _maps(method, LOSS))


@_update.register
def _(method: FedMix, network: Any) -> float:
    kept = _kept_of_a_slice(method, network.first, network.first)
    return 2 * method.config.batch_size * (kept + _maps(method, LOSS))


@_update.register
def _(method: GazeSupervision, network: Any) -> float:
    own = method.options
    first = network.networks()[0]

    def run(images: Tensor) -> object:
        features = first.decode(first.encode(images).features)[-1]
        plain = first.logits(features)
        if own.levels == 1 or not own.consistency:
            return plain
        wide = propagate(features, counted, reach // (counted // 2) if reach else 1, temperature=own.temperature)
        return plain, torch.sigmoid(first.logits(wide))

    counted = min(own.window, COUNTED_WINDOW)
    reach = own.window // 2 * max(1, own.dilation // first.fold)  # of all neighbours: features are padded by it
    others = (own.window**2 - counted**2) * NEIGHBOUR_MAPS / first.fold**2
    per_class, plain = LEVEL_LOSS
    losses = _maps(method, (per_class + PEER_LOSS * (own.levels - 1), plain + others))
    kept = _kept_of_a_slice(method, first, run) + losses
    return SMALL_MAPS * method.config.batch_size * own.levels * kept


@_update.register
def _(method: FedICRA, network: Any) -> float:
    def run(images: Tensor) -> object:
        decoded = network.decode(network.encode(images).features)
        return network.logits(decoded[-1]), network.embeddings(decoded) if len(network.heads) else None

    own, side = method.options, method.config.size
    losses = _maps(method, LOSS)
    if own.tree_weight:  # as if trees were as deep as they can be
        jumps = (side**2).bit_length()
        losses += _maps(method, (jumps + 2, 4 * jumps + 4))
        if own.learnt_trees:
            losses += LEARNT_TREES * _maps(method, (3 * jumps + 4, 7 * jumps + 6))
    if own.crf_weight:  # a kernel for each offset of half the window
        radius = min(crf_window(side)[0], side - 1)
        losses += _maps(method, (CRF_LOSS, ((2 * radius + 1) ** 2 - 1) / 2))
    return method.config.batch_size * (_kept_of_a_slice(method, network, run) + losses)


@_update.register
def _(method: CMC, network: Any) -> float:
    counts = method.channels_by_modality

    def run(images: Tensor) -> object:
        batch = {name: images.new_zeros(len(images), count, *images.shape[2:]) for name, count in counts.items()}
        single = len(batch) == 1
        labelled = method.outputs(network, batch)
        views = [network(shown, name) for name, shown in batch.items() if single or method.options.views == ALL]
        if single:
            return labelled, views
        unlabelled = method.outputs(network, batch)
        (*_, first), (*_, second) = unlabelled.values()
        return labelled, views, unlabelled, channel_consistency(first, second, method.options.descriptor)

    losses = len(counts) * _maps(method, LOSS)
    return method.config.batch_size * (_kept_of_a_slice(method, network, run) + losses)


@_update.register
def _(method: PublicSliceMethod, network: Any) -> float:
    """The larger one of updates of own slices, with and without labels, and of public slices."""

    def of_own_slices(images: Tensor) -> object:
        labelled, strong, (*_, features) = (network.assess(images) for _ in range(3))
        return labelled, strong, network.perturbed(features)

    config, (fitted, exchanged) = method.config, public_parts(method)
    own = config.batch_size * (_kept_of_a_slice(method, network, of_own_slices) + _maps(method, OWN_SLICE_LOSS))
    if not fitted:
        return own
    updates = min(math.ceil(method.options.public_slices / config.batch_size), fitted)
    at_once = math.ceil(fitted / updates) + math.ceil(exchanged / updates)
    kept = _kept_of_a_slice(method, network, network.assess)
    return max(own, at_once * (kept + _maps(method, PUBLIC_SLICE_LOSS)))


def _one_modality(method: CMC, network: Any, images: Tensor) -> Tensor:
    """Logits of as many slices as `images` (B, channels, S, S), of the modality with the most channels."""
    name, count = max(method.channels_by_modality.items(), key=lambda item: item[1])
    return network(images.new_zeros(len(images), count, *images.shape[2:]), name)


def _kept_of_a_slice(method: FederatedMethod, network: nn.Module, run: Callable[[Tensor], object]) -> float:
    """`kept_bytes` for each slice of a batch (B, channels, S, S) that `run` takes."""
    config = method.config
    images = torch.zeros(COUNTED, config.channels, config.size, config.size, device="meta")
    network.train()
    return kept_bytes(network, lambda: run(images)) / COUNTED


def _maps(method: FederatedMethod, maps: tuple[float, float]) -> float:
    """Bytes of maps of the size of a slice: so many for each class, and so many beside them."""
    per_class, plain = maps
    return BYTES * (per_class * method.config.classes + plain) * method.config.size**2
