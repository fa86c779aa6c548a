"""Public data sets are read as they are published: images as images, label maps as labels, and nothing unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fedfactory.errors import UsageError
from fedfactory.imaging.case_files import CaseFiles, Found, LabelFile
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.label_maps import read_label_map
from fedfactory.imaging.layouts.label_names import is_label_name, without_label_words
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume


def make(root: Path, *names: str, description: object = None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def short(found: Found, root: Path) -> dict[str, tuple[str, ...]]:
    """For every case its images, and its label maps with the values of their classes."""

    def of(path: Path) -> str:
        return path.relative_to(root).as_posix()

    return {
        case.name: (
            *(of(path) for path in case.channels if path is not None),
            *(of(label.path) if label.value is None else f"{of(label.path)}={label.value}" for label in case.labels),
        )
        for case in found.cases
    }


def over(found: Found, root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in found.passed_over}


def all_accounted_for(found: Found, root: Path) -> bool:
    """Whether every volume is of a case or passed over, itself or with its folder."""
    used = {path for case in found.cases for path in case.files}
    files = [path for path in root.rglob("*.nii*") if path.is_file()]
    return all(path in used or {path, *path.parents} & found.passed_over.keys() for path in files)


# names of label maps


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a_seg", "a"), ("a-seg", "a"), ("a.seg", "a"), ("a_gt", "a"), ("a_label", "a"), ("a_labels", "a"),
        ("a_mask", "a"), ("a_mask_1", "a"), ("a_dseg", "a"), ("a_manual", "a"), ("a_seg_v2", "a"), ("A_SEG", "A"),
        ("a_segmentation", "a"), ("a_frame01_gt", "a_frame01"), ("a_labelmap", "a"), ("a_ground_truth", "a"),
        ("seg", ""), ("mask", ""), ("segmentation-0", "0"), ("label0001", "0001"),
    ],
)  # fmt: skip
def test_names_of_label_maps(name, image):
    assert is_label_name(name) and without_label_words(name) == image


@pytest.mark.parametrize(
    "name", ["a", "lesion_001", "scan_2", "a_t1", "target", "sagt", "segment_study_12", "manually_done", "unmasked"]
)
def test_names_of_images(name):
    assert not is_label_name(name)


# data sets that are known by the names of their files


def brats(*names: str, keys=("flair", "t1", "t1ce", "t2", "seg"), joint="_", top="") -> list[str]:
    return [f"{top}{name}/{name}{joint}{key}.nii.gz" for name in names for key in keys]


@pytest.mark.parametrize(
    ("files", "asked", "chosen"),
    [
        (brats("BraTS20_Training_001", "BraTS20_Training_002"), "flair", ["_flair"]),
        (brats("Brats18_CBICA_AAB_1", top="HGG/"), "t1ce,t2", ["_t1ce", "_t2"]),
        (brats("BraTS-GLI-00000-000", keys=("t1c", "t1n", "t2f", "t2w", "seg"), joint="-"), "t1c", ["-t1c"]),
        (brats("BraTS-GLI-00000-000", keys=("t1c", "t1n", "t2f", "t2w", "seg"), joint="-"), "flair", ["-t2f"]),
    ],
)
def test_brats(tmp_path, files, asked, chosen):
    make(tmp_path, *files)
    with pytest.raises(UsageError, match="flair, t1, t1ce, t2; choose by image_key"):
        find_cases(tmp_path)
    found = find_cases(tmp_path, image_key=asked)
    for name, (*images, label) in short(found, tmp_path).items():
        assert [path.rsplit("/", 1)[1] for path in images] == [f"{name}{ending}.nii.gz" for ending in chosen]
        assert label.endswith(f"{name}{chosen[0][0]}seg.nii.gz")
    assert len(found.cases) == len(files) // 5 and all_accounted_for(found, tmp_path)
    images = find_images([tmp_path], image_key=asked, channels=len(chosen))
    assert all(case.labels == () for case in images.cases) and len(images.cases) == len(found.cases)
    assert sum(path.name.endswith("seg.nii.gz") for path in images.passed_over) == len(found.cases)
    with pytest.raises(UsageError, match="without pd; choose of flair, t1, t1ce, t2"):
        find_cases(tmp_path, image_key="pd")


def test_the_label_map_of_another_name_in_brats_2020(tmp_path):
    make(tmp_path, *brats("BraTS20_Training_354"), *brats("BraTS20_Training_355", keys=("flair", "t1", "t1ce", "t2")))
    make(tmp_path, "BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    found = find_cases(tmp_path, image_key="t2")
    assert [case.labels[0].path.name for case in found.cases][1] == "W39_1998.09.19_Segm.nii"
    assert "only one of its folder" in found.remarks["BraTS20_Training_355"] and all_accounted_for(found, tmp_path)


def test_a_case_of_brats_that_lacks_a_sequence_is_named_or_filled(tmp_path):
    make(tmp_path, *brats("A", "B"))
    (tmp_path / "B" / "B_t1.nii.gz").unlink()
    found = find_cases(tmp_path, image_key="flair,t1")
    assert [case.name for case in found.cases] == ["A"] and "has no channel t1" in found.problems["B"]
    filled = find_cases(tmp_path, image_key="flair,t1", fill_missing=True)
    assert [path is None for path in filled.cases[1].channels] == [False, True]


def test_acdc(tmp_path):
    names = [f"training/patient{n:03d}/patient{n:03d}" for n in (1, 2)]
    make(tmp_path, *(f"{name}_{end}.nii.gz" for name in names for end in ("4d", "frame01", "frame01_gt", "frame12",
                                                                         "frame12_gt")))  # fmt: skip
    found = find_cases(tmp_path)
    assert short(found, tmp_path)["patient002_frame12"] == (
        "training/patient002/patient002_frame12.nii.gz", "training/patient002/patient002_frame12_gt.nii.gz",
    )  # fmt: skip
    assert len(found.cases) == 4 and over(found, tmp_path) == {f"{name}_4d.nii.gz" for name in names}
    assert len(find_images([tmp_path]).cases) == 4


def test_mms_and_mm_whs(tmp_path):
    make(tmp_path / "mms", *(f"A0S9V9/A0S9V9_sa{end}.nii.gz" for end in ("", "_gt")))
    assert short(find_cases(tmp_path / "mms"), tmp_path / "mms") == {
        "A0S9V9": ("A0S9V9/A0S9V9_sa.nii.gz", "A0S9V9/A0S9V9_sa_gt.nii.gz")
    }
    whs = make(tmp_path / "whs", *(f"ct_train/ct_train_1001_{end}.nii.gz" for end in ("image", "label")))
    make(whs, "ct_test/ct_test_2001_image.nii.gz")
    found = find_cases(whs)
    assert short(found, whs)["ct_train_1001"][1] == "ct_train/ct_train_1001_label.nii.gz"
    assert "unlabelled" in found.remarks["ct_test_2001"]


def test_the_view_of_mms_2_is_asked_for(tmp_path):
    ends = ("ED", "ED_gt", "ES", "ES_gt", "CINE")
    make(tmp_path, *(f"001/001_{view}_{end}.nii.gz" for view in ("SA", "LA") for end in ends))
    with pytest.raises(UsageError, match="SA, LA; choose by image_key"):
        find_cases(tmp_path)
    found = find_cases(tmp_path, image_key="LA")
    assert short(found, tmp_path) == {
        f"001_{frame}": (f"001/001_LA_{frame}.nii.gz", f"001/001_LA_{frame}_gt.nii.gz") for frame in ("ED", "ES")
    }
    assert all_accounted_for(found, tmp_path)


# one file for each class


def test_totalsegmentator(tmp_path):
    make(tmp_path, "s0011/ct.nii.gz", "s0012/ct.nii.gz", "s0013/ct.nii.gz", "meta.csv")
    make(tmp_path, *(f"s00{n}/segmentations/{organ}.nii.gz" for n in (11, 12) for organ in ("liver", "spleen")))
    make(tmp_path, "s0012/segmentations/aorta.nii.gz")
    found = find_cases(tmp_path)
    assert found.class_names == {1: "aorta", 2: "liver", 3: "spleen"}
    assert short(found, tmp_path)["s0011"] == (
        "s0011/ct.nii.gz", "s0011/segmentations/liver.nii.gz=2", "s0011/segmentations/spleen.nii.gz=3",
    )  # fmt: skip
    assert "lacks the masks of 1 of 3 classes" in found.remarks["s0011"] and "unlabelled" in found.remarks["s0013"]
    found.number_classes({1: "Spleen", 4: "liver"})
    assert short(found, tmp_path)["s0012"][1:] == (
        "s0012/segmentations/liver.nii.gz=4", "s0012/segmentations/spleen.nii.gz=1",
    )  # fmt: skip
    assert over(found, tmp_path) == {"s0012/segmentations/aorta.nii.gz"}
    with pytest.raises(UsageError, match="'livr', which is none of the classes there: aorta, liver, spleen"):
        find_cases(tmp_path).number_classes({1: "livr"})
    images = find_images([tmp_path])
    assert [case.name for case in images.cases] == ["s0011", "s0012", "s0013"]
    assert over(images, tmp_path) == {"s0011/segmentations", "s0012/segmentations"}


def test_masks_of_classes_become_one_label_map(tmp_path):
    """The lung's vessels lie inside the lung, whichever is read first; where others overlap, the later one counts."""
    grid = np.diag([2.0, 2.0, 3.0, 1.0])
    areas = {"a": slice(0, 8), "b": slice(2, 4), "c": slice(6, 12)}
    expected = np.zeros((12, 5, 4), np.uint16)
    for value, name in ((1, "a"), (2, "b"), (3, "c")):
        mask = np.zeros((12, 5, 4), np.uint8)
        mask[areas[name]] = 255 if name == "c" else 1
        write_volume(tmp_path / f"{name}.nii.gz", Volume(mask, grid))
        expected[areas[name]] = value
    image = np.random.default_rng(0).normal(size=(12, 5, 4)).astype(np.float32)
    write_volume(tmp_path / "ct.nii.gz", Volume(image, grid))
    for order in ("abc", "bac"):
        labels = tuple(LabelFile(tmp_path / f"{name}.nii.gz", "abc".index(name) + 1) for name in order)
        case = CaseFiles("s1", (tmp_path / "ct.nii.gz",), labels)
        found = read_label_map(case, read_image(case.channels))
        np.testing.assert_array_equal(found.volume.data, expected)
        assert len(found.remarks) == 1 and "overlap" in found.remarks[0]


