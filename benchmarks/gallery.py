"""The gallery of the documentation: the pictures of a demonstration as files, and the page that shows them.

    uv run fedfactory demo --out demo
    uv run python benchmarks/gallery.py demo --page docs/gallery.md

The subjects are simulated. Pictures of patients, including those of public data sets, do not belong in a repository.
The first command takes about seven minutes on two CPU cores, the second a few seconds.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from fedfactory.imaging.overlays import strip
from fedfactory.imaging.volume_files import read_volume
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = 64  # per picture
METHODS = {"reference": None, "no adaptation": "no_adaptation", "augmentation only": "augmentation_only"}
METHODS |= {"adapted": "adapted", "oracle": "oracle"}
REPORT_PICTURES = {
    "slices": "Real slices of held-out subjects, and synthetic ones: one latent in every domain",
    "volume": "A synthetic volume and the labels that the factory drew with it, in three planes",
    "curves": "Losses by round and site",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that `fedfactory demo` wrote")
    parser.add_argument("--page", type=Path, required=True, help="page; pictures go to the folder `pictures` beside it")
    arguments = parser.parse_args()
    result = json.loads((arguments.demo / "results.json").read_text(encoding="utf-8"))
    folder = arguments.page.parent / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Pictures of a demonstration",
        "",
        f"Made by `fedfactory demo` (seed {result['seed']}) and `benchmarks/gallery.py`. Subjects are simulated from "
        "the MNI152 template, 32 pixels a side; pictures of patients do not belong in a repository.",
    ]
    for name, data in zip(REPORT_PICTURES, pictures_of(arguments.demo / "report.html"), strict=True):
        save(Image.open(io.BytesIO(data)), folder / f"gallery_{name}.png")
        lines += ["", f"## {REPORT_PICTURES[name]}", "", f"![{REPORT_PICTURES[name]}](pictures/gallery_{name}.png)"]
    for site, dice in list(result["dice"].items())[1:]:  # the first site has labels
        save(label_maps(arguments.demo, site), folder / f"gallery_{site}.png")
        scores = ", ".join(f"{name} {dice[key]:.2f}" for name, key in METHODS.items() if key)
        title = f"Label maps of a held-out subject of {site}"
        lines += ["", f"## {title}", "", f"Mean foreground Dice of all held-out subjects there: {scores}.", ""]
        lines += [f"![{title}](pictures/gallery_{site}.png)"]
    arguments.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pictures_of(report: Path) -> list[bytes]:
    """The PNG files that a page embeds, in their order."""
    text = report.read_text(encoding="utf-8")
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


def label_maps(demo: Path, site: str) -> Image.Image:
    """A picture of the first held-out subject: a row of slices for the reference and for each segmenter."""
    case = sorted((demo / "sites" / site / "test").iterdir())[0]
    image, reference = (read_volume(next((case / kind).glob("*.nii.gz"))) for kind in ("image", "label"))
    rows = []
    for method in METHODS.values():
        labels = reference
        if method is not None:
            labels = read_volume(next((demo / "predictions" / site / method).rglob(f"*{case.name}*.nii.gz")))
        rows.append(strip(image.data, labels.data.astype(np.uint8)))
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.75 * len(rows)))
    for axis, row, name in zip(axes, rows, METHODS, strict=True):
        axis.imshow(row, interpolation="nearest")
        axis.set_ylabel(name, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return Image.open(buffer)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with few colours, because a repository keeps every file in its history."""
    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
