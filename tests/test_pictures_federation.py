"""Colour pictures and images of four channels with real nodes: from folders of files to label maps and scores."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labels.fixations import simulate_fixations
from fedfactory.adaptation.labels.weak_labels import weaken
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.cli import main
from fedfactory.generative import FactoryConfig
from fedfactory.imaging.pictures.decoding import read_picture, write_picture
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import label_factory
from fedfactory.node.store.slice_store import SliceStore
from helpers import DOMAINS, SITES, ball_volume, small_config
from PIL import Image

PICTURES, FOUR_CHANNELS = "colour-pictures", "four-channels"  # tags
KINDS = {"bright": "dense", "dark": "gaze", "west": "box"}  # labels of each site
NAMES = {1: "polyp", 2: "tool"}
SIZE = (40, 56)  # rows and columns of a picture
# Ground, polyp and tool of equal luminance, so that they differ in nothing but their colour.
COLOURS = np.array([[110, 110, 110], [200, 70, 80], [60, 115, 218]])
BRIGHTNESS = {"bright": 1.0, "dark": 0.6, "west": 0.7}
TRAINING, TEST = range(4), range(4, 6)  # numbers of each site's pictures
CHANNELS = 4
OPTIONS = {
    "fedicra": ["body_share=0.5", "adaptive_from=2"],
    "fedmix": [],
    "gaze": [],
    "hssf": ["public_epochs=1", "warmup=0.0"],
}
# A single process runs command after command. If "repeat" is given, those that fail, as they await an approval, are
# repeated when the nodes have given it.
DRIVER = """
import json, sys, time
from pathlib import Path
from fedfactory.cli import main
folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
def ran(words):
    try:
        main(words)
    except SystemExit as ended:
        return not ended.code
awaited = [words for words in commands if not ran(words)]
if awaited and sys.argv[3:] == ["repeat"]:
    (folder / "asked").touch()
    while not (folder / "go").exists():
        time.sleep(0.2)
    awaited = [words for words in awaited if not ran(words)]