# BIDS


def test_bids(tmp_path):
    make(tmp_path, *(f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in (1, 2)), "dataset_description.json")
    make(tmp_path, *(f"derivatives/manual/sub-{n}/anat/sub-{n}_dseg.nii.gz" for n in (1, 2)))
    found = find_cases(tmp_path)
    assert short(found, tmp_path)["sub-2"] == (
        "sub-2/anat/sub-2_T1w.nii.gz", "derivatives/manual/sub-2/anat/sub-2_dseg.nii.gz",
    )  # fmt: skip
    make(tmp_path, "derivatives/fs/sub-1/anat/sub-1_dseg.nii.gz")
    with pytest.raises(UsageError, match="label maps of fs and manual; choose by label_key"):
        find_cases(tmp_path)
    assert "derivatives/fs" in short(find_cases(tmp_path, label_key="fs"), tmp_path)["sub-1"][1]
    images = find_images([tmp_path])
    assert len(images.cases) == 2 and all_accounted_for(images, tmp_path)


def test_sessions_and_sequences_of_bids(tmp_path):
    for session, suffixes in (("a", ("T1w", "FLAIR")), ("b", ("T1w",))):
        make(tmp_path, *(f"sub-1/ses-{session}/anat/sub-1_ses-{session}_{end}.nii.gz" for end in suffixes))
    make(tmp_path, "sub-1/ses-a/func/sub-1_ses-a_bold.nii.gz")
    derived = "derivatives/x/sub-1/ses-{0}/anat/sub-1_ses-{0}_{1}.nii.gz"
    make(tmp_path, derived.format("a", "label-lesion_mask"), derived.format("a", "desc-brain_mask"))
    make(tmp_path, derived.format("b", "space-MNI152NLin_dseg"), derived.format("a", "desc-preproc_T1w"))
    with pytest.raises(UsageError, match="FLAIR, T1w; choose by image_key"):
        find_cases(tmp_path)
    found = find_cases(tmp_path, image_key="t1w")
    assert short(found, tmp_path) == {
        "sub-1_ses-a": ("sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz", derived.format("a", "label-lesion_mask")),
        "sub-1_ses-b": ("sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz",),
    }
    reasons = {path.name: reason for path, reason in found.passed_over.items()}
    assert "another space" in reasons["sub-1_ses-b_space-MNI152NLin_dseg.nii.gz"]
    assert "no structure" in reasons["sub-1_ses-a_desc-brain_mask.nii.gz"]
    assert "func" in reasons["sub-1_ses-a_bold.nii.gz"]


