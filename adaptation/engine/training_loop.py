"""The training loop of everything that one site trains alone: seeded updates, best checkpoints, resuming, curves."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...common.progress import track
from ...common.seeding import seed_of, seeded
from ...common.weights_file import load_strictly, read_weights, write_weights
from ...errors import CheckpointError, ConfigError, TrainingError

KIND = "unfinished training"
STATE_FILE = "unfinished.safetensors"
CURVES_FOLDER = "curves"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How training is evaluated and saved. Raises: ConfigError if a value is out of range.

    Attributes:
        evaluations: number of evaluations during training, the last of them at the end.
        keep: number of best checkpoints that are returned.
        patience: evaluations without improvement after which training stops; 0 trains to the end.
        folder: where curves (TensorBoard) and the unfinished state are saved, to resume after an interruption; None
            saves nothing.
    """

    evaluations: int = 5
    keep: int = 1
    patience: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ConfigError(f"evaluations is {self.evaluations}; it must be at least 1")
        if not 1 <= self.keep <= self.evaluations:
            raise ConfigError(f"keep is {self.keep}; choose from 1 to the number of evaluations ({self.evaluations})")
        if self.patience < 0:
            raise ConfigError(f"patience is {self.patience}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights that were evaluated.

    Attributes:
        update: number of updates done.
        score: of the evaluation; higher is better.
        weights: state of the network.
    """

    update: int
    score: float
    weights: dict[str, Tensor]


@dataclass(kw_only=True)
class LoopState:
    """State of a training that can be resumed.

    Attributes:
        updates_done: number of updates done.
        checkpoints: the best ones, the best first.
        evaluations_without_improvement: since the last best score.
    """

    updates_done: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    evaluations_without_improvement: int = 0

    def add(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Record an evaluation and keep the `keep` best checkpoints; of equal scores the later one is better."""
        best = max((other.score for other in self.checkpoints), default=-np.inf)
        improved = checkpoint.score > best
        self.evaluations_without_improvement = 0 if improved else self.evaluations_without_improvement + 1
        ordered = sorted([*self.checkpoints, checkpoint], key=lambda other: (-other.score, -other.update))
        self.checkpoints = ordered[:keep]


class Trainer(ABC):
    """What the loop trains.

    Attributes:
        network: the network whose checkpoints are returned.
        optimizers: of the network's parameters, each with its learning-rate schedule or None.
        settings: data and settings of the training, JSON-able: an unfinished training is resumed only with equal ones.
    """

    network: nn.Module
    optimizers: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]]
    settings: Mapping[str, object]

    @abstractmethod
    def update(self, number: int) -> dict[str, float]:
        """One update, with `number` counted from 0; the loop seeds its random numbers. Returns losses by name."""

    @abstractmethod
    def score(self) -> float:
        """Evaluate the network without labels of the site; higher is better."""

    def modules(self) -> dict[str, nn.Module]:
        """All modules with a state to save, by name."""
        return {"network": self.network}


def train(trainer: Trainer, updates: int, config: LoopConfig, *, title: str, seed: int) -> list[Checkpoint]:
    """Train, evaluate, and keep the best checkpoints.

    Every update has its own seed, so that a resumed training gives the same result as an uninterrupted one.

    Args:
        trainer: what is trained.
        updates: number of updates.
        config: how it is evaluated and saved.
        title: text of the progress bar and of errors.
        seed: of everything random.

    Returns: the best checkpoints, the best first. Raises: TrainingError if a loss becomes NaN or infinite;
    CheckpointError if the folder has an unfinished training with other data or settings.
    """
    evaluated_after = {round(updates * (number + 1) / config.evaluations) for number in range(config.evaluations)}
    state = _resumed(trainer, config.folder, updates)
    curves = _curve_writer(config.folder)
    for number in track(range(state.updates_done, updates), title):
        if config.patience and state.evaluations_without_improvement >= config.patience:
            break
        with seeded(seed_of(seed, number)):
            losses = trainer.update(number)
        _check_finite(losses, title, number)
        for name, value in losses.items():
            curves.add_scalar(name, value, number)
        state.updates_done = number + 1
        if state.updates_done not in evaluated_after:
            continue
        score = trainer.score()
        curves.add_scalar("score", score, number)
        weights = {name: tensor.detach().clone() for name, tensor in trainer.network.state_dict().items()}
        state.add(Checkpoint(update=state.updates_done, score=score, weights=weights), keep=config.keep)
        if config.folder is not None and state.updates_done < updates:
            _save(trainer, state, config.folder / STATE_FILE, updates=updates)
    curves.close()
    if config.folder is not None:
        for path in (config.folder / STATE_FILE, (config.folder / STATE_FILE).with_suffix(".json")):
            path.unlink(missing_ok=True)
    return state.checkpoints


