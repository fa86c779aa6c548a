"""Frozen image encoders for guidance and for a site's mean embedding, loaded from local files only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError

TIMM = "timm:"
VISUAL = "visual."  # prefix of the image tower in the weights of a whole CLIP model


class ImageEncoder(nn.Module):
    """Slices to unit vectors.

    Attributes:
        name: architecture, as given to `load_image_encoder`.
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
        """(B, 1 or 3, S, S), nominally [-1, 1], to (B, width) of length one; gradients reach the images.

        Scaled to [0, 1] without clamping, enlarged or reduced bicubically, standardised as the encoder was trained.
        """
        x = (images.float().expand(-1, 3, -1, -1) + 1) / 2
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return F.normalize(self.tower((x - self.mean) / self.std), dim=1)

    @torch.no_grad()
    def mean_embedding(self, batches: Iterable[Tensor]) -> Tensor:
        """(width,), mean of the unit vectors of all slices, itself shorter than one.

        Args:
            batches: (B, 1, S, S) each, in [-1, 1].

        Raises: UsageError without any slice.
        """
        total, count = torch.zeros(self.width, dtype=torch.float64), 0
        for batch in batches:
            total += self(batch.to(self.mean.device)).double().sum(dim=0).cpu()
            count += len(batch)
        if not count:
            raise UsageError("no slices to embed")
        return (total / count).float()


def load_image_encoder(name: str, weights: str | Path, *, device: str = "cpu") -> ImageEncoder:
    """An encoder with weights from a file; nothing is downloaded.

    Args:
        name: an open_clip architecture such as `ViT-L-14-quickgelu`, `local-dir:FOLDER` with an
            `open_clip_config.json`, or `timm:` and a timm architecture such as `timm:vit_base_patch16_224`.
        weights: safetensors, or a PyTorch file that holds only tensors. Of a CLIP model the whole or the image tower.

    Raises: UsageError for an unknown architecture or a missing file, CheckpointError if the weights do not fit or
        the file would execute code.
    """
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"{path}: no such file (weights of the image encoder)")
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
            f"{path}: not weights of {name}: lacks {missing[:2]}, adds {extra[:2]}, other shape {wrong[:2]}"
        )
    tower.load_state_dict(state)
    return ImageEncoder(name, tower, side=side, mean=mean, std=std).to(device)


def read_embedding(path: str | Path) -> Tensor:
    """A mean embedding from a plain array file of shape (1, width) or (width,): returns (width,).

    Raises: UsageError if there is none or it is something else.
    """
    import numpy as np  # the networks must import without it

    try:
        mean = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not readable as a mean embedding ({error})") from None
    if mean.ndim not in (1, 2) or mean.size != mean.shape[-1] or mean.dtype.kind != "f" or not np.isfinite(mean).all():
        raise UsageError(f"{path}: a mean embedding is one row of finite numbers, found {mean.shape} {mean.dtype}")
    return torch.from_numpy(mean.reshape(-1).astype(np.float32))


def _clip_tower(name: str) -> tuple[nn.Module, int, Iterable[float], Iterable[float]]:
    import open_clip  # slow to import, and only here

    if name.startswith("hf-hub:"):
        raise UsageError(f"{name}: nothing is downloaded; give an architecture's name and a local weights file")
    try:
        config = open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: no readable open_clip configuration ({error})") from None
    if config is None:
        raise UsageError(f"{name}: unknown architecture; see open_clip.list_models(), or write {TIMM}NAME")
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    if set(config) - known:
        raise UsageError(f"{name}: this kind of CLIP model is not supported ({sorted(set(config) - known)})")
    tower = open_clip.CLIP(**config).visual
    side = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    return tower, side, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def _timm_tower(name: str) -> tuple[nn.Module, int, Iterable[float], Iterable[float]]:
    import timm

    architecture = name[len(TIMM) :]
    if not timm.is_model(architecture):
        raise UsageError(f"{name}: timm knows no such architecture")
    tower = timm.create_model(architecture, pretrained=False, num_classes=0)
    settings = tower.pretrained_cfg
    return tower, settings["input_size"][-1], settings["mean"], settings["std"]


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise CheckpointError(f"{path}: refused, it holds more than weights and could execute code") from None
    except Exception as error:  # damaged files and TorchScript archives raise many types
        raise CheckpointError(f"{path}: not readable as weights ({str(error).splitlines()[0][:120]})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not weights")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