# nnU-Net and the Decathlon


def pairs_of(names, image="imagesTr/{}.nii.gz", label="labelsTr/{}.nii.gz") -> list[str]:
    return [form.format(name) for name in names for form in (image, label)]


AMOS = [f"amos_{number:04d}" for number in (1, 4, 5, 7)]
LIST = {"training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in AMOS]}


@pytest.mark.parametrize("description", [LIST, {}, None])
def test_four_digits_number_the_cases_of_amos(tmp_path, description):
    make(tmp_path, *pairs_of(AMOS), "imagesTs/amos_0009.nii.gz", description=description)
    found = find_cases(tmp_path)
    assert short(found, tmp_path) == {n: (f"imagesTr/{n}.nii.gz", f"labelsTr/{n}.nii.gz") for n in AMOS}
    assert over(found, tmp_path) == {"imagesTs"}
    assert len(find_images([tmp_path]).cases) == 4


@pytest.mark.parametrize("names", [["la_3", "la_12"], ["la_03"], ["la_003", "la_004"], ["la_0003", "la_0004"]])
@pytest.mark.parametrize("channels", [1, 2])
def test_numbers_of_any_length_before_the_channel(tmp_path, names, channels):
    make(tmp_path, *(f"labelsTr/{name}.nii.gz" for name in names), description={})
    make(tmp_path, *(f"imagesTr/{name}_{channel:04d}.nii.gz" for name in names for channel in range(channels)))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == sorted(names)
    assert all(len(case.channels) == channels and len(case.labels) == 1 for case in found.cases)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("label", ["labelsTr/{}_0000.nii.gz", "labelsTr/{}.NII.GZ", "labelsTr/{}_seg.nii.gz"])
def test_label_maps_of_other_names_are_seen(tmp_path, channels, label):
    names = ["MMs_001", "MMs_002"]
    make(
        tmp_path,
        *(label.format(name) for name in names),
        description={"channel_names": dict(enumerate("ab"[:channels]))},
    )
    make(tmp_path, *(f"imagesTr/{name}_{channel:04d}.NII.GZ" for name in names for channel in range(channels)))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == names
    assert all(len(case.channels) == channels and len(case.labels) == 1 for case in found.cases)


def test_label_maps_of_no_image_are_refused_or_named(tmp_path):
    make(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/b.nii.gz", description={})
    with pytest.raises(UsageError, match=r"none of its 1 label maps, such as b.nii.gz, has the name of a case"):
        find_cases(tmp_path)
    assert len(find_cases(tmp_path, label_key=None).cases) == 1
    make(tmp_path, "imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz")
    found = find_cases(tmp_path)
    assert over(found, tmp_path) == {"labelsTr/b.nii.gz"} and set(found.remarks) == {"a"}
    make(tmp_path, "labelsTr/c.nii")
    assert "are both label maps of c" in find_cases(tmp_path).problems["c"]


def test_a_channel_too_many_is_named(tmp_path):
    make(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz",
         description={"channel_names": {"0": "T1"}})  # fmt: skip
    found = find_cases(tmp_path)
    assert short(found, tmp_path) == {"a": ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")}
    assert over(found, tmp_path) == {"imagesTr/a_0001.nii.gz"}


def test_a_label_map_among_the_images_is_no_image(tmp_path):
    make(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_seg.nii.gz", "labelsTr/a.nii.gz", description={})
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["a"] and over(found, tmp_path) == {"imagesTr/a_seg.nii.gz"}
    named = make(tmp_path / "b", *pairs_of(["heart_seg_001", "heart_seg_002"], "imagesTr/{}_0000.nii.gz"))
    assert len(find_cases(named).cases) == 2 and not find_cases(named).passed_over


def test_classes_of_a_description(tmp_path):
    files = make(tmp_path, *pairs_of(["a"], "imagesTr/{}_0000.nii.gz"))
    for labels in ({"0": "background", "1": "liver", "2": "spleen"}, {"background": 0, "liver": 1, "spleen": 2}):
        (tmp_path / "dataset.json").write_text("\ufeff" + json.dumps({"labels": labels}), encoding="utf-8")
        found = find_cases(files)
        assert found.class_names == {1: "liver", 2: "spleen"} and not found.remarks
        assert find_cases(files, label_key=None).class_names == {}
        found.number_classes({1: "Leber"})
        assert found.class_names == {1: "Leber", 2: "spleen"}
        with pytest.raises(UsageError, match="'liver' as label 2, but it is 1 in the label maps"):
            find_cases(files).number_classes({2: "liver"})
    make(tmp_path, description={"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}})
    found = find_cases(files)
    assert found.class_names == {}
    assert "regions of several labels (whole, core)" in found.remarks["dataset.json"]
    assert "--unlabelled-value 3" in found.remarks["dataset.json"]
    make(tmp_path, description={"labels": {"a": 1, "A": 2}, "training": 7, "channel_names": []})
    assert "cannot be used" in find_cases(files).remarks["dataset.json"]


def test_the_decathlon_keeps_its_channels_in_one_file(tmp_path):
    make(tmp_path, *pairs_of(["BRATS_001"]), description={"modality": {"0": "FLAIR", "1": "T1w"}})
    found = find_cases(tmp_path)
    assert len(found.cases) == 1 and "--frames" in found.remarks["dataset.json"]


def test_a_data_set_that_lies_deeper_is_named(tmp_path):
    make(tmp_path / "in" / "Dataset001_A", *pairs_of(["a"]), description={})
    with pytest.raises(UsageError, match=r"volumes lie deeper, in in/Dataset001_A: give .*/in/Dataset001_A"):
        find_cases(tmp_path)


# any other folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.nii.gz", "a_seg.nii.gz"], {"a": ("a.nii.gz", "a_seg.nii.gz")}),
        (["p/a.nii", "p/a-label.nii.gz"], {"p/a": ("p/a.nii", "p/a-label.nii.gz")}),
        (["seg_a.nii", "a.nii"], {"a": ("a.nii", "seg_a.nii")}),
        (["volume-7.nii", "segmentation-7.nii"], {"volume-7": ("volume-7.nii", "segmentation-7.nii")}),
        (["p/imaging.nii.gz", "p/segmentation.nii.gz"], {"p": ("p/imaging.nii.gz", "p/segmentation.nii.gz")}),
        (["p/scan3.nii", "p/tumour_mask.nii"], {"p/scan3": ("p/scan3.nii", "p/tumour_mask.nii")}),
        (["images/a.nii", "labels/a.nii"], {"a": ("images/a.nii", "labels/a.nii")}),
        (["img/img0001.nii", "label/label0001.nii"], {"img0001": ("img/img0001.nii", "label/label0001.nii")}),
        (["tr/images/a.nii", "tr/masks/a_mask.nii"], {"tr/a": ("tr/images/a.nii", "tr/masks/a_mask.nii")}),
        (["ct/a.nii", "labels/a.nii"], {"a": ("ct/a.nii", "labels/a.nii")}),
        (["a.nii", "b.nii", "masks/b.nii", "masks/a.nii"],
         {"a": ("a.nii", "masks/a.nii"), "b": ("b.nii", "masks/b.nii")}),
        (["a_image.nii", "a_label.nii"], {"a": ("a_image.nii", "a_label.nii")}),
    ],
)  # fmt: skip
def test_images_and_label_maps_of_one_folder_are_told_apart(tmp_path, files, expected):
    make(tmp_path, *files)
    found = find_cases(tmp_path)
    assert short(found, tmp_path) == expected and not found.problems
    images = find_images([tmp_path])
    seen = {path for paths in short(images, tmp_path).values() for path in paths}
    assert seen == {image for image, *_ in expected.values()}
    assert len(images.cases) == len(expected) and all_accounted_for(images, tmp_path)


def test_a_label_map_is_never_an_image(tmp_path):
    make(tmp_path, "a.nii.gz", "b_gt.nii.gz", "p/c_mask.nii.gz", "labels/d.nii.gz")
    found = find_cases(tmp_path)
    assert short(found, tmp_path) == {"a": ("a.nii.gz",)}
    assert over(found, tmp_path) == {"b_gt.nii.gz", "p/c_mask.nii.gz", "labels/d.nii.gz"}
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"no image found; 3 entries were passed over, such as b_gt.nii.gz"):
        find_cases(tmp_path)
    with pytest.raises(UsageError, match=r"all its volumes, such as b_gt.nii.gz, look like label maps"):
        find_images([tmp_path], channels=2)
    given = find_images([tmp_path / "b_gt.nii.gz"])  # who names a file means it
    assert len(given.cases) == 1


def test_one_of_several_images_of_a_label_map_is_asked_for(tmp_path):
    make(tmp_path, *(f"{n}/{name}.nii.gz" for n in (1, 2) for name in ("T1", "DWI", "seg")))
    with pytest.raises(UsageError, match="DWI, T1; choose by image_key"):
        find_cases(tmp_path)
    assert short(find_cases(tmp_path, image_key="T1"), tmp_path)["2"] == ("2/T1.nii.gz", "2/seg.nii.gz")
    both = find_cases(tmp_path, image_key="T1,DWI")
    assert short(both, tmp_path)["1"] == ("1/T1.nii.gz", "1/DWI.nii.gz", "1/seg.nii.gz")


def test_two_label_maps_of_an_image_are_named_or_chosen(tmp_path):
    make(tmp_path, "a.nii.gz", "a_seg.nii.gz", "a_mask.nii.gz")
    assert "are label maps of a; keep one" in find_cases(tmp_path).problems["a"]
    found = find_cases(tmp_path, label_key="seg")
    assert short(found, tmp_path) == {"a": ("a.nii.gz", "a_seg.nii.gz")} and over(found, tmp_path) == {"a_mask.nii.gz"}


def test_a_label_map_that_could_be_of_two_images_is_of_none(tmp_path):
    make(tmp_path / "plain", "p/x_T1.nii.gz", "p/y_T1.nii.gz", "p/seg.nii.gz")
    found = find_cases(tmp_path / "plain", image_key="T1")
    assert set(found.problems) == {"p/x", "p/y"} and "may be the label map of p/x and p/y" in found.problems["p/x"]
    make(tmp_path / "bids", *(f"sub-1/anat/sub-1_run-{n}_T1w.nii.gz" for n in (1, 2)), "sub-1/anat/sub-1_dseg.nii.gz")
    assert len(find_cases(tmp_path / "bids").problems) == 2


def test_an_image_with_the_name_of_a_label_map_is_named(tmp_path):
    make(tmp_path, "s1/image/a_seg.nii.gz", "s1/label/a.nii.gz", "s2/image/a.nii.gz")
    assert set(find_cases(tmp_path).remarks) == {"s1"}


def test_labels_of_a_medical_folder_in_a_folder_of_another_name_are_named(tmp_path):
    make(tmp_path, "s1/image/a.nii.gz", "s1/seg/a.nii.gz", "s2/image/a.nii.gz", "s2/label/a.nii.gz", "s2/mask/a.nii.gz")
    found = find_cases(tmp_path)
    assert over(found, tmp_path) == {"s1/seg"}
    assert "--label-key seg" in found.passed_over[tmp_path / "s1" / "seg"]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    ],
)
def test_folders_of_isic(tmp_path, images, masks):
    make(tmp_path, f"{images}/ISIC_0000000.jpg", f"{masks}/ISIC_0000000_segmentation.png", f"{images}/ATTRIBUTION.txt")
    assert len(find_cases(tmp_path).cases[0].labels) == 1


@pytest.mark.parametrize(
    "files",
    [
        ["case_0/imaging.nii.gz", "case_0/segmentation.nii.gz", "case_1/imaging.nii.gz", "case_1/segmentation.nii.gz"],
        ["a_image.nii.gz", "a_seg.nii.gz", "b_image.nii.gz", "b_seg.nii.gz"],
        ["images/a_img.nii.gz", "labels/a.nii.gz", "images/b_img.nii.gz", "labels/b.nii.gz"],
        ["p/scan.nii.gz", "p/drawn_seg.nii.gz"],
    ],
)
def test_an_image_has_one_name_whether_its_labels_are_asked_for_or_not(tmp_path, files):
    """Tables of centres and label maps of `segment` are found by the names that `prepare` gives."""
    make(tmp_path, *files)
    named = [case.name for case in find_cases(tmp_path).cases if case.labels]
    assert named and named == [case.name for case in find_images([tmp_path]).cases]
