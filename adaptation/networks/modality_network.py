"""The network of CMC: one encoder and decoder for several modalities, fused at the bottleneck (arXiv 2408.07341)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .site_network import GROUPS, widths_of

OWN_TENSOR = re.compile(r"(?:^mixtures|^head|^widen\.\d+|\.conv|\.norms)\.([^.]+)\.")  # names a modality in a name
SHARED, NORM_SPECIFIC, SEPARATE = SHARINGS = ("shared", "norm_specific", "separate")
CONCAT, ADD = FUSION_MODES = ("concat", "add")


class ModalityUnit(nn.Module):
    """Convolution, normalisation, ReLU. Instance norm: no image depends on the batch.

    Args:
        channels_in: channels of the input, by modality if `sharing` is "separate".
        channels: of the output.
        modalities: their names.
        sharing: what modalities share: "shared", all; "norm_specific", all but the normalisation; "separate", nothing.
    """

    def __init__(self, channels_in: int | Mapping[str, int], channels: int, modalities: Sequence[str], sharing: str):
        super().__init__()
        before = channels_in if isinstance(channels_in, Mapping) else dict.fromkeys(modalities, channels_in)
        self.conv = _for_each(
            before, lambda count: nn.Conv2d(count, channels, 3, padding=1, bias=False), own=sharing == SEPARATE
        )
        self.norms = _for_each(before, lambda _: nn.InstanceNorm2d(channels, affine=True), own=sharing != SHARED)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        """(B, channels_in, S, S) to (B, channels, S, S)."""
        return torch.relu(_of(self.norms, modality)(_of(self.conv, modality)(x)))


class ModalityBlock(nn.Module):
    """Two units in a row."""

    def __init__(self, channels_in: int | Mapping[str, int], channels: int, modalities: Sequence[str], sharing: str):
        super().__init__()
        self.first = ModalityUnit(channels_in, channels, modalities, sharing)
        self.second = ModalityUnit(channels, channels, modalities, sharing)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        """(B, channels_in, S, S) to (B, channels, S, S)."""
        return self.second(self.first(x, modality), modality)


class ChannelAttention(nn.Module):
    """The paper's modality-independent aware module: x + gamma A x, with A = softmax(max - E) and E = x x^T (C, C).

    E is divided by the number of pixels, so that the softmax does not depend on the slice's size; gamma starts at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        rows = x.flatten(2).float()
        energy = rows @ rows.mT / rows.shape[-1]
        weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
        return x + self.gamma * (weights @ rows).view_as(x).to(x.dtype)


