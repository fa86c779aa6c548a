"""The U-Net that sites train together, as deep as its slices need, with FedICRA's channel selection and heads."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import Tensor, nn

WIDEST = 16  # channels of the deepest levels, as a multiple of the first level's
SIDE_MULTIPLE = 16  # sides of slices are multiples of it
GROUPS = 4  # of group norm; widths are multiples of it
ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})  # MONAI's own
NORMS = {
    "instance": ("instance", {"affine": True}),
    "group": ("group", {"num_groups": GROUPS}),
    "batch": "batch",
}
REDUCTION = 16  # factor by which a channel selection reduces its channels inside


class ChannelSelection(nn.Module):
    """Personalised channel selection: weights of channels from the site's id and the image (FedICRA, eq. of PCS).

    x <- x + x * h,  h = sigmoid(F([mean x, s]) + F([max x, s])),  s = W2 relu(W1 site).
    """

    def __init__(self, channels: int, sites: int) -> None:
        super().__init__()
        narrow = max(1, channels // REDUCTION)
        options = {"kernel_size": 1, "bias": False}
        self.site = nn.Sequential(
            nn.Conv2d(sites, channels, **options), nn.ReLU(), nn.Conv2d(channels, channels, **options)
        )
        self.choose = nn.Sequential(
            nn.Conv2d(2 * channels, narrow, **options), nn.ReLU(), nn.Conv2d(narrow, channels, **options)
        )

    def heatmap(self, x: Tensor, site: Tensor) -> Tensor:
        """(B, channels, 1, 1) in (0, 1), for features (B, channels, H, W) and one-hot ids (B, sites)."""
        s = self.site(site[:, :, None, None])
        mean, largest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return torch.sigmoid(self.choose(torch.cat([mean, s], 1)) + self.choose(torch.cat([largest, s], 1)))


class Encoded(NamedTuple):
    """What the encoder makes of slices.

    Attributes:
        features: of the levels, fine to coarse, each (B, C, s / 2^n, s / 2^n) with s = S / fold.
        heatmap: (B, C, 1, 1) channel weights of the deepest selection; None without selections.
        entering: features that enter the deepest selection; None without selections.
    """

    features: list[Tensor]
    heatmap: Tensor | None
    entering: Tensor | None


def widths_of(width: int, depth: int) -> list[int]:
    """Channels of `depth` levels, fine to coarse: each has twice as many as the one before, up to WIDEST times the
    first."""
    return [min(width * 2**level, WIDEST * width) for level in range(depth)]


class SiteUNet(nn.Module):
    """A U-Net of MONAI's blocks (`BasicUNet`) with any number of levels.

    Args:
        outputs: channels of the logits.
        channels: of the slices.
        depth: number of resolution levels, at least 3; a slice's side is a multiple of fold * 2 ** (depth - 1).
        width: channels of the first level; each further level has twice as many, up to 16 times the first.
        fold: side of the squares of pixels that become channels first; the logits are unfolded last. With 2, the finest
            level computes on a quarter of the pixels.
        norm: "instance", "group" or "batch".
        dropout: probability after every convolution.
        sites: number of sites that channel selections distinguish; 0 builds no channel selection.
        selections: number of the deepest encoder levels that select channels by site.
        embedding: channels inside an auxiliary head; 0 builds no heads.

    Attributes:
        site: index of the site whose channels are selected; set at the site, never sent.
    """

    def __init__(
        self,
        outputs: int,
        *,
        width: int,
        depth: int,
        channels: int = 1,
        fold: int = 1,
        norm: str = "batch",
        dropout: float = 0.0,
        sites: int = 0,
        selections: int = 1,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        self.depth, self.fold = depth, fold
        widths = widths_of(width, depth)
        options = {"act": ACTIVATION, "norm": NORMS[norm], "bias": True, "dropout": dropout}
        self.conv_0 = TwoConv(2, channels * fold**2, widths[0], **options)
        for level, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"down_{level}", Down(2, before, after, **options))
        for level in reversed(range(1, depth)):
            below, after = widths[level], widths[level - 1]
            up = UpCat(2, below, after, after, **options, upsample="nontrainable", halves=level > 1)
            self.add_module(f"upcat_{level}", up)
        self.final_conv = nn.Conv2d(width, outputs * fold**2, 1)
        self.sites, self.site = sites, 0
        chosen = range(depth - selections, depth) if sites else ()
        self.selections = nn.ModuleDict({str(level): ChannelSelection(widths[level], sites) for level in chosen})
        decoded = (widths[2], widths[1], width) if embedding else ()  # at 1/4, 1/2 and all of the finest level's side
        self.heads = nn.ModuleList(_head(channels, embedding, outputs) for channels in decoded)

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1] to logits (B, outputs, S, S)."""
        return self.logits(self.decode(self.encode(x).features)[-1])

    def logits(self, features: Tensor) -> Tensor:
        """The last features of `decode`, (B, width, S / fold, S / fold), to logits (B, outputs, S, S)."""
        return F.pixel_shuffle(self.final_conv(features), self.fold)

    def encode(self, x: Tensor, site: int | None = None) -> Encoded:
        """Encode slices with the channels of a site.

        Args:
            x: slices (B, channels, S, S) in [-1, 1].
            site: index of the site whose channels are selected; None takes the attribute `site`.
        """
        heatmap, entering, features = None, None, []
        x = F.pixel_unshuffle(x, self.fold)
        for level in range(self.depth):
            x = getattr(self, f"down_{level}")(x) if level else self.conv_0(x)
            if str(level) in self.selections:
                entering, heatmap = x, self._heatmap(x, self.site if site is None else site, str(level))
                x = x * heatmap + x
            features.append(x)
        return Encoded(features, heatmap, entering)

    def heatmap(self, entering: Tensor, site: int) -> Tensor:
        """Channel weights (B, C, 1, 1) that a site gives to features (B, C, H, W) entering the deepest selection."""
        return self._heatmap(entering, site, max(self.selections, key=int))

    def _heatmap(self, x: Tensor, site: int, level: str) -> Tensor:
        chosen = torch.full((len(x),), site, device=x.device)
        return self.selections[level].heatmap(x, F.one_hot(chosen, self.sites).to(x.dtype))

    def decode(self, features: list[Tensor]) -> list[Tensor]:
        """Features of `encode` to decoder features (B, C, s / n, s / n) with s = S / fold and n = 4, 2 and 1."""
        decoded = [features[-1]]
        for level in reversed(range(1, self.depth)):
            decoded.append(getattr(self, f"upcat_{level}")(decoded[-1], features[level - 1]))
        return decoded[-3:]

    def embeddings(self, decoded: list[Tensor]) -> list[Tensor]:
        """Outputs of the auxiliary heads on the features of `decode`, each resized to (B, outputs, S, S)."""
        height, width = decoded[-1].shape[-2:]
        side = (self.fold * height, self.fold * width)
        outputs = [head(features) for head, features in zip(self.heads, decoded, strict=True)]
        return [F.interpolate(output, side, mode="bilinear", align_corners=False) for output in outputs]

    def norm_names(self) -> set[str]:
        """Names of all tensors of normalisation layers, running statistics included."""
        kinds = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
        return {
            f"{name}.{key}"
            for name, module in self.named_modules()
            if isinstance(module, kinds)
            for key in module.state_dict()
        }

    def higher_layers(self) -> dict[str, nn.Parameter]:
        """Parameters of the decoder and of the output layer, by name."""
        above = ("upcat_", "final_conv")
        return {name: value for name, value in self.named_parameters() if name.startswith(above)}


def _head(channels: int, embedding: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, embedding, 3, padding=1),
        nn.BatchNorm2d(embedding),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(embedding, outputs, 1, bias=False),
    )
