"""Frozen image encoders for guidance and for a site's mean embedding, loaded from local files only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.files import require_file
from ..common.weights_file import refuse_packed
from ..errors import CheckpointError, UsageError

TIMM = "timm:"
COLOURS = 3  # channels of the pictures that encoders are trained on
VISUAL = "visual."  # prefix of the image tower in the weights of a whole CLIP model


class ImageEncoder(nn.Module):
    """A frozen network from slices to unit vectors.

    Args:
        name: architecture, as given to `load_image_encoder`.
        tower: network from (B, 3, side, side) to (B, width).
        side: pixels per side of its input.
        mean: mean of each colour channel in its training, in [0, 1].
        std: standard deviation of each colour channel in its training.

    Attributes:
        width: length of the vectors.
    """

    def __init__(self, name: str, tower: nn.Module, *, side: int, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.name, self.side = name, side
        self.tower = tower.float().eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(list(mean))[:, None, None])
        self.register_buffer("std", torch.tensor(list(std))[:, None, None])
        with torch.no_grad():
            self.width = self(torch.zeros(1, 1, side, side)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Slices (B, C, S, S), nominally in [-1, 1], to (B, width) unit vectors; gradients reach the slices.

        Three channels are taken as red, green and blue; one channel, or the mean of any other number, as grey. They are
        scaled to [0, 1] without clamping, resized bicubically and standardised as in the encoder's training.
        """
        x = images.float()
        x = x if x.shape[1] in (1, COLOURS) else x.mean(dim=1, keepdim=True)
        x = (x.expand(-1, COLOURS, -1, -1) + 1) / 2
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return F.normalize(self.tower((x - self.mean) / self.std), dim=1)

    @torch.no_grad()
    def mean_embedding(self, batches: Iterable[Tensor]) -> Tensor:
        """Mean of the unit vectors of all slices; it is shorter than 1.

        Args:
            batches: slices (B, C, S, S) each, in [-1, 1].

        Returns: (width,) float32 on the CPU.
        Raises: UsageError if there is no slice.
        """
        total, count = torch.zeros(self.width, dtype=torch.float64), 0
        for batch in batches:
            total += self(batch.to(self.mean.device)).double().sum(dim=0).cpu()
            count += len(batch)
        if not count:
            raise UsageError(f"batches hold {count} slices; give at least one")
        return (total / count).float()


def load_image_encoder(name: str, weights: str | Path, *, device: str = "cpu") -> ImageEncoder:
    """An encoder with weights from a file; nothing is downloaded.

    Args:
        name: an open_clip architecture such as `ViT-L-14-quickgelu`, `local-dir:FOLDER` with an
            `open_clip_config.json`, or `timm:` and a timm architecture such as `timm:vit_base_patch16_224`.
        weights: safetensors, or a PyTorch file that holds only tensors; of a whole CLIP model or its image tower.
        device: where the encoder is put.

    Raises: UsageError for an unknown architecture or a missing file, CheckpointError if the weights do not fit or
        the file would execute code.
    """
    path = Path(weights)
    require_file(path, "give the weights of the image encoder")
    tower, side, mean, std = (_timm_tower if name.startswith(TIMM) else _clip_tower)(name)
    state = _read_state(path)
    if any(key.startswith(VISUAL) for key in state):
        state = {key[len(VISUAL) :]: value for key, value in state.items() if key.startswith(VISUAL)}
    own = tower.state_dict()
    optional = {key for key in state.keys() - own.keys() if key.startswith(("head.", "fc.", "classifier."))}
    state = {key: value for key, value in state.items() if key not in optional}  # a classifier is not needed
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path}: expected weights of {name}: lacks {missing[:2]}, adds {extra[:2]}, other shape {wrong[:2]}"
        )
    tower.load_state_dict(state)
    return ImageEncoder(name, tower, side=side, mean=mean, std=std).to(device)


def read_embedding(path: str | Path) -> Tensor:
    """Read a mean embedding from a `.npy` file of shape (1, width) or (width,).

    Returns: (width,) float32.
    Raises: UsageError if the file is missing or holds something else.
    """
    import numpy as np  # the networks must be importable without it

    try:
        mean = np.load(path, mmap_mode="r", allow_pickle=False)  # which takes no memory for what a header claims
    except Exception as error:  # numpy parses the header with Python's own parser, which raises many types
        raise UsageError(f"{path}: not readable as a mean embedding ({error}); give a .npy file") from None
    if not isinstance(mean, np.ndarray):
        raise UsageError(f"{path}: is an archive of arrays; a mean embedding must be one array, .npy")
    if mean.ndim not in (1, 2) or mean.size != mean.shape[-1] or mean.dtype.kind != "f" or not np.isfinite(mean).all():
        raise UsageError(f"{path}: holds {mean.shape} {mean.dtype}; a mean embedding must be one row of finite numbers")
    return torch.from_numpy(mean.reshape(-1).astype(np.float32))


def _clip_tower(name: str) -> tuple[nn.Module, int, Iterable[float], Iterable[float]]:
    """Image tower of an open_clip architecture, its side, and its mean and std per colour channel."""
    import open_clip  # slow to import, and only here

    if name.startswith("hf-hub:"):
        raise UsageError(f"{name}: nothing is downloaded; give an architecture's name and a local weights file")
    try:
        config = open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: no readable open_clip configuration ({error}); check the folder") from None
    if config is None:
        raise UsageError(f"{name}: unknown architecture; see open_clip.list_models(), or write {TIMM}NAME")
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    if set(config) - known:
        raise UsageError(f"{name}: settings {sorted(set(config) - known)} are not supported; choose a plain CLIP model")
    tower = open_clip.CLIP(**config).visual
    side = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    return tower, side, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def _timm_tower(name: str) -> tuple[nn.Module, int, Iterable[float], Iterable[float]]:
    """A timm network without classifier, its side, and its mean and std per colour channel."""
    import timm

    architecture = name[len(TIMM) :]
    if not timm.is_model(architecture):
        raise UsageError(f"{name}: timm knows no such architecture; see timm.list_models()")
    tower = timm.create_model(architecture, pretrained=False, num_classes=0)
    settings = tower.pretrained_cfg
    return tower, settings["input_size"][-1], settings["mean"], settings["std"]


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or PyTorch file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            refuse_packed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: refused, it holds more than weights and could execute code; use a safetensors file"
        ) from None
    except Exception as error:  # damaged files and TorchScript archives raise many types
        raise CheckpointError(
            f"{path}: not readable as weights ({str(error).splitlines()[0][:120]}); use a safetensors file"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
