"""The documentation's gallery: pictures of a demonstration, as files, and the page that shows them.

    uv run fedfactory demo --out demo
    uv run python benchmarks/gallery.py demo --page docs/gallery.md

Subjects are simulated: pictures of patients, also of those whose data may be downloaded, stay out of a repository.
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

COLOURS = 64  # of a picture
SHOWN = {"reference": None, "no adaptation": "no_adaptation", "augmentation only": "augmentation_only"}
SHOWN |= {"adapted": "adapted", "oracle": "oracle"}
OF_REPORT = {
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
    for name, data in zip(OF_REPORT, pictures_of(arguments.demo / "report.html"), strict=True):
        save(Image.open(io.BytesIO(data)), folder / f"gallery_{name}.png")
        lines += ["", f"## {OF_REPORT[name]}", "", f"![{OF_REPORT[name]}](pictures/gallery_{name}.png)"]
    for site, dice in list(result["dice"].items())[1:]:  # the first one is labelled
        save(label_maps(arguments.demo, site), folder / f"gallery_{site}.png")
        told = ", ".join(f"{name} {dice[key]:.2f}" for name, key in SHOWN.items() if key)
        title = f"Label maps of a held-out subject of {site}"
        lines += ["", f"## {title}", "", f"Mean foreground Dice of all held-out subjects there: {told}.", ""]
        lines += [f"![{title}](pictures/gallery_{site}.png)"]
    arguments.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pictures_of(report: Path) -> list[bytes]:
    """PNG files within a page."""
    text = report.read_text(encoding="utf-8")
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


def label_maps(demo: Path, site: str) -> Image.Image:
    """Slices of the first held-out subject, a row for the reference and each segmenter."""
    case = sorted((demo / "sites" / site / "test").iterdir())[0]
    image, reference = (read_volume(next((case / kind).glob("*.nii.gz"))) for kind in ("image", "label"))
    rows = []
    for method in SHOWN.values():
        found = reference
        if method is not None:
            found = read_volume(next((demo / "predictions" / site / method).rglob(f"*{case.name}*.nii.gz")))
        rows.append(strip(image.data, found.data.astype(np.uint8)))
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.75 * len(rows)))
    for axis, row, name in zip(axes, rows, SHOWN, strict=True):
        axis.imshow(row, interpolation="nearest")
        axis.set_ylabel(name, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return Image.open(buffer)


def save(picture: Image.Image, path: Path) -> None:
    """With few colours: files in a repository are there for ever."""
    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
