"""The commands of the documentation's pages, typed in a shell as they stand: `pytest -m tutorial`.

Only numbers are made smaller. Inputs have the names that the pages use, and one federation of three sites serves all
pages.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.adaptation.labels.weak_labels import weaken
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.demo.local_federation import READY, _free_port
from fedfactory.generative import load_factory
from fedfactory.imaging.pictures.decoding import write_picture
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from golden import filled_states, published_config
from helpers import ball_volume, fixate, processes_of, untrained_segmenter, write_dicom, write_site
from test_documentation import COMMANDS, ROOT, commands_of

pytestmark = pytest.mark.tutorial
ELSEWHERE = {
    "fedfactory demo",  # eight minutes; tests/test_federation.py runs a smaller demo
    "fedfactory watch experiment",  # serves until Ctrl-C; tests/test_watching.py looks at it
    "fedfactory site check node-c",  # a problem while no researcher listens; tests/test_connection.py
}
SMALLER = (
    # Pictures of vessels, whose preset becomes tiny.
    (r"--size 64(?= --label-kind none| --split train|$)", "--size 32"),
    (r"--preset small", "--preset tiny"),
    (r"^(fedfactory prepare (?!.*--(size|like)).*)", r"\1 --size 32"),
    (r"--rounds \d+", "--rounds 1"),
    (r"--nodes-per-round 2", "--nodes-per-round 3"),  # a pair drawn for a single round may leave out the third site
    (r"--updates-per-round \d+", ""),
    (r"^(fedfactory train(?:-segmenter)? .*)", r"\1 --updates-per-round 2"),
    (r"^(fedfactory train(?:-segmenter)? (?!.*--approval-timeout).*)", r"\1 --approval-timeout 400"),
    (r"^(fedfactory (adapt|adapt-remote|label) .*)", r"\1 --updates 3"),
    (r"^(fedfactory pseudo-label .*)", r"\1 --least-confidence 0"),
    (r"^(fedfactory train-localiser .*)", r"\1 --updates 120"),
    (r"--n-volumes \d+", "--n-volumes 2"),
    (r"^(fedfactory site approve .*)", r"\1 --wait 300"),
)
typed: set[str] = set()


class Town:
    """A folder in which commands are typed, and the processes that they leave running."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running, self.known = folder, [], set()
        port = str(_free_port())
        own = {key: value for key, value in os.environ.items() if not key.startswith("FBM_")}
        self.environment = {
            **own,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}",
            "FBM_SERVER_HOST": "localhost",
            "FBM_SERVER_PORT": port,
            "FBM_RESEARCHER_IP": "localhost",
            "FBM_RESEARCHER_PORT": port,
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def type(self, line: str) -> str:
        """What a command prints; fails the test if the command fails."""
        with self.beside(line) as log:
            pass
        return log.read_text()

    @contextmanager
    def beside(self, line: str) -> Iterator[Path]:
        """Start a command, answer its question with yes, run the block, wait for the command's end."""
        typed.add(line)
        log = self.folder / f"log{len(self.running):03d}"
        smaller = line
        for pattern, text in SMALLER:
            smaller = re.sub(pattern, text, smaller)
        with log.open("wb") as file:
            child = subprocess.Popen(
                ["bash", "-c", smaller], cwd=self.folder, env=self.environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.running.append(child)
        child.stdin.write(b"y\n")
        child.stdin.close()
        yield log
        assert child.wait(600) == 0, f"{smaller}\n{log.read_text()[-3000:]}"

    def start(self, line: str) -> None:
        """Start nodes and wait until they take requests."""
        typed.add(line)
        log = self.folder / f"log-nodes{len(self.running)}"
        with log.open("wb") as file:
            command = ["bash", "-c", f"{line}\nwait"]
            self.running.append(
                subprocess.Popen(
                    command, cwd=self.folder, env=self.environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        until = time.monotonic() + 180
        while log.read_bytes().count(READY) < line.count(" start"):
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)

    def approved(self, line: str, *sites: str, shows: str = "") -> str:
        """Type a researcher's command and approve its plan at these sites meanwhile.

        Plans of other runs may wait at a site too: only the text of the right plan contains `shows`. A site that has
        approved a plan with such a text is not asked again.
        """
        with self.beside(line) as log:
            for site in sites:
                while (site, shows) not in self.known and shows not in self.type(f"fedfactory site approve {site}"):
                    pass
                self.known |= {(site, shows)} if shows else set()
        return log.read_text()

    def put_aside(self, *names: str) -> None:
        """Move these files away, for a page that writes files of the same names."""
        aside = self.folder / "aside" / str(len(list(self.folder.glob("aside/*"))))
        aside.mkdir(parents=True)
        for name in names:
            for path in [self.folder / name, *self.folder.glob(f"{name}.*")]:
                if path.exists() or path.is_symlink():
                    path.rename(aside / path.name)

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self.running:
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    continue
            time.sleep(1)


def shell_lines(page: str) -> list[str]:
    """All indented commands of a page, Fed-BioMed's too."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text(encoding="utf-8"))
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if re.match(r"(FBM_\w+=\w+ )?fed(biomed|factory) ", line)]


def weak_site(folder: Path, kind: str) -> None:
    """Cases with weak labels; unlabelled pixels have the value 4."""
    for number in range(3):
        image, label = ball_volume(shape=(32, 32, 6), radius=9.0, seed=number)
        weak = weaken(label.data, kind, seed=number)
        weak[weak == UNLABELLED] = 4
        write_volume(folder / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(folder / f"case{number}" / "label" / "mask.nii.gz", Volume(weak, label.affine))


def store_of(source: Path, out: Path, domain: str, **options) -> Path:
    prepare(source, out, PrepareConfig(**{"domain": domain, "size": 32, "z_bins": 12, **options}))
    return out


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Two sites and a researcher on two terminals; a third site joins; then phase two at the first and the others.

    Follows the pages for researcher, federation and site administrator; only the factory of three sites is labelled.
    """
    town = Town(tmp_path_factory.mktemp("town"))
    for site, cases in (("a", 3), ("b", 4), ("c", 3)):
        write_site(town.folder / f"volumes-{site}", cases=cases)
    lines = shell_lines("docs/researcher.md")
    third = [line for line in shell_lines("docs/site-administrator.md") if line not in ELSEWHERE]
    (train_three,) = shell_lines("docs/federation.md")
    train, *approve = [line for line in lines if line.startswith(("fedfactory train", "fedfactory site approve"))]
    after = lines.index(approve[-1]) + 1
    joined = next(number for number, line in enumerate(third) if "site approve" in line)
    try:
        ledger = third[joined + 1 : -2]
        for line in [*lines[: lines.index(train)], train, *third[:joined], train_three, *ledger, *lines[after:]]:
            if " start" in line:
                town.start(line)
            elif line == train:
                town.approved(line, "node-a", "node-b")
            elif line == train_three:
                town.put_aside("experiment")
                town.approved(line, "node-c")
            else:
                town.type(line)
        yield town
    finally:
        town.stop()
        assert not processes_of(town.folder)


def test_two_sites_on_two_terminals_and_a_third_train_a_factory(town):
    assert load_factory(town.folder / "factory.safetensors").config.domains == ("t1", "t2", "pd")
    assert Segmenter.load(town.folder / "segmenter.safetensors").card.training.domain == "t2"
    assert len(list((town.folder / "found").rglob("*.nii.gz"))) == 4
    assert "FactoryPlan" in (town.folder / "ledger.html").read_text()


def test_an_administrator_adapts_and_inspects(town):
    town.put_aside("segmenter", "found")
    adapt, segment = shell_lines("docs/site-administrator.md")[-2:]
    town.type(adapt)
    town.type(segment)
    assert Segmenter.load(town.folder / "segmenter.safetensors").card.training.domain == "pd"
    assert list((town.folder / "found").rglob("*.png"))


def test_a_factory_that_draws_labels_is_made_in_the_order_of_its_page(town):
    guess, label, add, train, *rest = shell_lines("docs/drawn-labels.md")
    sites = ("node-a", "node-b", "node-c")
    town.approved(guess, *sites, shows='method_name = "fedavg"')
    assert "no annotations" in town.type(label)
    town.type(add)
    assert "pseudo-labels" in town.type("fedfactory sites --researcher researcher --tag brains --min-nodes 3")
    town.approved(train, *sites, shows="class LabelledFactoryPlan")
    for line in rest:
        town.type(line)
    assert load_factory(town.folder / "drawn.safetensors").config.pseudo_labels
    assert Segmenter.load(town.folder / "adapted.safetensors").card.training.domain == "t2"


def test_a_data_user_gets_volumes_for_nnunet_and_monai(town):
    town.put_aside("synthetic")
    for line in shell_lines("docs/data-user.md"):
        town.type(line)
    assert len(list((town.folder / "Dataset501_Synthetic" / "labelsTr").iterdir())) == 2
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data-user.md").read_text(encoding="utf-8"), re.S)
    (town.folder / "read.py").write_text(f"{code}\nfor batch in loader:\n    print(tuple(batch['label'].shape))\n")
    assert "(2, 1, 32, 32," in town.type("python read.py")


def test_a_site_adapts_segments_and_scores_and_so_does_a_researcher_remotely(town):
    town.put_aside("segmenter", "found")
    store_of(town.folder / "volumes-b", town.folder / "STORE", "t2", label_kind="none")
    for case in (town.folder / "volumes-b").iterdir():
        for kind, name in (("image", "scan"), ("label", "mask")):
            (town.folder / f"{kind}s").mkdir(exist_ok=True)
            shutil.copy(case / kind / f"{name}.nii.gz", town.folder / f"{kind}s" / f"{case.name}.nii.gz")
    *own, remote = shell_lines("docs/adapting.md")
    for line in own:
        town.type(line)
    assert (town.folder / "metrics.csv").read_text().count("\n") > 4
    town.approved(remote, "node-b")
    assert '"t2"' in (town.folder / "report.json").read_text()


def test_volumes_become_stores_that_agree(town):
    lines = [
        line for line in shell_lines("docs/preparing.md") if not re.search("--(series|label-values|original)", line)
    ]
    first, around, *localised, second = lines
    town.put_aside("VOLUMES", "store")
    write_site(town.folder / "VOLUMES")
    town.type(first)
    shutil.copy(town.folder / "store" / "format.json", town.folder / "format.json")
    town.put_aside("store")
    rows = "".join(f"case{number},30,36,20\n" for number in range(3))
    (town.folder / "centres.csv").write_text(f"case,x,y,z\n{rows}")
    town.type(around)
    assert SliceStore(town.folder / "store").format.field_of_view == 150
    town.put_aside("store", "centres", "found")
    for line in localised:
        town.type(line)
    assert (town.folder / "centres.csv").read_text().count("\n") == 4
    assert len(list((town.folder / "found").iterdir())) == 3
    town.put_aside("store")
    town.type(second)
    assert SliceStore(town.folder / "store").format.size == 256


def test_labels_of_two_kinds_and_a_method_for_them(town):
    weak_site(town.folder / "scribbled", "scribble")
    write_site(town.folder / "drawn", shape=(32, 32, 6))
    for case in list((town.folder / "drawn").iterdir()):
        case.rename(case.with_name(f"test-{case.name}"))
    town.put_aside("store", "run")
    methods, sites, train, *prepared, private = shell_lines("docs/segmentation.md")
    assert "fedicra" in town.type(methods)
    for line in prepared:
        town.type(line)
    assert SliceStore(town.folder / "store").label_kinds() == {"scribble": 18}  # to train with
    store_of(
        town.folder / "drawn", town.folder / "drawn.store", "b", z_bins=29
    )  # fedmix needs a site with dense labels
    town.type("fedfactory site add node-a --store store --tag hearts")
    town.type("fedfactory site add node-b --store drawn.store --tag hearts")
    shown = town.type(sites)  # fails if the sites do not agree
    assert re.search(r"fedmix +│ yes", shown) and re.search(r"gaze +│ no", shown)
    town.approved(train, "node-a", "node-b", shows='method_name = "fedmix"')
    assert "fedmix" in (town.folder / "run" / "results.json").read_text()
    town.put_aside("run")
    (readme,) = [line for line in commands_of(ROOT / "README.md") if "--method" in line]
    town.approved(readme, "node-a", "node-b", shows='method_name = "fedicra"')
    assert "fedicra" in (town.folder / "run" / "results.json").read_text()
    town.put_aside("run")
    for site in ("a", "b"):
        store_of(town.folder / "drawn", town.folder / f"dense-{site}.store", "b", z_bins=29)
        town.type(f"fedfactory site add node-{site} --store dense-{site}.store --tag private")
    town.approved(private, "node-a", "node-b", shows='method_name = "fedavg"')
    assert '"epsilon"' in (town.folder / "run" / "results.json").read_text()


@pytest.mark.parametrize("method", ["gaze", "hssf", "cmc"])
def test_a_method_with_a_page_of_its_own_runs_as_the_page_says(town, method):
    """Two sites run the commands in which the page has NODE and STORE."""
    town.put_aside("run", "STORE", "scans", "atlas", "NODE")
    lines = shell_lines(f"docs/{method}.md")
    last = next(number for number, line in enumerate(lines) if "train-segmenter" in line)
    before, train = lines[:last], lines[last]  # what follows is typed by the test of public pictures
    for name in ("atlas", "scans"):
        write_site(town.folder / name, shape=(32, 32, 6))
    if method == "gaze":
        fixate(town.folder / "scans")
    elif method == "hssf":
        store_of(town.folder / "volumes-b", town.folder / "STORE", "t2")
    else:
        store_of(town.folder / "volumes-a", town.folder / "CT.store", "ct")
        store_of(town.folder / "volumes-b", town.folder / "MRI.store", "mri")
    for line in before:
        if " NODE " not in line:
            town.type(line)
            continue
        for site in ("a", "b"):
            (town.folder / "NODE").unlink(missing_ok=True)
            (town.folder / "NODE").symlink_to(town.folder / f"node-{site}")
            town.type(line)
    town.approved(train, "node-a", "node-b", shows=f'method_name = "{method}"')
    assert method in (town.folder / "run" / "results.json").read_text()


def eyes(folder: Path, *names: str, masks: dict[str, tuple[int, ...]], seed: int = 0, count: int = 6) -> None:
    """Colour pictures of a disc with a brighter core, and their masks.

    Args:
        names: of the pictures, with {} for a number from 1 to `count`.
        masks: name of each mask, with {} for the number, and the value of background, disc and core in it.
    """
    rng = np.random.default_rng(seed)
    places = np.indices((40, 48)).astype(float)
    for number in range(1, 1 + count):
        middle = rng.uniform(16, 24, 2)
        distance = np.hypot(places[0] - middle[0], places[1] - middle[1])
        label = (distance < 11).astype(int) + (distance < 5)
        colours = np.array([[60, 30, 20], [150, 80, 60], [220, 190, 150]])[label] + rng.normal(0, 6, (40, 48, 3))
        files = {name: colours.clip(0, 255) for name in names}
        files |= {name: np.array(values)[label] for name, values in masks.items()}
        for name, pixels in files.items():
            path = folder / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_picture(path, pixels.astype(np.uint8))


def public_pictures(folder: Path) -> None:
    """Small pictures under the names, and in the layouts, of the data sets on the pages."""
    white = (0, 255, 255)
    for number, (name, pictures, masks) in enumerate((
        ("PICTURES", "images/patient{}_a.png", "masks/patient{}_a.png"),
        ("NEW", "images/new{}.png", "masks/new{}.png"),
        ("CVC-ClinicDB", "Original/{}.png", "Ground Truth/{}.png"),
        ("Kvasir-SEG", "images/cju{}.png", "masks/cju{}.png"),
        ("ETIS-LaribPolypDB", "images/{}.png", "masks/{}.png"),
        ("DRIVE/training", "images/{}_training.png", "1st_manual/{}_manual1.png"),
        ("CHASEDB1", "Image_{}L.png", "Image_{}L_1stHO.png"),
        ("Dataset_BUSI_with_GT", "benign/benign ({}).png", "benign/benign ({})_mask.png"),
        ("ISIC", "ISIC2018_Task1-2_Training_Input/ISIC_{}.png",
         "ISIC2018_Task1_Training_GroundTruth/ISIC_{}_segmentation.png"),
        ("BOXES", "images/box{}.png", "masks/box{}.png"),
    )):  # fmt: skip
        # A factory needs a batch of slices to train with, and some of CHASE_DB1's are held out.
        count = {"DRIVE/training": 18, "CHASEDB1": 28}.get(name, 6)
        eyes(folder / name, pictures, masks={masks: white}, seed=number, count=count)
    for name in ("FUNDUS", "REFUGE"):
        eyes(folder / name, "images/Glaucoma/g{}.png", masks={"masks/Glaucoma/g{}.png": (255, 128, 0)}, seed=20)
    eyes(
        folder / "EYES",
        "images/eye{}.png",
        masks={"masks/disc/eye{}.png": white, "masks/cup/eye{}.png": (0, 0, 255)},
        seed=21,
    )
    (folder / "colours.csv").write_text("VALUE,CLASS,NAME\n255,0,\n128,2,disc\n0,1,cup\n")
    rows = "".join(f"patient{number}_a,{number // 2}\n" for number in range(1, 7))
    (folder / "patients.csv").write_text(f"CASE,PATIENT\n{rows}")
    fixations = "".join(f"cju{n}.png,0.5,0.5,{ms}\n" for n in range(1, 7) for ms in (200, 300, 400))
    head = "IMAGE,CURRENT_FIX_X,CURRENT_FIX_Y,CURRENT_FIX_DURATION"
    (folder / "kvasir_fixation.csv").write_text(f"{head}\n{fixations}")


@pytest.fixture(scope="module")
def gallery(town):
    """The town with data sets of pictures."""
    public_pictures(town.folder)
    return town


def type_page(town: Town, lines: list[str]) -> None:
    """Type lines. The plans of those that train were approved at both sites by the tests above."""
    for line in lines:
        town.type(line)


@pytest.mark.parametrize("method", ["hssf", "gaze", "fedmix", "fedicra"])
def test_a_method_is_trained_on_the_public_pictures_of_its_page(gallery, method):
    lines = shell_lines(f"docs/{method}.md")
    code = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{method}.md").read_text(encoding="utf-8"), re.S)
    for number, text in enumerate(code):
        (gallery.folder / f"script{number}.py").write_text(text)
        gallery.type(f"python script{number}.py")
    trains = [number for number, line in enumerate(lines) if "train-segmenter" in line]
    type_page(gallery, lines[trains[0] + 1 :] if len(trains) > 1 else lines)
    (table,) = [line.split("--out ")[1].split()[0] for line in lines if "evaluate" in line]
    assert (gallery.folder / table).read_text().count("\n") > 6


def test_pictures_channels_and_labels_in_dicom_as_their_page_says(gallery):
    town, folder = gallery, gallery.folder
    town.put_aside("segmenter", "found", "synthetic")
    lines = shell_lines("docs/preparing-pictures.md")
    first = next(number for number, line in enumerate(lines) if " segment " in line)
    type_page(town, lines[:first])
    write_segmenter(folder / "pictures.store", folder / "segmenter.safetensors")
    channels = next(number for number, line in enumerate(lines) if "BRAINS" in line)
    type_page(town, lines[first:channels])
    assert len(list((folder / "found" / "contours").iterdir())) == 6
    assert len(list((folder / "synthetic-eyes" / "masks").iterdir())) == 2
    write_brains(folder)
    town.type(lines[channels])
    write_segmenter(folder / "mri.store", folder / "mri.safetensors")
    town.type(lines[channels + 1])
    assert [path.name for path in (folder / "found-mri").iterdir()] == ["new.nii.gz"]
    prepare_scans, segment_scans = lines[channels + 2 :]
    if find_spec("highdicom") is None:
        typed.update((prepare_scans, segment_scans))
        pytest.skip("labels in DICOM need fedfactory[dicom]")
    write_scans(folder / "SCANS")
    town.type(prepare_scans)
    write_segmenter(folder / "ct.store", folder / "ct.safetensors")
    town.type(segment_scans)
    assert len(list((folder / "found-ct").glob("*.dcm"))) == 3


def write_segmenter(store: Path, out: Path) -> None:
    """A segmenter for the slices of a store, with random weights."""
    data = SliceStore(store)
    fmt = data.format
    made = untrained_segmenter(channels=fmt.channels, colour=fmt.colour, window=fmt.size, classes=max(2, data.classes))
    Segmenter(made.network, fmt, replace(made.card, **data.card_entries)).save(out)


def write_brains(folder: Path) -> None:
    """Patients with three sequences, of which the last one lacks one, and the three files of a new patient."""
    for number in range(4):
        image, label = ball_volume(seed=number)
        for channel, name in enumerate(("t1", "t2", "flair")):
            if (number, name) == (3, "flair"):
                continue
            write_volume(folder / "BRAINS" / f"patient{number}" / name / "scan.nii.gz", image)
            if number == 0:
                write_volume(folder / f"new_{channel:04d}.nii.gz", image)
        write_volume(folder / "BRAINS" / f"patient{number}" / "label" / "seg.nii.gz", label)


def write_scans(folder: Path) -> None:
    """Three DICOM series with a DICOM segmentation each, whose classes have other numbers than the page gives them."""
    import pydicom
    from fedfactory.imaging.archive.segmentation_writer import write_segmentation
    from fedfactory.imaging.archive.series import find_series, read_series

    for number in range(3):
        case = folder / f"scan{number}"
        write_dicom(case / "image", ball_volume(seed=number)[0], patient=f"P{number}", uid=f"1.2.3.{number + 1}")
        for file in (case / "image").iterdir():
            header = pydicom.dcmread(file)
            header.FrameOfReferenceUID = "1.2.9"
            header.save_as(file)
        (files,) = find_series(case / "image").values()
        volume = read_series(files)
        labels = np.zeros(volume.data.shape, np.uint16)
        labels[4:9, 5:12, 2:5], labels[11:16, 5:12, 2:5] = 1, 2
        (case / "label").mkdir()
        names = {1: "Spleen", 2: "Liver"}
        write_segmentation(case / "label" / "seg.dcm", Volume(labels, volume.affine), files, names=names, algorithm="a")


def test_an_original_checkpoint_becomes_a_factory(town):
    generator, discriminator = filled_states(published_config())
    torch.save({"g": generator, "d": discriminator, "g_ema": generator}, town.folder / "final_global_model.pt")
    (line,) = [line for line in commands_of(ROOT / "README.md") if "import-checkpoint" in line]
    town.put_aside("factory")
    town.type(line)
    assert load_factory(town.folder / "factory.safetensors").config.domains == ("a", "b", "c")


def test_label_values_and_series_are_chosen_as_the_page_says(town):
    lines = shell_lines("docs/preparing.md")
    inline, table, original = (line for line in lines if "--label-values" in line or "--original-values" in line)
    largest, named = (line for line in lines if "--series" in line)
    town.put_aside("VOLUMES", "store", "found", "segmenter")
    for number in range(3):
        image, label = ball_volume(seed=number)
        other = Volume(np.array([0, 500, 205, 420], np.int16)[label.data], label.affine)
        write_volume(town.folder / "VOLUMES" / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(town.folder / "VOLUMES" / f"case{number}" / "label" / "mask.nii.gz", other)
    town.type(inline)
    town.put_aside("store")
    (town.folder / "values.json").write_text('{"205": 1, "420": 1, "500": 2}')
    town.type(table)
    write_segmenter(town.folder / "store", town.folder / "segmenter.safetensors")
    town.type(original)
    found = [read_volume(path, integer=True).data for path in (town.folder / "found").iterdir()]
    assert set(np.unique(found)) <= {0, 205, 500}
    assert np.max(found) > 2
    town.put_aside("VOLUMES", "store")
    for number in range(3):
        image, short = ball_volume(seed=number)[0], ball_volume((20, 24, 3), seed=number)[0]
        folder = town.folder / "VOLUMES" / f"case{number}" / "image"
        write_dicom(folder, image, patient=f"P{number}", uid=f"1.2.{number}.1", description="T1 3D AXIAL")
        write_dicom(folder, short, patient=f"P{number}", uid=f"1.2.{number}.2", description="localizer")
    for line in (largest, named):
        assert "3 cases" in town.type(line)
        assert len(SliceStore(town.folder / "store")) == 24
        town.put_aside("store")


def test_every_command_of_the_documentation_was_typed(town):
    """The last test of the file, which runs as a whole: each command of a page must be typed in a test above."""
    assert set(COMMANDS) - typed == ELSEWHERE
