"""Pictures are found with their masks, however a public data set lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedfactory.errors import UsageError
from fedfactory.imaging.case_files import Found
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.patients import read_patient_table
from fedfactory.imaging.pictures.finding import find_picture_cases


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def find(root: Path, label_key: str | None = "label", **options) -> Found:
    found = find_picture_cases(root, label_key=label_key, **options)
    assert found is not None
    return found


def pairs(found: Found, root: Path) -> dict[str, tuple]:
    """For every case its picture and its labels: paths, and (path, value) where the value is given."""

    def short(path: Path) -> str:
        return path.relative_to(root).as_posix()

    return {
        case.name: (
            *(short(path) for path in case.channels),
            *(short(label.path) if label.value is None else (short(label.path), label.value) for label in case.labels),
        )
        for case in found.cases
    }


# folders of pictures and masks


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        ("images", "masks"),
        ("image", "label"),
        ("imgs", "annotations"),
        ("Original", "Ground Truth"),
        ("Images", "labels"),
        ("img", "segmentations"),
    ],
)
def test_a_folder_of_masks_beside_a_folder_of_pictures(tmp_path, pictures, masks):
    make(tmp_path, f"{pictures}/b.jpg", f"{pictures}/a.tif", f"{masks}/a.png", f"{masks}/b_mask.png", "train.txt")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "a": (f"{pictures}/a.tif", f"{masks}/a.png"),
        "b": (f"{pictures}/b.jpg", f"{masks}/b_mask.png"),
    }
    assert [case.name for case in found.cases] == ["a", "b"]
    assert not found.remarks and not found.problems
    assert pairs(find(tmp_path, None), tmp_path) == {"a": (f"{pictures}/a.tif",), "b": (f"{pictures}/b.jpg",)}


@pytest.mark.parametrize(
    "suffix",
    ["_mask", "_segmentation", "_Segmentation", "_seg", "_gt", "_label", "_manual1", "_1stHO", "-1stHO", "_mask_1"],
)
def test_suffixes_of_masks(tmp_path, suffix):
    make(tmp_path, "images/x 1.JPG", f"masks/x 1{suffix}.png")
    assert pairs(find(tmp_path), tmp_path) == {"x 1": ("images/x 1.JPG", f"masks/x 1{suffix}.png")}


def test_what_has_no_partner_is_named(tmp_path):
    make(tmp_path, "images/a.png", "images/b.png", "images/c.webp", "masks/a.png", "masks/old.png", "other/a.png")
    found = find(tmp_path)
    assert len(found.cases) == 2
    assert found.remarks["b"] == "has no mask, so it counts as unlabelled"
    assert found.remarks["masks/old.png"] == "has no picture of its name, so it is not used"
    assert "images/c.webp" in found.remarks
    assert "label_key" in found.remarks[f"{tmp_path.name}/other"]


def test_a_folder_of_masks_where_nothing_fits_is_refused(tmp_path):
    make(tmp_path, "images/a.png", "masks/x1.png", "masks/x2.png")
    with pytest.raises(UsageError, match=r"masks: none of its 2 masks, such as x1.png, has the name of a picture"):
        find(tmp_path)


def test_two_folders_that_may_hold_the_masks_need_a_choice(tmp_path):
    make(tmp_path, "images/a.png", "masks/a.png", "annotations/a.png", "experts/a.png")
    with pytest.raises(UsageError, match="holds annotations and masks; choose one of them by label_key"):
        find(tmp_path)
    for key in ("annotations", "experts"):
        assert pairs(find(tmp_path, key), tmp_path) == {"a": ("images/a.png", f"{key}/a.png")}
    with pytest.raises(UsageError, match="label_key is 'nobody'"):
        find(tmp_path, "nobody")
    make(tmp_path, "imgs/a.png")
    with pytest.raises(UsageError, match="holds images and imgs; choose one of them by image_key"):
        find(tmp_path, "experts")
    assert pairs(find(tmp_path, "masks", image_key="imgs"), tmp_path) == {"a": ("imgs/a.png", "masks/a.png")}


def test_two_pictures_of_one_name_are_a_problem(tmp_path):
    make(tmp_path, "images/a.png", "images/A.jpg", "images/b.png", "masks/a.png", "masks/b.png")
    found = find(tmp_path)
    assert [case.name for case in found.cases] == ["b"]
    assert all("have the same name; keep one" in problem for problem in found.problems.values())
    assert len(found.problems) == 2


@pytest.mark.parametrize("folder", ["masks/", "masks/disc/", ""])
def test_two_masks_of_one_name_are_a_problem(tmp_path, folder):
    images = "images/" if folder else ""
    make(tmp_path, f"{images}a.jpg", f"{images}b.jpg", f"{folder}b_mask.png", f"{folder}b_mask_1.png")
    make(tmp_path, f"{folder}a_mask.png", f"{folder}A_mask.tif")
    found = find(tmp_path)
    assert [(case.name, len(case.labels)) for case in found.cases] == [("b", 2)]
    assert "have the same name; keep one of them" in found.problems["a"]


def test_two_masks_of_one_name_in_the_folder_of_a_subject_are_a_problem(tmp_path):
    make(tmp_path, "a/image/x.png", "a/label/m.png", "a/label/m.gif", "b/image/x.png", "b/label/m.png")
    found = find(tmp_path)
    assert [case.name for case in found.cases] == ["b"]
    assert "have the same name; keep one of them" in found.problems["a"]


def test_masks_may_lie_in_a_folder_among_the_pictures(tmp_path):
    make(tmp_path, "a.jpg", "masks/a.png")
    assert pairs(find(tmp_path), tmp_path) == {"a": ("a.jpg", "masks/a.png")}


def test_tables_may_stand_for_masks(tmp_path):
    make(tmp_path, "images/a.png", "images/b.png", "images/c.png", "labels/a.csv", "labels/b.png")
    make(tmp_path, "labels/c.csv", "labels/c.png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {"a": ("images/a.png", "labels/a.csv"), "b": ("images/b.png", "labels/b.png")}
    assert "holds c.csv, c.png for one picture" in found.problems["c"]


def test_folders_of_classes_get_their_labels_in_the_order_of_their_names(tmp_path):
    make(tmp_path, "images/a.png", "images/b.png", "masks/DISC/a.png", "masks/CUP/a.png", "masks/CUP/b_cup_mask.png")
    make(tmp_path, "masks/background/a.png", "masks/CUP/b.png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "a": ("images/a.png", ("masks/background/a.png", 0), ("masks/CUP/a.png", 1), ("masks/DISC/a.png", 2)),
        "b": ("images/b.png", ("masks/CUP/b.png", 1)),
    }
    assert found.class_names == {1: "CUP", 2: "DISC"}  # the background is no class with a name
    assert "CUP/b_cup_mask.png" in found.remarks


def test_folders_of_classes_with_numbers_keep_them(tmp_path):
    make(tmp_path, "images/a.png", "masks/2/a.png", "masks/10/a.png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {"a": ("images/a.png", ("masks/2/a.png", 2), ("masks/10/a.png", 10))}


# data sets in parts


def test_drive(tmp_path):
    for part, numbers in (("training", (21, 22)), ("test", (1, 2))):
        for n in numbers:
            make(tmp_path, f"{part}/images/{n:02d}_{part}.tif", f"{part}/mask/{n:02d}_{part}_mask.gif")
            make(tmp_path, f"{part}/1st_manual/{n:02d}_manual1.gif", f"{part}/2nd_manual/{n:02d}_manual2.gif")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        f"{n:02d}_{part}": (f"{part}/images/{n:02d}_{part}.tif", f"{part}/1st_manual/{n:02d}_manual1.gif")
        for part, n in (("training", 21), ("training", 22), ("test", 1), ("test", 2))
    }
    assert "the field of view, so it is not used" in found.remarks["training/mask"]
    assert "a second observer's masks" in found.remarks["test/2nd_manual"]


def test_parts_without_masks_are_named_and_equal_names_get_their_folder(tmp_path):
    make(tmp_path, "train/images/1.png", "train/masks/1.png", "test/images/1.png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "test/1": ("test/images/1.png",),
        "train/1": ("train/images/1.png", "train/masks/1.png"),
    }
    assert found.remarks["test"] == "has no masks, so its pictures count as unlabelled"


def test_parts_inside_the_folders_of_pictures_and_masks(tmp_path):
    make(tmp_path, "images/train/a.png", "images/val/b.png", "labels/train/a.png", "labels/val/b.png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "a": ("images/train/a.png", "labels/train/a.png"),
        "b": ("images/val/b.png", "labels/val/b.png"),
    }


def test_folders_of_unclear_meaning_need_a_choice(tmp_path):
    make(tmp_path, "CXR_png/a.png", "lung_masks/a.png")
    with pytest.raises(UsageError, match="CXR_png, lung_masks holds the pictures is unclear"):
        find(tmp_path)
    found = find(tmp_path, "lung_masks", image_key="CXR_png")
    assert pairs(found, tmp_path) == {"a": ("CXR_png/a.png", "lung_masks/a.png")}


# pictures and masks in one folder


def test_busi(tmp_path):
    make(tmp_path, "benign/benign (1).png", "benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png")
    make(tmp_path, "normal/normal (1).png", "normal/normal (1)_mask.png", "normal/normal (2).png")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "benign (1)": (
            "benign/benign (1).png",
            "benign/benign (1)_mask.png",
            "benign/benign (1)_mask_1.png",
        ),
        "normal (1)": ("normal/normal (1).png", "normal/normal (1)_mask.png"),
        "normal (2)": ("normal/normal (2).png",),
    }
    assert set(found.remarks) == {"normal (2)"}
    assert all(len(files) == 1 for files in pairs(find(tmp_path, None), tmp_path).values())


def test_isic_and_chase(tmp_path):
    make(tmp_path / "isic", "I_1.jpg", "I_1_segmentation.png", "I_1_superpixels.png", "I_2_segmentation.png")
    found = find(tmp_path / "isic")
    assert pairs(found, tmp_path / "isic") == {"I_1": ("I_1.jpg", "I_1_segmentation.png")}
    assert set(found.remarks) == {"isic/I_1_superpixels.png", "isic/I_2_segmentation.png"}
    make(tmp_path / "chase", "Image_01L.jpg", "Image_01L_1stHO.png", "Image_01L_2ndHO.png")
    found = find(tmp_path / "chase")
    assert pairs(found, tmp_path / "chase") == {"Image_01L": ("Image_01L.jpg", "Image_01L_1stHO.png")}
    assert set(found.remarks) == {"chase/Image_01L_2ndHO.png"}


def test_an_own_suffix_is_given_by_the_key(tmp_path):
    make(tmp_path, "a.jpg", "a_polyp.png")
    assert pairs(find(tmp_path, "polyp"), tmp_path) == {"a": ("a.jpg", "a_polyp.png")}


def test_pictures_alone_keep_names_that_look_like_masks(tmp_path):
    make(tmp_path, "skin_lesion_1.jpg", "skin_lesion_2.jpg", ".hidden.png", "notes.txt")
    assert set(pairs(find(tmp_path), tmp_path)) == {"skin_lesion_1", "skin_lesion_2"}


def test_a_folder_without_pictures_is_none_of_ours(tmp_path):
    make(tmp_path, "case0/image/scan.nii.gz", "case0/label/mask.nii.gz", "notes.txt")
    assert find_picture_cases(tmp_path, label_key="label") is None
    make(tmp_path, "imagesTr/a_0000.nii.gz")
    assert find_picture_cases(tmp_path, label_key="label") is None


# layouts of other programs


def test_folders_of_subjects(tmp_path):
    make(tmp_path, "p1/image/x.png", "p1/label/y.png", "p1/label/z.png", "p2/image/x.png", "p3/image/x.png")
    make(tmp_path, "p3/image/y.png", "p3/label/y.png", "p4/label/y.png", "p5/image/x.png", "p5/label/t.csv")
    found = find(tmp_path)
    assert pairs(found, tmp_path) == {
        "p1": ("p1/image/x.png", "p1/label/y.png", "p1/label/z.png"),
        "p2": ("p2/image/x.png",),
        "p5": ("p5/image/x.png", "p5/label/t.csv"),
    }
    assert "holds 2 pictures; expected one" in found.problems["p3"]
    assert found.without_image == ["p4"]
    assert set(found.remarks) == {"p2"}
    assert find(tmp_path, None).remarks == {}


def test_nnunet(tmp_path):
    make(tmp_path, "imagesTr/c_1_0000.png", "imagesTr/c_2_0000.png", "imagesTr/c_3_0000.png")
    (tmp_path / "dataset.json").write_text("{}")
    make(tmp_path, "labelsTr/c_1.png", "labelsTr/c_2.png", "labelsTr/c_9.png")
    found = find_cases(tmp_path)
    assert pairs(found, tmp_path) == {
        "c_1": ("imagesTr/c_1_0000.png", "labelsTr/c_1.png"),
        "c_2": ("imagesTr/c_2_0000.png", "labelsTr/c_2.png"),
        "c_3": ("imagesTr/c_3_0000.png",),
    }
    assert set(found.remarks) == {"c_3"} and set(found.passed_over) == {tmp_path / "labelsTr" / "c_9.png"}
    make(tmp_path, "imagesTr/c_1_0001.png", "imagesTr/c_2_0001.png")
    found = find_cases(tmp_path)
    assert pairs(found, tmp_path)["c_1"] == ("imagesTr/c_1_0000.png", "imagesTr/c_1_0001.png", "labelsTr/c_1.png")
    assert "has no channel 1" in found.problems["c_3"]
    assert pairs(find_cases(tmp_path, image_key="1"), tmp_path)["c_2"] == ("imagesTr/c_2_0001.png", "labelsTr/c_2.png")
    with pytest.raises(UsageError, match="image_key is 'red'"):
        find_cases(tmp_path, image_key="red")


def test_numbers_of_nnunet_cases_are_no_channels(tmp_path):
    make(tmp_path, "imagesTr/polyp_0001.png", "imagesTr/polyp_0002.png", "labelsTr/polyp_0001.png")
    (tmp_path / "dataset.json").write_text("{}")
    make(tmp_path, "labelsTr/polyp_0002.png", "imagesTr/polyp_0321.png")
    assert set(pairs(find_cases(tmp_path), tmp_path)) == {"polyp_0001", "polyp_0002", "polyp_0321"}


# patients


def test_tables_of_patients(tmp_path):
    (tmp_path / "p.csv").write_text("CASE,PATIENT\na,1\nb, 1\nc,2\n")
    assert read_patient_table(tmp_path / "p.csv") == {"a": "1", "b": "1", "c": "2"}
    (tmp_path / "p.csv").write_text("name,group,more\na,7,x\n")
    assert read_patient_table(tmp_path / "p.csv") == {"a": "7"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the columns CASE,PATIENT"),
        ("case,group\na,1\n", "needs the columns CASE,PATIENT"),
        ("CASE,PATIENT\n", "has no row"),
        ("CASE,PATIENT\na,1\nb\n", "line 3: a case or its patient is empty"),
        ("CASE,PATIENT\na,1\na,2\n", "line 3: case 'a' has two patients"),
    ],
)
def test_a_wrong_table_of_patients_is_named(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_patient_table(tmp_path / "p.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        read_patient_table(tmp_path / "none.csv")


def test_the_field_of_view_is_no_label_where_other_pictures_have_manual_masks(tmp_path):
    training = [f"training/{folder}/{n}.png" for folder in ("images", "1st_manual", "mask") for n in (1, 2)]
    make(tmp_path, *training, "test/images/3.png", "test/mask/3.png")
    found = find(tmp_path)
    assert {case.name: [label.path.parent.name for label in case.labels] for case in found.cases} == {
        "1": ["1st_manual"],
        "2": ["1st_manual"],
        "3": [],
    }
    assert "the field of view" in found.remarks["test/mask"]
