"""What a malicious researcher learns of a site, and what its protection costs an honest study.

    uv run python benchmarks/attacks.py --out benchmarks/results/attacks.json

No data are needed; it takes about six minutes on one core. `tests/test_attacks.py` has small variants of the attacks,
by the same code.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from attacking import answered_layouts, correlations, guessed_labels, rebuilt_slice, smooth_anatomy, trained_slice
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_from_labels
from fedfactory.adaptation.methods.interface.site_round import SiteRound
from fedfactory.common.files import write_json
from fedfactory.imaging.volume_files import write_volume
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.site_secret import mixed_seed
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import SITE_SECRET, ball_volume, method_of, squares
from measuring import machine

WHOLE = (0, 32)
LIMITS = ((2, 2), (4, 4))  # least batch and least updates


def site_of(images: np.ndarray, labels: np.ndarray) -> SiteSlices:
    return SiteSlices(images, candidates_from_labels(labels, 3), np.array(["dense"] * len(images)), 3)


def own_seed(network: torch.nn.Module, number: object) -> int:
    """A seed as a guarded node makes it."""
    weights = b"".join(tensor.detach().numpy().tobytes() for tensor in network.state_dict().values())
    return mixed_seed(SITE_SECRET, hashlib.sha256(weights).hexdigest(), number)


def pixels(slices: int) -> dict[str, object]:
    """Correlations of a rebuilt slice for each way of protection.

    `attacked`: with the slice as it was trained on; `mean_slice`: with the mean of all slices, which any federation
    gives away. Without that mean: `attacked_beside_mean`; `own`, with the slice as it is in the store; and `others`,
    the mean of the absolute values over all slices, which is what chance gives.
    """
    images, labels = smooth_anatomy(slices)
    data = site_of(images, labels)
    target = trained_slice(data)

    def row(seeds, batch_size: int, updates: int) -> dict[str, float]:
        found = rebuilt_slice(data, region=WHOLE, seeds=seeds, batch_size=batch_size, updates=updates)
        others = np.abs(correlations(found, images, WHOLE))
        moved = correlations(found, images, WHOLE, of=target.augmented[None, None])
        values = {
            "attacked": np.corrcoef(found.ravel(), target.augmented.ravel())[0, 1],
            "mean_slice": np.corrcoef(found.ravel(), images[:, 0].mean(0).ravel())[0, 1],
            "attacked_beside_mean": moved[0],
            "own": others[target.number],
            "others": others.mean(),
        }
        return {name: round(abs(float(value)), 4) for name, value in values.items()}

    rows: dict[str, object] = {"unprotected": row(lambda network, query: None, 1, 1)}
    rows["secret seeds alone"] = row(own_seed, 1, 1)
    for batch_size, updates in LIMITS:
        rows[f"batch {batch_size}, updates {updates}"] = row(own_seed, batch_size, updates)
    return rows


def layouts(slices: int) -> dict[str, dict[str, float]]:
    """Correlation of the answers to 1,024 generators with the site's mean slices, and the number of answers."""
    images, _ = smooth_anatomy(slices, size=16)
    real = torch.from_numpy(images)
    z_bin = torch.from_numpy(np.random.default_rng(1).permutation(np.arange(slices) % 4))
    means = np.stack([images[z_bin.numpy() == value, 0].mean(0) for value in range(4)]).ravel()
    rows = {}
    for name, policy, patient in (
        ("unprotected", None, False),
        ("protected", Policy(), False),
        ("protected, rules known", Policy(), True),
    ):
        answers = answered_layouts(real, z_bin, policy=policy, patient=patient)
        found = np.array([answers.get(query, 0.0) for query in range(len(means))])
        learnt = abs(float(np.corrcoef(found, means)[0, 1])) if found.std() else 0.0
        rows[name] = {"answers": len(answers), "correlation": round(learnt, 4)}
    return rows


def labels() -> dict[str, float]:
    """Share of pixels of a test slice whose label the scoring rounds of one day tell; .5 is chance. Without protection,
    of 256 pixels, which are all answered."""
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), {"domain": "balls", "size": 32, "z_bins": 4}
        for number in range(4):
            image, label = ball_volume(shape=(32, 32, 6), radius=9.0, seed=number)
            case = folder / ("train" if number < 2 else "test") / f"case{number}"
            write_volume(case / "image" / "scan.nii.gz", image)
            write_volume(case / "label" / "mask.nii.gz", label)
        for split in ("train", "test"):
            store = prepare(folder / split, folder / "store", PrepareConfig(**config, split=split)).store
        ways = {"unprotected": (None, 128), "protected": (Policy(), None)}
        return {way: round(guessed_labels(store, policy, among=among), 4) for way, (policy, among) in ways.items()}


def honest_dice(*, seed: int, protected: bool, rounds: int, updates: int) -> float:
    """Mean Dice of fedavg of two sites on unseen slices, with seeds of the researcher or of the sites."""
    method = method_of("fedavg", seed=seed, updates=updates, rounds=rounds, sites=2)
    sites = [site_of(images[:, None], labels) for images, labels in (squares(24, seed=1), squares(24, seed=2))]
    model = method.build()
    kept = [method.optimizers(copy.deepcopy(model)).get("all").state_dict() for _ in sites]
    for number in range(1, rounds + 1):
        sent = []
        for index, data in enumerate(sites):
            own = copy.deepcopy(model)
            optimizers = method.optimizers(own)
            optimizers["all"].load_state_dict(kept[index])
            draws = own_seed(model, seed) if protected else None
            method.train_round(
                SiteRound(
                    model=own, optimizers=optimizers, data=data, site=index, number=number, seed=draws,
                    state=method.new_state(),
                )
            )  # fmt: skip
            kept[index] = optimizers["all"].state_dict()
            sent.append(own.state_dict())
        model.load_state_dict({name: sum(state[name] for state in sent) / len(sent) for name in sent[0]})
    images, labels = squares(40, seed=3)
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(images)[:, None]).argmax(1).numpy()
    return float(
        np.mean([2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum()) for k in (1, 2)])
    )


def honest(arguments: argparse.Namespace) -> dict[str, object]:
    """Dice by seed without and with protection, and the difference of the means."""
    settings = {"rounds": arguments.rounds, "updates": arguments.updates}
    dice = {
        name: [honest_dice(seed=seed, protected=name == "protected", **settings) for seed in arguments.seeds]
        for name in ("unprotected", "protected")
    }
    return dice | {"difference": float(np.mean(dice["protected"]) - np.mean(dice["unprotected"]))}


PARTS = {
    "labels": lambda arguments: labels(),
    "layouts": lambda arguments: layouts(arguments.slices),
    "pixels": lambda arguments: pixels(arguments.slices),
    "honest_dice": honest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="others stay as in the file")
    parser.add_argument("--slices", type=int, default=16, help="training slices of the attacked site")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    names = ("slices", "seeds", "rounds", "updates")
    result |= {"machine": machine("cpu"), **{name: getattr(arguments, name) for name in names}}
    for name in arguments.parts:
        began = time.monotonic()
        result[name] = PARTS[name](arguments)
        print(json.dumps({name: result[name], "seconds": round(time.monotonic() - began, 1)}), flush=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
