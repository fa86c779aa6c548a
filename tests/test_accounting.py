"""Every entry of a folder of cases is used, of a case that is left out, passed over, or not read; nothing is lost."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.label_files import find_labels
from fedfactory.cli import main
from fedfactory.errors import FedFactoryError, UsageError
from fedfactory.imaging.accounting.account import (
    FATES,
    Accounting,
    EntryGroup,
    Wanted,
    account_for,
    account_for_images,
)
from fedfactory.imaging.accounting.entries import entries_of
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.node.store import store_writer
from fedfactory.node.store.prepare import NoUsableCase, prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import untrained_segmenter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

CONFIG = PrepareConfig(domain="x", size=8, z_bins=2)
SHAPE = (8, 8, 3)


@functools.cache
def raw_volume(*, label: bool, shape: tuple[int, ...], seed: int) -> bytes:
    block = np.zeros(shape, np.uint8)
    block[2:6, 2:6] = 1
    data = block if label else (50 * block + np.random.default_rng(seed).normal(0, 3, shape)).astype(np.float32)
    return nib.Nifti1Image(data, np.eye(4)).to_bytes()


def volume_bytes(name: str, *, label: bool = False, shape=SHAPE, affine=None, seed: int = 0) -> bytes:
    """A NIfTI file of this name in memory: a bright block in noise, or the block as label 1; any affine at all."""
    raw = raw_volume(label=label, shape=shape, seed=seed)
    if affine is not None:
        raw = raw[:280] + np.asarray(affine[:3], "<f4").tobytes() + raw[328:]
    return gzip.compress(raw, 1) if name.lower().endswith(".gz") else raw


def put(path: Path, content: bytes | str = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def image_at(path: Path, **options) -> Path:
    return put(path, volume_bytes(path.name, **options))


def site(folder: Path, cases: int = 2) -> Path:
    for number in range(cases):
        image_at(folder / f"case{number}" / "image" / "scan.nii.gz", seed=number)
        image_at(folder / f"case{number}" / "label" / "mask.nii.gz", label=True)
    return folder


def fates(accounting: Accounting) -> dict[str, str]:
    """Fate and reason by name, of everything that was not used."""
    return {name: f"{group.fate}: {group.reason}" for group in accounting.groups for name in group.names}


def counts(accounting: Accounting) -> dict[str, int]:
    return {fate: accounting.count(fate) for fate in FATES}


def test_the_numbers_of_an_ordinary_site_add_up_and_say_what_was_used(tmp_path):
    source = site(tmp_path)
    put(source / "README.md")
    put(source / ".DS_Store")
    put(source / "case0" / "image" / "scan.json", "{}")
    put(source / "notes.xyz")
    found = account_for(source, find_cases(source))
    assert found.entries == 8
    assert counts(found) == {"used": 4, "left out": 0, "passed over": 3, "not read": 1}
    assert found.summary() == "8 entries: 4 used (2 images, 2 labels), 3 passed over, 1 not read"
    assert fates(found) == {
        ".DS_Store": "passed over: hidden",
        "README.md": "passed over: a text",
        "case0/image/scan.json": "passed over: facts beside the images, which are not needed",
        "notes.xyz": "not read: a file of a kind that is not read",
    }


def test_files_of_a_case_that_is_left_out_are_counted_with_it(tmp_path):
    source = site(tmp_path, cases=3)
    image_at(source / "case1" / "image" / "second.nii")  # two volumes: nobody knows which
    found = find_cases(source)
    accounting = account_for(source, found, Wanted(failed={**found.problems, "case2": "damaged"}))
    assert counts(accounting) == {"used": 2, "left out": 5, "passed over": 0, "not read": 0}
    assert "case1, which cannot be used" in fates(accounting)["case1/image/second.nii"]
    excluded = account_for(source, found, Wanted(failed=found.problems, excluded=["case0"]))
    assert fates(excluded)["case0/image/scan.nii.gz"] == "left out: the user leaves the case out"


@pytest.mark.parametrize(("first", "second"), [(".nii", ".nii.gz"), (".NII", ".nii"), (".nii.gz", ".NII.GZ")])
def test_twins_are_left_out_and_both_are_named(tmp_path, first, second):
    image_at(tmp_path / f"a{first}")
    image_at(tmp_path / f"a{second}")
    image_at(tmp_path / "b.nii")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["b"]
    assert all(f"a{ending}" in found.problems["a"] for ending in (first, second))
    assert counts(account_for(tmp_path, found, Wanted(failed=found.problems)))["left out"] == 2


def test_twins_in_subfolders_and_beside_a_folder_are_named(tmp_path):
    for name in ("s/a.nii", "s/a.nii.gz", "s/b.nii"):
        image_at(tmp_path / name)
    found = find_cases(tmp_path)
    assert ([case.name for case in found.cases], list(found.problems)) == (["s/b"], ["s/a"])


def nnunet(folder: Path, *labels: str, images: tuple[str, ...] = ("a_0000.nii.gz", "b_0000.nii.gz")) -> Path:
    for name in images:
        image_at(folder / "imagesTr" / name)
    for name in labels:
        image_at(folder / "labelsTr" / name, label=True)
    put(folder / "dataset.json", json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0, "x": 1}}))
    return folder


def test_label_twins_of_an_nnunet_data_set_make_a_problem(tmp_path):
    found = find_cases(nnunet(tmp_path, "a.nii", "a.nii.gz", "b.nii.gz"))
    assert [case.name for case in found.cases] == ["b"]
    assert "are both label maps of a" in found.problems["a"]


def test_label_twins_for_evaluate_are_refused(tmp_path):
    image_at(tmp_path / "a.nii", label=True)
    image_at(tmp_path / "a.nii.gz", label=True)
    with pytest.raises(UsageError, match=r"a\.nii and .*a\.nii\.gz: are label maps of one case"):
        find_labels(tmp_path)


def test_endings_in_capitals_are_those_of_label_maps_too(tmp_path):
    nnunet(tmp_path, "a.NII.GZ", "b.NII", images=("a_0000.NII.GZ", "b_0000.nii"))
    assert [len(case.labels) for case in find_cases(tmp_path).cases] == [1, 1]


def test_label_files_without_an_image_are_named(tmp_path):
    source = nnunet(tmp_path, "a.nii.gz", "other.nii.gz")
    assert fates(account_for(source, find_cases(source)))["labelsTr/other.nii.gz"] == (
        "not read: looks like a label map, and no image has its name"
    )


@pytest.mark.parametrize("folder", ["segmentation", "gt", "Manual_Masks", "label2"])
def test_folders_that_look_like_labels_but_were_not_recognised_are_named(tmp_path, folder):
    for number in range(2):
        image_at(tmp_path / f"c{number}" / "image" / "i.nii")
        image_at(tmp_path / f"c{number}" / folder / "l.nii", label=True)
    found = account_for(tmp_path, find_cases(tmp_path))
    assert counts(found) == {"used": 2, "left out": 0, "passed over": 0, "not read": 2}
    assert all(folder in line for line in found.lines())


def test_what_was_not_asked_for_is_passed_over(tmp_path):
    source = site(tmp_path / "a")
    image_at(source / "case0" / "t2" / "x.nii")
    without = account_for(source, find_cases(source, label_key=None), Wanted(label_key=None))
    assert fates(without) == {
        "case0/label/mask.nii.gz": "passed over: labels, which are not asked for",
        "case1/label/mask.nii.gz": "passed over: labels, which are not asked for",
        "case0/t2/x.nii": "passed over: in the modality folder t2/, which is not asked for",
    }
    raw = nnunet(tmp_path / "b", images=("a_0000.nii", "a_0001.nii"))
    put(raw / "dataset.json", "{}")
    assert fates(account_for(raw, find_cases(raw, image_key="1")))["imagesTr/a_0000.nii"] == (
        "passed over: channel 0, which is not chosen"
    )


def test_entries_that_nobody_can_read_are_named_and_stop_nothing(tmp_path):
    source = site(tmp_path)
    os.mkfifo(source / "pipe")
    (source / "empty").mkdir()
    (source / "case0" / "nothing.txt").symlink_to(source / "no such file")
    put(source / "zero.bin", b"")
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.getcwd()
        os.chdir(source)  # the path of a socket must be short
        try:
            bound.bind("s")
        finally:
            os.chdir(before)
    found = fates(account_for(source, find_cases(source)))
    assert found.pop("case0/nothing.txt").startswith("not read: a link to nothing (")
    assert found == {
        "pipe": "not read: a pipe, no regular file",
        "s": "not read: a socket, no regular file",
        "empty": "not read: an empty folder",
        "zero.bin": "not read: an empty file",
    }


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    source, scan = site(tmp_path), os.scandir
    (source / "closed").mkdir()

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = fates(account_for(source, find_cases(site(tmp_path))))
    assert found == {"closed": "not read: a folder that cannot be read (Permission denied); check permissions"}


@pytest.mark.parametrize("place", ["case9", "case9.nii.gz", "case1/image"])
def test_a_case_that_is_a_link_to_nothing_is_left_out_and_named(tmp_path, place):
    source = site(tmp_path)
    if place == "case1/image":
        shutil.rmtree(source / place)
    elif place.endswith(".gz"):
        shutil.rmtree(source)
        image_at(source / "a.nii")
    (source / place).symlink_to("/mnt/nobody/has/this")
    made = prepare(source, tmp_path.parent / f"{tmp_path.name}-out", CONFIG)
    ((name, reason),) = made.failed.items()
    assert name == place.split("/")[0].split(".")[0]
    assert "link to nothing" in reason or "no such file" in reason
    assert made.accounting.count("left out") == {"case1/image": 2}.get(place, 1)


def test_links_to_documents_that_are_gone_are_no_cases(tmp_path):
    (site(tmp_path) / "README.md").symlink_to("/nobody/has/this")
    found = find_cases(tmp_path)
    assert (len(found.cases), found.problems) == (2, {})


def test_links_in_circles_and_second_links_add_no_cases(tmp_path):
    """A link to the folder itself makes all its files readable a second time."""
    for name in ("a", "b"):
        image_at(tmp_path / "x" / f"{name}.nii", seed=ord(name))
    (tmp_path / "x" / "self").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x" / "loop")
    found = find_cases(tmp_path / "x")
    assert [case.name for case in found.cases] == ["a", "b"]
    assert list(found.problems) == ["loop"]
    accounting = account_for(tmp_path / "x", found, Wanted(failed=found.problems))
    assert fates(accounting)["self"].startswith("passed over: a link to")
    site(tmp_path / "y")
    (tmp_path / "y" / "again").symlink_to(tmp_path / "y" / "case0")
    assert [case.name for case in find_cases(tmp_path / "y").cases] == ["case0", "case1"]


def test_linked_subjects_are_used_and_their_entries_are_counted(tmp_path):
    site(tmp_path / "real")
    put(tmp_path / "real" / "case0" / "odd.xyz")
    (tmp_path / "links").mkdir()
    for name in ("case0", "case1"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "links" / "elsewhere").symlink_to("/usr")
    found = account_for(tmp_path / "links", find_cases(tmp_path / "links"))
    assert counts(found) == {"used": 4, "left out": 0, "passed over": 0, "not read": 2}
    assert fates(found)["elsewhere"] == "not read: a link to a folder in which no case was found"


def test_hidden_folders_and_other_stores_are_one_entry_each(tmp_path):
    source = site(tmp_path / "in")
    for number in range(3):
        put(source / ".git" / "objects" / f"{number}")
    prepare(source, source / "store", CONFIG)
    accounting = prepare(source, tmp_path / "out", CONFIG).accounting
    assert fates(accounting) == {".git": "passed over: hidden", "store": "passed over: a slice store"}


def test_a_walk_that_meets_a_whole_disk_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("fedfactory.imaging.accounting.entries.MAX_ENTRIES", 3)
    for folder in "abc":
        for number in range(4):
            put(tmp_path / folder / f"{number}.nii")
    found = entries_of(str(tmp_path))
    assert len(found) == 4 + 2
    assert sum("nobody looked into" in entry.unusable for entry in found) == 2


def test_prepare_keeps_the_accounting_and_shows_it(tmp_path):
    source = site(tmp_path / "in", cases=3)
    put(source / "case2" / "image" / "scan.nii.gz", b"damaged")
    put(source / "odd.xyz")
    made = prepare(source, tmp_path / "out", CONFIG)
    assert counts(made.accounting) == {"used": 4, "left out": 2, "passed over": 0, "not read": 1}
    assert SliceStore(tmp_path / "out").accounting == made.accounting
    stored = json.loads((tmp_path / "out" / "store.json").read_text())["accounting"]
    assert stored["entries"] == sum(group["count"] for group in stored["groups"]) == 7
    page = (tmp_path / "out" / "quality.html").read_text()
    assert "7 entries: 4 used (2 images, 2 labels)" in page
    assert "odd.xyz" in page


def test_the_accounting_follows_the_folder_while_the_slices_stay(tmp_path):
    source = site(tmp_path / "in")
    first = prepare(source, tmp_path / "out", CONFIG)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = prepare(source, tmp_path / "out", CONFIG)
    assert again.accounting == first.accounting
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    put(source / "new.xyz")
    prepare(source, tmp_path / "out", CONFIG)
    assert "new.xyz" in fates(SliceStore(tmp_path / "out").accounting)
    assert "new.xyz" in (tmp_path / "out" / "quality.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(before)


def test_a_store_of_an_earlier_version_has_no_accounting(tmp_path):
    prepare(site(tmp_path / "in"), tmp_path / "out", CONFIG)
    index = json.loads((tmp_path / "out" / "store.json").read_text())
    del index["accounting"]
    (tmp_path / "out" / "store.json").write_text(json.dumps(index))
    assert SliceStore(tmp_path / "out").accounting is None


def test_a_folder_without_a_usable_case_is_accounted_for_too(tmp_path):
    put(tmp_path / "in" / "a.nii", b"damaged")
    put(tmp_path / "in" / "b.nii", b"")
    with pytest.raises(NoUsableCase, match="not one of 2 cases") as caught:
        prepare(tmp_path / "in", tmp_path / "out", CONFIG)
    assert list(caught.value.failed) == ["a", "b"]
    assert counts(caught.value.accounting)["left out"] == 2
    assert not (tmp_path / "out").exists()


def test_images_to_segment_are_accounted_for_across_folders_and_files(tmp_path):
    source = site(tmp_path / "in")
    single = image_at(tmp_path / "single.nii")
    put(source / "odd.xyz")
    given_ = [source, single]
    found = account_for_images(given_, find_images(given_), image_keys=("image",))
    assert counts(found) == {"used": 3, "left out": 0, "passed over": 2, "not read": 1}
    assert found.entries == 6


def test_segment_prints_what_it_did_not_segment(tmp_path, capsys):
    source = tmp_path / "in"
    image_at(source / "a.nii")
    put(source / "odd.xyz")
    untrained_segmenter().save(tmp_path / "model.safetensors")
    words = ["segment", source, "--model", tmp_path / "model.safetensors", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.out.splitlines() == [str(tmp_path / "out" / "a.nii.gz")]
    assert printed.err.splitlines() == [
        "2 entries: 1 used (1 images), 1 not read", "not read (1): a file of a kind that is not read: odd.xyz"
    ]  # fmt: skip


def test_evaluate_says_which_files_it_did_not_score(tmp_path):
    for name in ("a", "b"):
        image_at(tmp_path / "ref" / f"{name}.nii.gz", label=True)
    image_at(tmp_path / "pred" / "a.nii.gz", label=True)
    image_at(tmp_path / "pred" / "a_probabilities.nii.gz")
    Image.new("L", (4, 4)).save(tmp_path / "pred" / "a.png")
    put(tmp_path / "pred" / "c.mnc")
    found = evaluate(tmp_path / "pred", tmp_path / "ref").entries
    assert counts(found["predictions"]) == {"used": 1, "left out": 0, "passed over": 2, "not read": 1}
    assert fates(found["references"]) == {"b.nii.gz": "passed over: a reference without a prediction"}


def detached(folder: Path, name: str, *, label: bool = False) -> Path:
    """A MetaImage header with its voxels in a file beside it."""
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype("<i2")
    voxels[2:6, 2:6] += 50
    voxels = (voxels > 30).astype("<i2") if label else voxels
    put(folder / f"{name}.raw", voxels.tobytes(order="F"))
    sides = " ".join(map(str, SHAPE))
    header = (
        f"NDims = 3\nDimSize = {sides}\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = {name}.raw\n"
    )
    return put(folder / f"{name}.mhd", header)


def test_files_of_voxels_are_used_as_their_headers_are(tmp_path):
    """As in PROMISE12: Case00.mhd and Case00_segmentation.mhd, each with a file .raw."""
    for number in range(2):
        detached(tmp_path / "in", f"Case0{number}")
        detached(tmp_path / "in", f"Case0{number}_segmentation", label=True)
    made = prepare(tmp_path / "in", tmp_path / "out", CONFIG)
    assert made.accounting.summary() == "8 entries: 8 used (4 files of voxels, 2 images, 2 labels)"
    put(tmp_path / "in" / "Case00.mhd", "damaged")
    put(tmp_path / "in" / "other.raw")
    accounting = prepare(tmp_path / "in", tmp_path / "again", CONFIG).accounting
    assert fates(accounting)["other.raw"] == "not read: a file of a kind that is not read"
    assert counts(accounting) == {"used": 4, "left out": 3, "passed over": 0, "not read": 2}
    predicted = evaluate(tmp_path / "in" / "Case01_segmentation.mhd", tmp_path / "in" / "Case01_segmentation.mhd")
    assert counts(predicted.entries["predictions"])["used"] == 1
    for part in ("a", "b"):
        detached(tmp_path / part, "Case01", label=True)
    assert counts(evaluate(tmp_path / "a", tmp_path / "b").entries["references"])["used"] == 2


def test_weakened_copies_say_what_they_lack(tmp_path, capsys):
    source = site(tmp_path / "in", cases=3)
    shutil.rmtree(source / "case1" / "label")
    put(source / "odd.xyz")
    with pytest.raises(SystemExit) as ended:
        main(["weaken-labels", str(source), "--out", str(tmp_path / "out"), "--kind", "box"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 entries: 4 used (2 images, 2 labels), 1 passed over, 1 not read"
    assert "passed over (1): an image without labels, which is not copied: case1/image/scan.nii.gz" in lines
    assert "not read (1): a file of a kind that is not read: odd.xyz" in lines


def test_images_that_failed_are_left_out_of_the_accounting_of_images(tmp_path):
    source, single, other = site(tmp_path / "in"), image_at(tmp_path / "single.nii"), image_at(tmp_path / "other.nii")
    given_ = [source, single, other]
    failed = {"case1": "nothing is found", "other": "damaged"}
    found = account_for_images(given_, find_images(given_), image_keys=("image",), failed=failed)
    assert counts(found) == {"used": 2, "left out": 2, "passed over": 2, "not read": 0}
    assert fates(found)["other.nii"] == "left out: of case other, which cannot be used"


@pytest.mark.parametrize("folder", ["$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found"])
def test_folders_of_the_system_are_no_subjects(tmp_path, folder):
    image_at(site(tmp_path) / folder / "image" / "deleted.nii.gz")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["case0", "case1"] and not found.without_image
    assert fates(account_for(tmp_path, found)) == {
        folder: "passed over: a folder of the operating system or the storage"
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("case9.zip", "an archive, which must be unpacked"),
        ("case0/image/study.tar.gz", "an archive, which must be unpacked"),
        ("case9/image/scan.nii.gz.part", "a download that has not ended"),
        ("case9/label/mask.nii.gz.crdownload", "a download that has not ended"),
        ("case9/image/IM0001.dcm.gz", "an archive, which must be unpacked"),
    ],
)
def test_what_must_be_unpacked_or_fetched_again_is_named_wherever_it_lies(tmp_path, name, reason):
    put(site(tmp_path) / name)
    assert fates(account_for(tmp_path, find_cases(tmp_path)))[name] == f"not read: {reason}"


def test_names_are_composed_before_they_are_compared(tmp_path):
    """macOS writes an umlaut as a letter and its dots; both look alike, so nobody would understand a refusal."""
    apart, composed = "fa\u0308ll", "f\u00e4ll"
    images = (f"{apart}_0000.nii.gz", "b_0000.nii.gz")
    found = find_cases(nnunet(tmp_path / "nn", f"{composed}.nii.gz", "b.nii.gz", images=images))
    assert [(case.name, len(case.labels)) for case in found.cases] == [("b", 1), (composed, 1)]
    for name, label in ((f"{apart}.nii", False), (f"{composed}_seg.nii", True)):
        image_at(tmp_path / "flat" / name, label=label)
    (case,) = find_cases(tmp_path / "flat").cases
    assert (case.name, len(case.labels)) == (composed, 1)
    image_at(tmp_path / "pred" / f"{apart}.nii", label=True)
    image_at(tmp_path / "ref" / composed / "label" / "l.nii", label=True)
    assert {score.case for score in evaluate(tmp_path / "pred", tmp_path / "ref").scores} == {composed}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["1/T2/a.nii", "1/Ground/a.nii", "2/T2/a.nii", "2/Ground/a.nii"],
            "have the folders Ground, T2: choose by --im",
        ),
        (["c1/image/v.hdr", "c1/image/v.img"], "c1/image/v.hdr is an image of a kind that is not read"),
        (["a.zip", "b.zip"], "a.zip is an archive, which must be unpacked"),
        (["x/y/z/a.nii"], "volumes lie deeper, in x/y/z: give"),
    ],
)
def test_a_folder_in_which_no_case_is_found_is_looked_through_for_the_reason(tmp_path, files, words):
    for name in files:
        image_at(tmp_path / "in" / name)
    with pytest.raises(UsageError, match=f"no case found.*{words}"):
        find_cases(tmp_path / "in")


def test_accountings_of_two_folders_are_added():
    first = Accounting(entries=1, groups=(EntryGroup(fate="not read", reason="r", count=1, names=("b",)),))
    second = Accounting(entries=2, groups=(EntryGroup(fate="not read", reason="r", count=2, names=("a", "c")),))
    total = first + second
    assert (total.entries, total.groups[0].count, total.groups[0].names) == (3, 3, ("a", "b", "c"))


def test_a_line_names_a_few_entries_and_counts_all():
    group = EntryGroup(fate="not read", reason="odd", count=7, names=tuple("abcdefg"))
    assert group.line() == "not read (7): odd: a, b, c, d, e and 2 more"
    assert Accounting(entries=7, groups=(group,)).lines(apart_from=["odd"]) == []


# random trees


CONTENT = {
    "image": lambda name, n: volume_bytes(name, seed=n),
    "label": lambda name, n: volume_bytes(name, label=True),
    "other grid": lambda name, n: volume_bytes(name, affine=np.diag([2.0, 1, 1, 1])),
    "NaN affine": lambda name, n: volume_bytes(name, affine=np.full((4, 4), np.nan)),
    "singular": lambda name, n: volume_bytes(name, affine=np.diag([0.0, 1, 1, 1])),
    "4-D": lambda name, n: volume_bytes(name, shape=(*SHAPE, 2)),
    "cut off": lambda name, n: volume_bytes(name)[:400],
    "noise": lambda name, n: np.random.default_rng(n).bytes(500),
    "empty": lambda name, n: b"",
    "text": lambda name, n: b"SLICE,LABEL\n0,1\n",
    "picture": lambda name, n: PICTURE,
    "no DICOM": lambda name, n: b"\0" * 128 + b"DICM" + b"\1" * 40,
}
FOLDERS = (
    "", "p1", "p1/image", "p1/label", "p2/image", "p2/label", "p2/t2", "p3", "p3/sub/deep", "imagesTr", "labelsTr",
    "imagesTs", "images", "masks", ".hidden", "__MACOSX", "p1/segmentation", "gt",
)  # fmt: skip
NAMES = (
    "a.nii", "a.nii.gz", "A.NII.GZ", "b_0000.nii.gz", "b_0001.nii.gz", "b.nii.gz", "a.png", "a.jpg", "a_mask.png",
    "a.csv", "dataset.json", "README", ".DS_Store", "._a.nii.gz", "a.dcm", "IM001", "DICOMDIR", "x.nrrd", "x.xyz",
    "weird\nname.nii", "x.zip", "a.json",
)  # fmt: skip
LINKS = ("link to nothing", "link to the top", "link to p1", "link to itself", "pipe", "folder")


def _picture() -> bytes:
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()
ITEMS = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from([*CONTENT, *LINKS]))
# Half of the files are what their names say, or most trees would hold no case.
GOOD = st.sampled_from([
    ("p1/image", "a.nii", "image"), ("p1/label", "a.nii", "label"), ("p2/image", "b.nii.gz", "image"),
    ("p2/label", "b.nii.gz", "label"), ("", "b.nii.gz", "image"), ("p3", "a.nii.gz", "image"), ("", "a.nii", "image"),
    ("", "dataset.json", "text"),
    ("imagesTr", "b_0000.nii.gz", "image"), ("labelsTr", "b.nii.gz", "label"), ("images", "a.png", "picture"),
    ("masks", "a.png", "picture"), ("", "a.png", "picture"),
])  # fmt: skip


def plant(root: Path, items: list[tuple[str, str, str]]) -> None:
    """A tree of files; what cannot be there, because something else is, is left out."""
    for number, (folder, name, kind) in enumerate(items):
        path = root / folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                continue
            if name == "dataset.json" and kind == "text":
                path.write_text("{}")
            elif kind in CONTENT:
                path.write_bytes(CONTENT[kind](name, number))
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            else:
                targets = {"link to nothing": "/nobody/has/this", "link to the top": root, "link to p1": root / "p1"}
                path.symlink_to(targets.get(kind, path))
        except (FileExistsError, NotADirectoryError, FileNotFoundError, OSError):
            continue


def everything_below(root: Path) -> set[str]:
    """All that is no folder, by a walk that follows no link: an oracle that knows nothing of cases."""
    return {
        os.path.join(place, name)
        for place, folders, files in os.walk(root)
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(place, name))))
    }


def check_tree(items: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        root = Path(place, "in")
        root.mkdir()
        plant(root, items)
        before = everything_below(root)
        try:
            made = prepare(root, Path(place, "out"), CONFIG)
            accounting, used = made.accounting, {case.name for case in made.store.cases}
        except NoUsableCase as error:
            accounting, used = error.accounting, set()
        except FedFactoryError as error:
            assert "\n" not in str(error)
            assert "unforeseen" not in str(error)
            return
        assert not [
            str(warning.message) for warning in warned if issubclass(warning.category, (RuntimeWarning, UserWarning))
        ]
        assert accounting.entries == sum(group.count for group in accounting.groups)
        named = [name for group in accounting.groups for name in group.names]
        assert len(set(named)) == len(named)
        assert all("\n" not in line for line in (accounting.summary(), *accounting.lines()))
        assert all(group.count == len(group.names) for group in accounting.groups if group.fate != "used")
        cases = [case for case in find_cases(root).cases if case.name in used]
        assert len(cases) == len(used)
        files = [str(path) for case in cases for path in case.files]
        assert len(files) == len(set(files)) == accounting.count("used")
        spoken = {str(root / name.replace("\\x0a", "\n")) for name in named}
        assert not spoken & set(files)
        through_links = {os.path.realpath(file) for file in files}
        for path in before - set(files) - spoken:
            around = [str(folder) for folder in Path(path).parents]
            assert spoken & set(around) or any(file.startswith(path + os.sep) for file in files), path
            assert path not in through_links


@pytest.mark.parametrize("trees", [60, pytest.param(500, marks=pytest.mark.tutorial)])
def test_entries_of_random_trees_add_up_and_nothing_is_used_twice(trees, monkeypatch, capfd):
    monkeypatch.setattr(store_writer, "write_quality_page", lambda store, path: path.write_text(""))
    some = settings(max_examples=trees, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    some(given(st.lists(st.one_of(GOOD, ITEMS), min_size=1, max_size=14))(check_tree))()
    seen = capfd.readouterr()
    assert "Warning" not in seen.err
    assert "Traceback" not in seen.err