def one_cycle(optimizer: torch.optim.Optimizer, updates: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """A schedule that rises to the optimizer's learning rate and falls again over the whole training."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=max(2, updates))


def _check_finite(losses: dict[str, float], title: str, number: int) -> None:
    for name, value in losses.items():
        if not np.isfinite(value):
            raise TrainingError(f"{title}: the loss '{name}' is {value} at update {number}; use a lower learning rate")


def _save(trainer: Trainer, state: LoopState, path: Path, *, updates: int) -> None:
    tensors: dict[str, Tensor] = {}
    for prefix, module in trainer.modules().items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    for number, (optimizer, _) in enumerate(trainer.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    for number, checkpoint in enumerate(state.checkpoints):
        tensors |= {f"checkpoint{number}.{name}": tensor for name, tensor in checkpoint.weights.items()}
    card = {
        "kind": KIND,
        "settings": _fingerprint(trainer),
        "updates": updates,
        "updates_done": state.updates_done,
        "evaluations_without_improvement": state.evaluations_without_improvement,
        "checkpoints": [[checkpoint.update, checkpoint.score] for checkpoint in state.checkpoints],
    }
    write_weights(path, tensors, card)


def _resumed(trainer: Trainer, folder: Path | None, updates: int) -> LoopState:
    """Load the unfinished training in the folder into the trainer; a new state if there is none."""
    if folder is None or not (folder / STATE_FILE).is_file():
        return LoopState()
    path = folder / STATE_FILE
    tensors, card = read_weights(path, kind=KIND)
    if (card.get("settings"), card.get("updates")) != (_fingerprint(trainer), updates):
        raise CheckpointError(f"{path}: an unfinished training with other data or settings; remove it to begin anew")

    def part(prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with the prefix, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    for prefix, module in trainer.modules().items():
        load_strictly(module, part(f"{prefix}."), path)
    for number, (optimizer, schedule) in enumerate(trainer.optimizers):
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part(f"optimizer{number}.").items():
            index, _, key = name.partition(".")
            values.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
        with warnings.catch_warnings():  # PyTorch warns of schedule steps before the optimizer's first step
            warnings.simplefilter("ignore")
            for _ in range(card["updates_done"] if schedule is not None else 0):
                schedule.step()
    return LoopState(
        updates_done=card["updates_done"],
        checkpoints=[
            Checkpoint(update=update, score=score, weights=part(f"checkpoint{number}."))
            for number, (update, score) in enumerate(card["checkpoints"])
        ],
        evaluations_without_improvement=card["evaluations_without_improvement"],
    )


def _fingerprint(trainer: Trainer) -> str:
    return hashlib.sha256(json.dumps(trainer.settings, sort_keys=True).encode()).hexdigest()


class _CurveWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that is used here."""

    def add_scalar(self, name: str, value: float, update: int, /) -> None: ...
    def close(self) -> None: ...


class _NoCurves:
    """A writer that writes nothing."""

    def add_scalar(self, name: str, value: float, update: int, /) -> None: ...
    def close(self) -> None: ...


def _curve_writer(folder: Path | None) -> _CurveWriter:
    if folder is None:
        return _NoCurves()
    from torch.utils.tensorboard import SummaryWriter  # comes with Fed-BioMed, not with PyTorch

    return SummaryWriter(folder / CURVES_FOLDER)
