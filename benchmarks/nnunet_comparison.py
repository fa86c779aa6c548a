"""nnU-Net's own 2-D trainer on the labels of one site, for a given number of CPU minutes.

Run it in an environment that has nnunetv2 (it needs nothing of fedfactory), then score its label maps:

    python benchmarks/nnunet_comparison.py --site FOLDER/site_b --cpu-minutes 9 --work nnunet --out nnunet/labels
    uv run fedfactory evaluate nnunet/labels FOLDER/site_b/test --patient-pattern 'patient[0-9]+' --out nnunet.csv

The site's folder has train and test cases in Fed-BioMed's layout. Plan, network, augmentation, loss, optimizer and
prediction are nnU-Net's. Two things differ, because its 250,000 updates would take weeks here: the polynomial schedule
ends when the minutes are over, and no case is held out of the training (fold "all"). An update is timed first, and the
number of updates follows from it. CPU time is that of this process and its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_n_proc_DA", "1")
os.environ.setdefault("nnUNet_compile", "f")
DATASET = "Dataset001_Site"
EPOCHS = 10  # in which the minutes are spent; the learning rate falls from each to the next
TIMED = 3  # updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, help="folder with train and test")
    parser.add_argument("--cpu-minutes", type=float, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the label maps of the test cases")
    arguments = parser.parse_args()
    folders = {name: (arguments.work / name).resolve() for name in ("raw", "preprocessed", "results")}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    classes = write_dataset(arguments.site, folders["raw"] / DATASET)

    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    preprocess([1], configurations=("2d",), num_processes=(1,))
    facts = train(folders["preprocessed"] / DATASET, cpu_minutes=arguments.cpu_minutes, seed=arguments.seed)
    model = folders["results"] / DATASET / "nnUNetTrainer__nnUNetPlans__2d"
    predict(model, folders["raw"] / DATASET / "imagesTs", arguments.out)
    facts_file = arguments.out.with_name(f"{arguments.out.name}.json")
    facts_file.write_text(json.dumps({**facts, "classes": classes, "seed": arguments.seed}, indent=2))
    print(facts)


def write_dataset(site: Path, out: Path) -> int:
    """Copy a site's cases into nnU-Net's raw layout; returns the number of label values."""
    import nibabel
    import numpy as np

    shutil.rmtree(out, ignore_errors=True)
    highest = 0
    for part, images, labels in (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        for folder in (images, labels):
            (out / folder).mkdir(parents=True)
        for case in sorted((site / part).iterdir()):
            image, label = (next((case / kind).glob("*.nii.gz")) for kind in ("image", "label"))
            shutil.copyfile(image, out / images / f"{case.name}_0000.nii.gz")
            shutil.copyfile(label, out / labels / f"{case.name}.nii.gz")
            highest = max(highest, int(np.asarray(nibabel.load(label).dataobj).max()))
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **{f"structure {value}": value for value in range(1, highest + 1)}},
        "numTraining": len(list((out / "imagesTr").iterdir())),
        "file_ending": ".nii.gz",
    }
    (out / "dataset.json").write_text(json.dumps(content))
    return highest + 1


def cpu_seconds() -> float:
    """CPU time of this process and of its finished workers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def train(folder: Path, *, cpu_minutes: float, seed: int) -> dict[str, float]:
    """Train nnU-Net's 2-D configuration; returns updates, CPU and wall seconds, patch and batch."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.manual_seed(seed)
    np.random.seed(seed)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())

    def trainer(epochs: int, updates: int) -> nnUNetTrainer:
        started = {**plans, "continue_training": False}  # the trainer of nnU-Net 2.8 takes this entry out
        made = nnUNetTrainer(started, "2d", "all", dataset, device=torch.device("cpu"))
        made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = epochs, updates, 1
        made.disable_checkpointing = False
        return made

    began = cpu_seconds()
    trainer(1, TIMED).run_training()
    timed = (cpu_seconds() - began) / TIMED  # start and validation are in it: the estimate is on the safe side
    updates = max(1, int(60 * cpu_minutes / timed / EPOCHS))
    began, wall = cpu_seconds(), time.monotonic()
    trainer(EPOCHS, updates).run_training()
    configuration = plans["configurations"]["2d"]
    return {
        "updates": EPOCHS * updates,
        "cpu_seconds": round(cpu_seconds() - began, 1),
        "seconds": round(time.monotonic() - wall, 1),
        "patch": configuration["patch_size"],
        "batch": configuration["batch_size"],
    }


def predict(model: Path, images: Path, out: Path) -> None:
    """Write label maps of all images by the final state, with nnU-Net's mirrored views."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",), "checkpoint_final.pth")
    out.mkdir(parents=True)
    predictor.predict_from_files(
        str(images), str(out), num_processes_preprocessing=1, num_processes_segmentation_export=1
    )


if __name__ == "__main__":
    main()