sys.exit(int(bool(awaited)))
"""


def call(*words) -> None:
    """A command of fedfactory, in this process."""
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        assert not ended.code


def scene(number: int, brightness: float) -> tuple[np.ndarray, np.ndarray]:
    """A picture (rows, columns, 3) of a round polyp and a square tool, and their labels (rows, columns)."""
    rng = np.random.default_rng(number)
    rows, columns = np.indices(SIZE)
    labels = np.zeros(SIZE, np.uint8)
    centre = rng.integers((11, 11), (29, 19))
    labels[np.hypot(rows - centre[0], columns - centre[1]) < 8] = 1
    row, column = rng.integers((4, 34), (22, 40))
    labels[row : row + 14, column : column + 12] = 2
    pixels = COLOURS[labels] * brightness + rng.normal(0, 5, (*SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8), labels


def write_gaze(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["CURRENT_FIX_X", "CURRENT_FIX_Y", "CURRENT_FIX_DURATION"])
        for row, column, ms in simulate_fixations(labels > 0, np.random.default_rng(0)):
            writer.writerow([(column + 0.5) / SIZE[1], (row + 0.5) / SIZE[0], ms])


def write_training_pictures(folder: Path, site: str) -> None:
    """Each site has another layout and other labels."""
    for number in TRAINING:
        pixels, labels = scene(number + 10 * len(site), BRIGHTNESS[site])
        name = f"case{number}"
        if site == "bright":
            write_picture(folder / "images" / f"{name}.png", pixels)
            write_picture(folder / "masks" / f"{name}.png", labels)
        elif site == "dark":
            write_picture(folder / name / "image" / "frame.png", pixels)
            write_gaze(folder / name / "label" / "gaze.csv", labels)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)
            write_picture(folder / f"{name}_mask.png", weaken(labels[..., None], "box", seed=0)[..., 0])


def prepare_pictures(folder: Path, site: str) -> Path:
    """The slice store of a site: weakly labelled training pictures, and test pictures with masks."""
    store, training, test = folder / f"{site}.store", folder / site, folder / f"{site}-test"
    write_training_pictures(training, site)
    for number in TEST:
        pixels, labels = scene(number + 10 * len(site), BRIGHTNESS[site])
        write_picture(test / "images" / f"case{number}.png", pixels)
        write_picture(test / "masks" / f"case{number}.png", labels)
    words = ["--out", store, "--domain", SITES[site], "--size", 32, "--class-names", "1=polyp,2=tool", "--workers", 1]
    call("prepare", training, *words, "--label-kind", KINDS[site], "--split", "train")
    call("prepare", test, *words, "--split", "test")
    if KINDS[site] == "gaze":
        call("gaze", store)
    return store


def channels_of(volume: Volume) -> list[Volume]:
    """Four images that show the same volume in other ways."""
    gains = np.linspace(1.0, -0.8, CHANNELS)
    return [Volume((gain * volume.data).astype(np.float32), volume.affine) for gain in gains]


def prepare_channels(folder: Path, site: str) -> Path:
    """The slice store of a site with an nnU-Net data set of four channels."""
    source, store = folder / f"{site}-nnunet", folder / f"{site}-nnunet.store"
    for number in range(3):
        image, label = ball_volume(seed=number)
        for channel, volume in enumerate(channels_of(image)):
            write_volume(source / "imagesTr" / f"case{number}_{channel:04d}.nii.gz", volume)
        write_volume(source / "labelsTr" / f"case{number}.nii.gz", label)
    (source / "dataset.json").write_text(json.dumps({"channel_names": dict(enumerate("abcd"))}))
    words = ["--out", store, "--domain", SITES[site], "--size", 16, "--z-bins", 4, "--workers", 1]
    call("prepare", source, *words, "--class-names", "1=shell,2=core", "--split", "train")
    return store


@pytest.fixture(scope="module")
def runs(approved, tmp_path_factory):
    """Every method and both factories once, at the federation's nodes: folders of the results and of the stores."""
    out = tmp_path_factory.mktemp("pictures")
    stores = {site: prepare_pictures(out, site) for site in SITES}
    several = {site: prepare_channels(out, site) for site in DOMAINS}
    add = {
        site: [["--store", store, "--tag", PICTURES, "--public", stores["bright"]]] for site, store in stores.items()
    }
    for site, store in several.items():
        add[site].append(["--store", store, "--tag", FOUR_CHANNELS])
    registrations = {
        site: [["site", "add", approved.nodes[site], *words] for words in commands] for site, commands in add.items()
    }
    approved.run_together("add-pictures", {site: driver(out, commands) for site, commands in registrations.items()})

    common = {"domains": DOMAINS, "channels": (8, 8, 8), "latent_dim": 8, "batch_size": 4, "r1_every": 2}
    configs = {
        "factory": FactoryConfig(**common, image_size=32, image_channels=3, z_bins=1),
        "four": FactoryConfig(**{**common, "channels": (8, 8)}, image_size=16, image_channels=CHANNELS, z_bins=4),
    }
    commands = []
    for name, tag, sites in (("factory", PICTURES, 3), ("four", FOUR_CHANNELS, 2)):
        (out / f"{name}.json").write_text(json.dumps(configs[name].to_dict()))
        words = ["train", "--tag", tag, "--config", out / f"{name}.json", "--out", out / name, "--min-nodes", sites]
        commands.append([*words, "--rounds", 2, "--updates-per-round", 3])
    for name, options in OPTIONS.items():
        words = ["train-segmenter", "--method", name, "--tag", PICTURES, "--out", out / name, "--min-nodes", 3]
        words += ["--rounds", 2, "--updates-per-round", 6, "--batch-size", 4, "--width", 8]
        words += [word for option in options for word in ("--option", option)]
        commands.append([*words, *(["--public", stores["bright"]] if name == "hssf" else [])])
    commands = [[*words, "--researcher", approved.researcher] for words in commands]
    with (out / "log").open("wb") as log:
        run = subprocess.Popen([*driver(out, commands), "repeat"], stdout=log, stderr=log, env=approved._environment())
        while run.poll() is None and not (out / "asked").exists():
            time.sleep(0.2)
        if run.poll() is None:
            nodes = approved.nodes.items()
            approve = {site: approved.site_command("approve", str(path), "--yes") for site, path in nodes}
            approved.run_together("approve-pictures", approve)
            (out / "go").touch()
        assert run.wait(300) == 0, (out / "log").read_text()
    return SimpleNamespace(folder=out, stores=stores, several=several, configs=configs)


