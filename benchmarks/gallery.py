"""The gallery of the documentation: the pictures of a demonstration's report as files, and the page that shows them.

    uv run fedfactory demo --out demo
    uv run python benchmarks/gallery.py demo --page docs/gallery.md

The subjects are simulated. Pictures of patients, including those of public data sets, do not belong in a repository.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
from pathlib import Path

from fedfactory.demo.report import ROW_NAMES
from PIL import Image

COLOURS = 64  # per picture
# File to what the report calls the picture, and the headline on the page.
PICTURES = {
    "held_out": (
        "held-out slices with contours, best and worst case",
        "Held-out subjects of the sites without labels: the best and the worst case after adaptation",
    ),
    "slices": (
        "real and synthetic slices per domain",
        "Real slices of held-out subjects, and synthetic ones: one latent in every domain",
    ),
    "pairs": (
        "synthetic slices of every domain, without and with contours of their labels",
        "Slices of every domain, and the labels that the factory draws with them",
    ),
    "volume": (
        "a synthetic volume and its labels in three planes",
        "A synthetic volume and the labels that the factory drew with it, in three planes",
    ),
    "curves": ("generator and discriminator loss per round and site", "Losses by round and site"),
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
        "",
        "Mean foreground Dice of the held-out subjects at the sites without labels:",
        "",
    ]
    for site, dice in list(result["dice"].items())[1:]:  # the first site has labels
        scores = ", ".join(f"{name.partition(':')[0]} {dice[method]:.2f}" for method, name in ROW_NAMES.items())
        lines.append(f"* {site}: {scores}")
    found = pictures_of(arguments.demo / "report.html")
    for name, (description, title) in PICTURES.items():
        save(Image.open(io.BytesIO(found[description])), folder / f"gallery_{name}.png")
        lines += ["", f"## {title}", "", f"![{title}](pictures/gallery_{name}.png)"]
    arguments.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pictures_of(report: Path) -> dict[str, bytes]:
    """Description to PNG file of the pictures that a page embeds."""
    text = report.read_text(encoding="utf-8")
    found = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', text)
    return {html.unescape(description): base64.b64decode(data) for description, data in found}


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with few colours, because a repository keeps every file in its history; rare colours, those of
    contours, are kept."""
    picture.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    main()
