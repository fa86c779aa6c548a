"""How large the networks of a request are, before they are built: parameters, memory, and state between rounds."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...adaptation.engine.training_plan import BYTES_PER_WEIGHT
from ...common.records import read_record
from ...generative.config import FactoryConfig
from ...generative.factory import Factory
from .request_kind import ADAPTATION, FACTORY

GIB = 2**30
BYTES = 4  # of a float32
MOMENTS = 2  # of Adam, kept between rounds
# Feature maps that wait for the gradient, in units of a level's width, measured on the CPU: factories of both heads
# take 22 to 35 of them, translators up to 107.
FACTORY_MAPS, TRANSLATOR_MAPS = 36, 108
# Of a factory that draws labels, for each tissue map: there may be hundreds with many classes; 10 were measured.
TISSUE_MAPS = 12


@dataclass(frozen=True, kw_only=True)
class RequestSize:
    """How much a request takes.

    Attributes:
        parameters: of all networks.
        memory: GiB while it trains: weights, gradients, optimizer, and feature maps that wait for the gradient.
        state: GiB on disk between rounds: weights and optimizer.
    """

    parameters: int
    memory: float
    state: float


def size_of(kind: str, model_args: Mapping[str, object], *, slices: int = 0) -> RequestSize:
    """The size of what a request asks for; nothing is allocated, and equal requests are answered from memory.

    Args:
        kind: FACTORY, SEGMENTATION or ADAPTATION.
        model_args: of the request, within the limits of a policy: unlimited ones may take long.
        slices: the site's training slices, of which some methods keep copies.

    Raises: ConfigError or UsageError for settings of which no network can be built; others for values of which nobody
        thought.
    """
    return _size_of(kind, json.dumps(model_args, sort_keys=True), slices)


@functools.lru_cache(maxsize=64)
def _size_of(kind: str, text: str, slices: int) -> RequestSize:
    model_args = json.loads(text)
    if kind == FACTORY:
        return _factory_size(model_args["factory"])
    if kind == ADAPTATION:
        return _adaptation_size(model_args["card"], model_args["adaptation"])
    return _method_size(model_args["config"], slices)


def _factory_size(values: object) -> RequestSize:
    config = read_record(FactoryConfig, values)
    with torch.device("meta"):
        factory = Factory(config)
    pixels = sum(side**2 * width for side, width in zip(config.resolutions, config.channels, strict=True))
    maps = FACTORY_MAPS * pixels
    if config.classes:
        maps += TISSUE_MAPS * factory.generator.num_maps * config.image_size**2
    return _size(_count(factory), maps=maps * config.batch_size, keeps=True)


def _method_size(values: Mapping[str, object], slices: int) -> RequestSize:
    # Only now, and not for factories, which need none of it: networks of segmenters are slow to import.
    from ...adaptation.methods.interface.method_config import MethodConfig
    from ...adaptation.methods.public_slice_method import PublicSliceMethod
    from ...adaptation.methods.registry import METHODS, make_method
    from .method_memory import method_memory

    read_record(MethodConfig, values)  # checks the types, too
    config = MethodConfig.from_dict(values)  # as the plan reads them, which takes a missing fold for 1
    method = make_method(config)
    read_record(METHODS[config.method].Options, config.options)
    with torch.device("meta"):
        model = network = method.build()
        if isinstance(method, PublicSliceMethod) and not _count(model):
            network = method.fresh_network("")  # it stays at its site
        memory = method_memory(method, model, network, slices=slices)
    parameters = _count(network)
    return RequestSize(parameters=parameters, memory=memory / GIB, state=_state(parameters))


def _adaptation_size(card: object, adaptation: Mapping[str, object]) -> RequestSize:
    from ...adaptation.engine.segmenter_config import SegmenterConfig
    from ...adaptation.labelled_factory import LabelledFactory
    from ...adaptation.training.translator_training import TranslatorConfig

    segmenter = read_record(SegmenterConfig, adaptation["segmenter"])
    translator = read_record(TranslatorConfig, adaptation["translator"])
    with torch.device("meta"):
        labelled = LabelledFactory.from_dict(card)
        parameters = sum(
            _count(network) for network in (labelled.factory.generator, labelled.robust.network, *labelled.branches)
        )
    config = labelled.factory.config
    size = _size(
        parameters, maps=TRANSLATOR_MAPS * translator.encoder.width * config.image_size**2 * translator.batch_size
    )
    if adaptation.get("engine") != "translator":  # its batch shrinks until it fits into this memory
        size = _size(parameters, maps=segmenter.memory * GIB / BYTES)
    return size


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _size(parameters: int, *, maps: float, keeps: bool = False) -> RequestSize:
    """The size of a training with so many parameters and so many values in feature maps."""
    return RequestSize(
        parameters=parameters,
        memory=(parameters * BYTES_PER_WEIGHT + maps * BYTES) / GIB,
        state=_state(parameters) if keeps else 0.0,
    )


def _state(parameters: int) -> float:
    """GiB of weights and optimizer between rounds."""
    return parameters * BYTES * (1 + MOMENTS) / GIB