class ModalityUNet(nn.Module):
    """U-Net for slices of one modality, or for a slice of each of two modalities, of any patients and positions.

    Where modalities share the convolutions of the encoder, those of unequal numbers of channels are first brought to
    the largest number, each by a linear mixture of its own.

    Args:
        classes: channels of the logits.
        modalities: their names.
        width: channels of the first level, a multiple of 4; each further level has twice as many, up to 16 times the
            first; the deepest has K.
        depth: number n of resolution levels; a slice's side S is a multiple of fold * 2 ** (n - 1), and
            s = S / fold / 2 ** (n - 1).
        fold: side of the squares of pixels that become channels first; the logits are unfolded last.
        channels: of the slices of each modality, in the order of their names; empty for one each.
        encoder_sharing: what modalities share of the encoder, one of SHARINGS: "shared" is the published program,
            "separate" the published figure.
        decoder_sharing: the same for the decoder and the last convolution.
        fusion_mode: how the fused features join those of a modality: "concat" and mix them, as in the published
            program, or "add" them, as in its figure.
    """

    def __init__(
        self,
        classes: int,
        modalities: Sequence[str],
        width: int,
        *,
        depth: int,
        fold: int = 1,
        channels: Sequence[int] = (),
        encoder_sharing: str = NORM_SPECIFIC,
        decoder_sharing: str = NORM_SPECIFIC,
        fusion_mode: str = CONCAT,
    ) -> None:
        super().__init__()
        counts = dict(zip(modalities, channels or [1] * len(modalities), strict=True))
        most, self.fold = max(counts.values()), fold
        separate = encoder_sharing == SEPARATE
        unequal = counts if min(counts.values()) < most and not separate else {}
        self.mixtures = nn.ModuleDict({name: nn.Conv2d(count, most, 1, bias=False) for name, count in unequal.items()})
        widths = widths_of(width, depth)
        folded = {name: count * fold**2 for name, count in counts.items()}
        inputs = [folded if separate else most * fold**2, *widths]
        self.down = nn.ModuleList(
            ModalityBlock(before, after, modalities, encoder_sharing)
            for before, after in zip(inputs, widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.attention = ChannelAttention()
        deepest = widths[-1]
        self.fusion = nn.Sequential(
            nn.Conv2d(2 * deepest, deepest, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, deepest), nn.ReLU(),
            nn.Conv2d(deepest, deepest, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, deepest), nn.ReLU(),
            nn.Sigmoid(),
        )  # fmt: skip
        self.conversion = None
        if fusion_mode == CONCAT:
            self.conversion = nn.Sequential(
                nn.GroupNorm(GROUPS, 2 * deepest), nn.ReLU(), nn.Conv2d(2 * deepest, deepest, 1)
            )
        own = {"own": decoder_sharing == SEPARATE}
        self.widen = nn.ModuleList(
            _for_each(modalities, lambda _, count=count: nn.ConvTranspose2d(count, count, 2, 2), **own)
            for count in reversed(widths[1:])
        )
        self.up = nn.ModuleList(
            ModalityBlock(above + below, above, modalities, decoder_sharing)
            for above, below in reversed(list(pairwise(widths)))
        )
        self.head = _for_each(modalities, lambda _: nn.Conv2d(width, classes * fold**2, 1), **own)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        """Slices (B, channels, S, S) of one modality, fused with themselves, to logits (B, classes, S, S)."""
        skips, deep = self.encode(x, modality)
        return self.decode(self.fused(deep, deep, deep), skips, modality)[0]

    def encode(self, x: Tensor, modality: str) -> tuple[list[Tensor], Tensor]:
        """Slices (B, channels, S, S) to the features of the upper levels, fine to coarse,
        each (B, channels, S / fold / 2^l, S / fold / 2^l), and the deepest features (B, K, s, s)."""
        x = F.pixel_unshuffle(self.mixtures[modality](x) if self.mixtures else x, self.fold)
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x, modality)
            skips.append(x)
        return skips[:-1], x

    def fused(self, own: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Input of a modality's decoder: its own deepest features, joined with the fused features of both modalities.

        Args:
            own: (B, K, s, s), deepest features of the modality to decode.
            first: deepest features of the first modality, of the same shape.
            second: deepest features of the second modality, of the same shape.

        Returns: (B, K, s, s). Raises: ValueError for features of unequal shape.
        """
        shapes = [tuple(features.shape) for features in (own, first, second)]
        if len(set(shapes)) > 1:
            raise ValueError(f"the shapes of the features are {shapes}; they must be equal to be fused")
        own, first, second = (self.attention(features) for features in (own, first, second))
        fused = self.fusion(torch.cat([first, second], 1))
        return fused + own if self.conversion is None else self.conversion(torch.cat([fused, own], 1))

    def decode(self, deep: Tensor, skips: list[Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Fused features `deep` (B, K, s, s) and the features of the upper levels to logits.

        Returns: logits (B, classes, S, S), and the last features (B, width, S, S), each fold x fold pixels alike.
        """
        x = deep
        for widen, block, skip in zip(self.widen, self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, _of(widen, modality)(x)], 1), modality)
        logits = F.pixel_shuffle(_of(self.head, modality)(x), self.fold)
        return logits, F.interpolate(x, scale_factor=self.fold) if self.fold > 1 else x


class OneModality(nn.Module):
    """A network of several modalities, applied to slices of one of them."""

    def __init__(self, network: ModalityUNet, modality: str) -> None:
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, S, S) to logits (B, classes, S, S)."""
        return self.network(x, self.modality)


def modality_of(name: str) -> str | None:
    """The modality that a tensor belongs to, by the tensor's name; None if all modalities share it."""
    own = OWN_TENSOR.search(name)
    return own[1] if own else None


def _for_each(
    modalities: Iterable[str] | Mapping[str, int], make: Callable[[int], nn.Module], *, own: bool
) -> nn.Module:
    """A layer for each modality, of what the modality's name maps to, if `own`; otherwise one for all of them."""
    given = modalities if isinstance(modalities, Mapping) else dict.fromkeys(modalities, 0)
    if own:
        return nn.ModuleDict({name: make(value) for name, value in given.items()})
    return make(next(iter(given.values())))


def _of(layers: nn.Module, modality: str) -> nn.Module:
    """The layer of a modality among those of `_for_each`."""
    return layers[modality] if isinstance(layers, nn.ModuleDict) else layers
