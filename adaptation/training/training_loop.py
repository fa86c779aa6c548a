"""One loop for everything that is trained at a site on its own: seeded updates, best states, resuming, curves."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...common.progress import track
from ...common.seeding import seed_of, seeded
from ...common.weights_file import load_strictly, read_weights, write_weights
from ...errors import CheckpointError, ConfigError, TrainingError

KIND = "unfinished training"
STATE = "unfinished.safetensors"
CURVES = "curves"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How training is watched. Raises: ConfigError if a value is out of range.

    Attributes:
        evaluations: how often states are validation, the last of them at the end.
        keep: best states that are returned.
        patience: evaluations without a better state after which training stops; 0 trains to the end.
        folder: where curves (TensorBoard) and the unfinished state are kept, to go on after an interruption; None
            keeps nothing.
    """

    evaluations: int = 5
    keep: int = 1
    patience: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1 or not 1 <= self.keep <= self.evaluations or self.patience < 0:
            raise ConfigError("evaluations must be positive, keep from 1 to evaluations, patience not negative")


@dataclass
class Kept:
    """A state that was validation: after how many updates, its score (higher is better) and the weights."""

    update: int
    score: float
    weights: dict[str, Tensor]


class Learner(ABC):
    """What the loop trains.

    Attributes:
        network: what is trained and kept.
        optimizers: of its parameters, each with its schedule or None.
        facts: what makes two runs the same, JSON-able: an unfinished run is only continued with the same.
    """

    network: nn.Module
    optimizers: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]]
    facts: dict[str, Any]

    @abstractmethod
    def update(self, number: int) -> dict[str, float]:
        """One training step, `number` from 0; everything random is seeded outside. Returns losses for the curves."""

    @abstractmethod
    def score(self) -> float:
        """How good the network is now, by what needs no label of the site; higher is better."""

    def modules(self) -> dict[str, nn.Module]:
        """All that has a state to be continued."""
        return {"network": self.network}


def train(learner: Learner, updates: int, config: LoopConfig, *, title: str, seed: int) -> list[Kept]:
    """Train, judge, keep the best.

    Every update has random numbers of its own, so that an interrupted run ends where an undisturbed one does.

    Returns: the best states, the best first. Raises: TrainingError if a loss becomes NaN or infinite; CheckpointError
    if the folder holds an unfinished run of something else.
    """
    evaluations = {round(updates * (number + 1) / config.evaluations) for number in range(config.evaluations)}
    done, kept, since = _continued(learner, config, updates)
    curves = _curves(config.folder)
    for number in track(range(done, updates), title):
        if config.patience and since >= config.patience:
            break
        with seeded(seed_of(seed, number)):
            losses = learner.update(number)
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        if bad:
            raise TrainingError(f"{title}: the loss '{bad[0]}' is {losses[bad[0]]} at update {number}")
        for name, value in losses.items():
            curves.add_scalar(name, value, number)
        if number + 1 not in evaluations:
            continue
        score = learner.score()
        curves.add_scalar("score", score, number)
        weights = {name: tensor.detach().clone() for name, tensor in learner.network.state_dict().items()}
        best = max((one.score for one in kept), default=-np.inf)
        since = 0 if score > best else since + 1
        kept = sorted([*kept, Kept(number + 1, score, weights)], key=lambda one: (-one.score, -one.update))
        kept = kept[: config.keep]
        if config.folder is not None and number + 1 < updates:
            _save(learner, config.folder / STATE, number + 1, updates, kept, since)
    curves.close()
    if config.folder is not None:
        for path in (config.folder / STATE, (config.folder / STATE).with_suffix(".json")):
            path.unlink(missing_ok=True)
    return kept


def one_cycle(optimizer: torch.optim.Optimizer, updates: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up to the optimizer's rate and down again over the whole training."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=max(2, updates))


def _save(learner: Learner, path: Path, done: int, updates: int, kept: list[Kept], since: int) -> None:
    tensors: dict[str, Tensor] = {}
    for prefix, module in learner.modules().items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    for number, (optimizer, _) in enumerate(learner.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    for number, one in enumerate(kept):
        tensors |= {f"kept{number}.{name}": tensor for name, tensor in one.weights.items()}
    card = {"kind": KIND, "facts": _fingerprint(learner), "done": done, "updates": updates, "since": since}
    card["kept"] = [[one.update, one.score] for one in kept]
    write_weights(path, tensors, card)


def _continued(learner: Learner, config: LoopConfig, updates: int) -> tuple[int, list[Kept], int]:
    """Updates done, states kept and evaluations without improvement, of an unfinished run in the folder."""
    if config.folder is None or not (config.folder / STATE).is_file():
        return 0, [], 0
    path = config.folder / STATE
    tensors, card = read_weights(path, kind=KIND)
    if (card["facts"], card["updates"]) != (_fingerprint(learner), updates):
        raise CheckpointError(f"{path}: an unfinished training with other data or settings; remove it to begin anew")

    def own(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    for prefix, module in learner.modules().items():
        load_strictly(module, own(f"{prefix}."), path)
    for number, (optimizer, schedule) in enumerate(learner.optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in own(f"optimizer{number}.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        with warnings.catch_warnings():  # the schedule is taken to its place before the optimizer's first step
            warnings.simplefilter("ignore")
            for _ in range(card["done"] if schedule is not None else 0):
                schedule.step()
    kept = [Kept(update, score, own(f"kept{number}.")) for number, (update, score) in enumerate(card["kept"])]
    return card["done"], kept, card["since"]


def _fingerprint(learner: Learner) -> str:
    return hashlib.sha256(json.dumps(learner.facts, sort_keys=True).encode()).hexdigest()


class _NoCurves:
    def add_scalar(self, *_: object) -> None: ...
    def close(self) -> None: ...


def _curves(folder: Path | None) -> Any:
    if folder is None:
        return _NoCurves()
    from torch.utils.tensorboard import SummaryWriter  # comes with Fed-BioMed, not with PyTorch

    return SummaryWriter(folder / CURVES)