def driver(folder: Path, commands: list[list]) -> list[str]:
    """Command line of one process that runs all these commands."""
    words = [[str(word) for word in command] for command in commands]
    return [sys.executable, "-c", DRIVER, str(folder), json.dumps(words)]


@pytest.mark.parametrize("site", SITES)
def test_stores_of_pictures_keep_their_colours(runs, site):
    store = SliceStore(runs.stores[site])
    assert store.images.shape == (6, 3, 32, 32) and store.format.colour and store.format.pictures
    assert store.class_names == NAMES
    assert store.label_kinds()[KINDS[site]] == len(TRAINING)


def test_colours_keep_their_order_from_the_files_to_the_slices(runs):
    for site in ("bright", "west"):  # with labels of every pixel; a box is larger than its structure
        store = SliceStore(runs.stores[site])
        red, _, blue = np.moveaxis(store.images[store.slices("test")].astype(np.float32), 1, 0)
        labels = store.labels[store.slices("test")]
        assert (red - blue)[labels == 1].mean() > 0.3
        assert (red - blue)[labels == 2].mean() < -0.3


@pytest.mark.parametrize("name", OPTIONS)
def test_every_site_gets_segmenters_for_colour_pictures(runs, name):
    for site, domain in SITES.items():
        folder = runs.stores[site].with_name(f"{site}.store.segmenters")
        for which in ("own",) if name == "hssf" else ("own", "global"):
            made = Segmenter.load(folder / f"{domain}_{name}_{which}.safetensors")
            method = made.card.federated.method
            assert (method.channels, method.colour, made.classes) == (3, True, 3)
            assert made.format == SliceStore(runs.stores[site]).format
            assert made.card.names == NAMES
    if name == "hssf":
        server = Segmenter.load(runs.folder / name / "server.safetensors")
        assert server.format.colour and server.card.names == NAMES


@pytest.mark.parametrize("name", OPTIONS)
def test_a_site_scores_its_test_pictures_as_segment_and_evaluate_do(runs, name, tmp_path):
    result = json.loads((runs.folder / name / "results.json").read_text())
    rows = {row["node_name"]: row for row in result["sites"].values()}
    assert set(rows) == set(SITES)
    if name in ("fedicra", "fedmix"):  # the others have found nothing yet, after a dozen updates
        assert rows["bright"]["own_dice"] > 0.2
    for site in ("bright", "dark"):
        model = runs.stores[site].with_name(f"{site}.store.segmenters") / f"{SITES[site]}_{name}_own.safetensors"
        scores = segmented_and_scored(runs, site, [model], tmp_path / site)
        for value, label in NAMES.items():
            of_class = [row for row in scores if row["name"] == label]
            assert len(of_class) == len(TEST)
            assert all(row["unit"] == "px" and 0 <= float(row["iou"]) <= float(row["dice"]) for row in of_class)
            for measure in ("dice", "hd95"):  # of the slices in the store, which are rounded to float16
                found = np.array([float(row[measure]) for row in of_class])
                found = found[np.isfinite(found)]
                if len(found):
                    assert rows[site][f"own_{measure}_{value}"] == pytest.approx(found.mean(), rel=0.05, abs=0.01)
                else:
                    assert f"own_{measure}_{value}" not in rows[site]


def segmented_and_scored(runs, site: str, models: list[Path], out: Path) -> list[dict[str, str]]:
    """The rows of the table of scores of a site's test pictures; label maps are PNG files on the pictures' own grid."""
    test = runs.folder / f"{site}-test"
    maps = segment([test / "images"], models, out / "maps")
    assert [path.name for path in maps] == [f"case{number}.png" for number in TEST]
    for path in maps:
        labels = read_picture(path)
        assert labels.shape == (*SIZE, 1) and labels.max() <= max(NAMES)
    call("evaluate", out / "maps", test / "masks", "--out", out / "s.csv", "--class-names", "1=polyp,2=tool", "--check")
    with (out / "s.csv").open() as file:
        return list(csv.DictReader(file))


