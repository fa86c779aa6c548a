"""The published way of drawing labelled volumes, in plain form: `benchmarks/synthesis.py` compares the package with it.

For a volume, it computes the latents of a few height bins at a time (and discards the slices made on the way),
interpolates linearly between neighbours, and draws the slices in small batches with new noise. Every batch is encoded
again, decoded and labelled by five members, each of which is read from its file. Arrays in double precision grow by
concatenation, labels become one-hot by rows of the identity matrix, and each slice is written to a pickled file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fedfactory.adaptation.networks.translator_network import SOURCE, Translator
from fedfactory.generative.networks.generator import Generator, Style, Synthesis
from torch import Tensor


class PublishedSynthesis:
    """Drawing by five ensemble members in files; arguments have the names of the published program."""

    def __init__(self, generator: Generator, network: Translator, files: list[Path], *, domain: int) -> None:
        self.generator, self.network, self.files, self.domain = generator, network, files, domain

    @torch.no_grad()
    def volume(self, out: Path, number: int, *, z_depth: int, slices_in_one_z: int, batch_size: int) -> None:
        """Write the slices of one volume."""
        z = torch.randn(1, self.generator.config.latent_dim)
        size, classes = self.generator.config.image_size, self.network.classes
        images, masks = np.zeros((0, size, size)), np.zeros((0, size, size))
        previous = None
        for start in range(0, z_depth, batch_size):
            w = self.latents(z, torch.arange(start, min(start + batch_size, z_depth)))
            if previous is not None:
                w = torch.cat([previous, w])
            previous = w[-1:]
            walk = self.between(w, slices_in_one_z)
            for part in walk.split(batch_size):
                made = self.draw(part)
                images = np.concatenate([images, made.image[:, 0].clamp(-1, 1).double().numpy()])
                masks = np.concatenate([masks, self.mask(made.image).double().numpy()])
        one_hot = np.eye(classes)[masks.astype(int)]
        for position, (image, mask) in enumerate(zip(images, one_hot, strict=True)):
            record = {
                "data": image[..., None].astype(np.float32),
                "mask": mask[:, :, None].astype(bool),
                "weight": None,
            }
            np.save(out / f"fakeVolume{number}_slice{position:03d}.npy", np.array(record, dtype=object))

    def latents(self, z: Tensor, bins: Tensor) -> Tensor:
        """Styles (n, n_latent, latent_dim) of height bins (n,) for a latent (1, latent_dim).

        As in the published program, a full pass of the generator is made and its slices are discarded.
        """
        latents = z.expand(len(bins), -1)
        domains = torch.full((len(bins),), self.domain)
        style = self.generator.style_of(latents, bins, domains)
        self.generator.synthesise(style, self.new_noise(len(bins)))
        return style.w

    @staticmethod
    def between(w: Tensor, steps: int) -> Tensor:
        """Linear interpolation between neighbouring latents (n, n_latent, latent_dim), `steps` per pair.

        The last pair has one step less and is followed by the last latent itself.
        """
        points = []
        for k in range(len(w) - 1):
            last = k == len(w) - 2
            points += [w[k] + j / steps * (w[k + 1] - w[k]) for j in range(steps - 1 if last else steps)]
        return torch.stack([*points, w[-1]])

    def draw(self, w: Tensor) -> Synthesis:
        """Slices with new noise for styles (n, n_latent, latent_dim)."""
        domains = torch.full((len(w),), self.domain)
        return self.generator.synthesise(Style(w, self.generator.input(len(w)), domains), self.new_noise(len(w)))

    def new_noise(self, batch: int) -> list[Tensor]:
        """Noise (B, 1, side, side) for each layer."""
        return [torch.randn(batch, 1, side, side) for side in self.generator.noise_sides]

    def mask(self, images: Tensor) -> Tensor:
        """Labels (B, S, S) of slices (B, 1, S, S): every member is read from disk, encodes, decodes and labels them."""
        total, small = 0, F.avg_pool2d(images, 2)
        roles = torch.full((len(images),), SOURCE)
        for file in self.files:
            self.network.load_state_dict(torch.load(file, weights_only=True))
            made = self.network.decode(small, roles, self.new_noise(len(images)))
            total = total + torch.softmax(self.network.heads[SOURCE](made), dim=1)
        return (total / len(self.files)).argmax(1)

    def labels_of(self, made: Synthesis) -> Tensor:
        """Labels (B, S, S) of given features, without encoding them, for the comparison with our labels."""
        total = 0
        for file in self.files:
            self.network.load_state_dict(torch.load(file, weights_only=True))
            total = total + torch.softmax(self.network.heads[SOURCE](made), dim=1)
        return (total / len(self.files)).argmax(1)
