"""The label-synthesis branch: a per-pixel classifier that reads the generator's feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.checkpoint import load_strictly, read_weights, write_weights
from ..generative.config import FactoryConfig
from ..generative.factory_file import TrainedFactory
from ..generative.generator import Generator, Synthesis
from ..generative.networks import make_generator
from ..generative.synthesis import synthesise_volume
from ..progress import track
from .segmenter import Segmenter, seeded

KIND = "labelled factory"
HIDDEN = 64  # width of the classifier


class LabelBranch(nn.Module):
    """All feature maps, enlarged to the image's side, and the tissue maps, through two 1 x 1 layers.

    No domain is read: what the branch learns in the labelled domain holds for the same anatomy in any other.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.layers = nn.Sequential(nn.Conv2d(channels, HIDDEN, 1), nn.LeakyReLU(0.2), nn.Conv2d(HIDDEN, classes, 1))

    @classmethod
    def for_generator(cls, generator: Generator, classes: int) -> LabelBranch:
        return cls(sum(generator.feature_channels) + generator.num_maps, classes)

    def forward(self, synthesis: Synthesis) -> Tensor:
        """Logits (B, classes, S, S) of the slices that `synthesis` shows."""
        side = synthesis.image.shape[-1]
        enlarged = [F.interpolate(f, size=(side, side), mode="bilinear") for f in synthesis.features]
        return self.layers(torch.cat([*enlarged, synthesis.anatomy], dim=1))


@dataclass
class LabelledFactory:
    """A factory that draws labelled slices.

    Attributes:
        factory: the generator it draws with.
        branch: its labels.
        robust: the labelled site's segmenter, trained with random contrasts; gives every site's own images a first
            guess.
        card: labelled domain, classes, agreement, and the factory's own card entries.
    """

    factory: TrainedFactory
    branch: LabelBranch
    robust: Segmenter
    card: dict[str, Any]

    def save(self, path: str | Path) -> None:
        tensors = {f"g_ema.{name}": tensor for name, tensor in self.factory.generator.state_dict().items()}
        tensors |= {f"branch.{name}": tensor for name, tensor in self.branch.state_dict().items()}
        tensors |= {f"robust.{name}": tensor for name, tensor in self.robust.network.state_dict().items()}
        factory = self.factory
        card = {
            "kind": KIND,
            "config": factory.config.to_dict(),
            "spacing": factory.spacing,
            "height": factory.height,
            "facts": factory.facts,
            "robust": {"format": self.robust.format.to_dict(), **self.robust.card},
            **self.card,
        }
        write_weights(path, tensors, card)

    @classmethod
    def load(cls, path: str | Path) -> LabelledFactory:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or of another kind."""
        tensors, card = read_weights(path, kind=KIND)
        try:
            generator = make_generator(FactoryConfig.from_dict(card["config"])).eval()
            branch = LabelBranch.for_generator(generator, card["classes"]).eval()
            robust = Segmenter.from_card(card["robust"])
            for network, prefix in ((generator, "g_ema."), (branch, "branch."), (robust.network, "robust.")):
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                load_strictly(network, own, path)
            factory = TrainedFactory(generator, {}, card["spacing"], card["height"], {}, card["facts"])
        except (KeyError, TypeError, ConfigError, UsageError) as error:
            raise CheckpointError(f"{path}: its card is not usable ({error})") from None
        return cls(factory, branch, robust, {k: card[k] for k in ("classes", "labelled_domain", "agreement")})

    @torch.no_grad()
    def draw_volume(
        self,
        domain: str,
        heights: Tensor,
        *,
        seed: int,
        z: Tensor | None = None,
        encoding: Tensor | None = None,
        truncation: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One synthetic subject: images (N, S, S) float32 in [-1, 1] and labels (N, S, S) uint8.

        Args:
            heights: (N,) in [0, z_bins - 1], see `slice_heights`.
            seed: of the noise, and of the latent if none is given; the same arguments give the same volume.
            z: (1, latent_dim), the subject's latent.
            encoding: (encoding_dim,), the domain's mean embedding, or None.
            truncation: see `synthesise_volume`.
        """
        index = self.factory.config.domain_index(domain)
        rng = torch.Generator().manual_seed(seed)
        images, labels = [], []
        options = {"domain": index, "rng": rng, "z": z, "encoding": encoding, "truncation": truncation}
        for part in synthesise_volume(self.factory.generator, heights, **options):
            images.append(part.image[:, 0].clamp(-1, 1).cpu().numpy())
            labels.append(self.branch(part).argmax(1).to(torch.uint8).cpu().numpy())
        return np.concatenate(images), np.concatenate(labels)


def train_label_branch(
    factory: TrainedFactory,
    teacher: Segmenter,
    robust: Segmenter,
    *,
    domain: str,
    updates: int = 250,
    batch_size: int = 16,
    seed: int = 0,
) -> LabelledFactory:
    """Teach the branch what a segmenter of the labelled domain sees in that domain's synthetic slices.

    Args:
        teacher: trained on the labelled site's own slices.
        robust: the same with random contrasts; kept in the labelled factory.
        domain: the labelled domain.

    Returns: the labelled factory; its card says how often branch and teacher agree on fresh slices (mean
        foreground Dice, "agreement").
    """
    generator, config = factory.generator, factory.config
    index = config.domain_index(domain)
    rng = torch.Generator().manual_seed(seed)
    with seeded(seed):
        branch = LabelBranch.for_generator(generator, teacher.classes)
    optimizer = torch.optim.Adam(branch.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    for _ in track(range(updates), "training the label branch"):
        synthesis = _draw(generator, index, batch_size, rng)
        target = teacher.probabilities(synthesis.image).argmax(1, keepdim=True)
        loss = loss_function(branch(synthesis), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    agreement = _agreement(branch.eval(), teacher, generator, index, rng)
    card = {"classes": teacher.classes, "labelled_domain": domain, "agreement": agreement}
    return LabelledFactory(factory, branch, robust, card)


@torch.no_grad()
def _draw(generator: Generator, domain: int, batch: int, rng: torch.Generator) -> Synthesis:
    config = generator.config
    z = torch.randn(batch, config.latent_dim, generator=rng)
    height = torch.rand(batch, generator=rng) * (config.z_bins - 1)
    noise = generator.draw_noise(batch, rng)
    return generator.synthesise(generator.style_at(z, height, torch.full((batch,), domain)), noise)


@torch.no_grad()
def _agreement(branch: LabelBranch, teacher: Segmenter, generator: Generator, domain: int, rng) -> float:
    synthesis = _draw(generator, domain, 128, rng)
    ours, theirs = branch(synthesis).argmax(1), teacher.probabilities(synthesis.image).argmax(1)
    scores = []
    for value in range(1, teacher.classes):
        both, total = ((ours == value) & (theirs == value)).sum(), (ours == value).sum() + (theirs == value).sum()
        if total > 0:
            scores.append(float(2 * both / total))
    return float(np.mean(scores)) if scores else float("nan")