def labelled_by(runs, name: str, store: Path, out: Path) -> LabelledFactory:
    """The factory of a run, exported, and labelled at a site with labels; its file is `out`."""
    call("export", runs.folder / name, "--out", out.with_name("factory.safetensors"))
    config = small_config(updates=3)
    return label_factory(out.with_name("factory.safetensors"), store, out, branch_updates=3, keep=1, config=config)


def test_a_factory_of_pictures_gives_the_other_site_a_segmenter(runs, tmp_path):
    made = labelled_by(runs, "factory", runs.stores["bright"], tmp_path / "labelled.safetensors")
    config = made.factory.config
    assert (config.image_channels, config.z_bins) == (3, 1) and config == runs.configs["factory"]
    assert made.factory.facts.rounds == 2
    preview = read_picture(runs.folder / "factory" / "previews" / "round_0002.png")
    assert preview.shape[2] == 3 and (preview[..., 0] != preview[..., 2]).any()

    words = ["--factory", tmp_path / "labelled.safetensors", "--domain", "dark", "--n-volumes", 3, "--workers", 1]
    call("generate-volumes", *words, "--layout", "images", "--out", tmp_path / "drawn")
    for number in range(3):
        pixels, labels = (
            read_picture(tmp_path / "drawn" / part / f"synthetic_{number:04d}.png") for part in ("images", "masks")
        )
        assert pixels.shape == (32, 32, 3) and labels.shape == (32, 32, 1) and labels.max() <= max(NAMES)
    call("prepare", tmp_path / "drawn", "--out", tmp_path / "s", "--domain", "dark", "--size", 32, "--workers", 1)
    assert SliceStore(tmp_path / "s").images.shape == (3, 3, 32, 32)  # the layout is one that sites may have

    models = adapted(runs.stores["dark"], ["--factory", tmp_path / "labelled.safetensors", "--volumes", 3], tmp_path)
    models += adapted(runs.stores["dark"], ["--synthetic", tmp_path / "drawn"], tmp_path)
    for model in models:
        card = Segmenter.load(model).card
        assert card.plan.colour and card.plan.channels == 3 and card.names == NAMES
    assert len(segmented_and_scored(runs, "dark", models, tmp_path)) == len(NAMES) * len(TEST)

    words = ["--factory", tmp_path / "labelled.safetensors", "--store", runs.stores["bright"], "--volumes", 3]
    call("audit", *words, "--out", tmp_path / "audit")
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["findings"]  # six updates are no training


def adapted(store: Path, source: list, folder: Path) -> list[Path]:
    """The file of a segmenter that a site got from this source."""
    model = folder / f"{source[0].strip('-')}.safetensors"
    call("adapt", "--store", store, *source, "--out", model, "--updates", 3, "--size-of-network", "small")
    return [model]


def test_a_factory_of_four_channels_gives_the_other_site_a_segmenter(runs, tmp_path):
    made = labelled_by(runs, "four", runs.several["bright"], tmp_path / "labelled.safetensors")
    assert made.factory.config == runs.configs["four"]
    words = ["--factory", tmp_path / "labelled.safetensors", "--domain", "dark", "--n-volumes", 2, "--workers", 1]
    call("generate-volumes", *words, "--layout", "nnunet", "--out", tmp_path / "nnunet")
    assert len(list((tmp_path / "nnunet" / "imagesTr").iterdir())) == 2 * CHANNELS
    described = json.loads((tmp_path / "nnunet" / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "shell": 1, "core": 2}
    call("generate-volumes", *words, "--out", tmp_path / "drawn")

    models = adapted(runs.several["dark"], ["--factory", tmp_path / "labelled.safetensors", "--volumes", 2], tmp_path)
    models += adapted(runs.several["dark"], ["--synthetic", tmp_path / "drawn"], tmp_path)
    for model in models:
        card = Segmenter.load(model).card
        assert card.plan.channels == CHANNELS and not card.plan.colour and card.names == {1: "shell", 2: "core"}
    source = runs.folder / "dark-nnunet"
    maps = segment([source], models, tmp_path / "maps")
    assert [path.name for path in maps] == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]
    reference = read_volume(source / "labelsTr" / "case0.nii.gz", integer=True)
    found = read_volume(maps[0], integer=True)
    assert found.data.shape == reference.data.shape and np.allclose(found.affine, reference.affine)
