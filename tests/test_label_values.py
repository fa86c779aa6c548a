"""Label values that are no class numbers: their classes in stores, and the way back in what `segment` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fedfactory.adaptation.adapt import synthetic_labels
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.inference import Outputs, segment
from fedfactory.adaptation.labels.weak_labels import weaken_folder
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.errors import ConfigError, UsageError, VolumeError
from fedfactory.imaging.formats.label_values import LabelValues, original_values, parse_label_values, suggestion
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import train_on_store
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import ball_volume, small_config, untrained_segmenter, write_site

HEART = "205=1,420=1,500=2"


def revalue(folder: Path, table: dict[int, int], dtype=np.int16) -> None:
    """Give the label maps of a site other values."""
    for path in sorted(folder.glob("*/label/*.nii.gz")):
        label = read_volume(path, integer=True)
        values = np.zeros(label.data.shape, dtype)
        for old, new in table.items():
            values[label.data == old] = new
        write_volume(path, Volume(values, label.affine))


def config(text: str | None = None, **changes) -> PrepareConfig:
    values = None if text is None else parse_label_values(text)
    return PrepareConfig(**{"domain": "x", "size": 16, "z_bins": 4, "label_values": values, **changes})


@pytest.fixture
def heart(tmp_path):
    write_site(tmp_path / "s", cases=3)
    revalue(tmp_path / "s", {1: 500, 2: 205})
    return tmp_path / "s"


# The mapping


def test_a_mapping_is_read_from_text_and_from_json(tmp_path):
    expected = LabelValues({205: 1, 420: 1, 500: 2}, rest=0)
    assert parse_label_values(" 205=1, 420 = 1,500=2,*=0") == expected
    (tmp_path / "values.json").write_text('\ufeff{"205": 1, "420": 1, "500": 2, "*": 0}', encoding="utf-8")
    assert parse_label_values(str(tmp_path / "values.json")) == expected
    assert parse_label_values(expected.text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "205", "205=", "=1", "a=1", "205=x", "205=-1", "1.5=1", "205=256", "1=1,1=2", "01=1,1=2", "*=0,*=1",
     "99999999999=1", "4294967296=1", "nowhere.json"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError):
        parse_label_values(text)


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"a": 1}', '{"1": 1.0}', '{"1": true}', '{"1": 1, "1": 2}', '{"1": {}}']
)
def test_other_json_files_are_refused(tmp_path, content):
    (tmp_path / "values.json").write_text(content)
    with pytest.raises(UsageError):
        parse_label_values(str(tmp_path / "values.json"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_values_become_classes(dtype):
    values = np.array([[0, 85], [170, 85]]).astype(dtype)
    np.testing.assert_array_equal(parse_label_values("85=1,170=2").apply(values), [[0, 1], [2, 1]])


def test_large_and_negative_values_become_classes():
    """Numbers of atlases are too far apart for a table of all values between them."""
    mapping = parse_label_values("614454277=1,-1=0,15564=2")
    np.testing.assert_array_equal(mapping.apply(np.array([[614454277, -1, 0], [15564, 0, -1]])), [[1, 0, 0], [2, 0, 0]])
    np.testing.assert_array_equal(mapping.apply(np.array([-1, 15564], np.int16)), [0, 2])


def test_a_value_without_class_is_an_error_unless_the_rest_has_one():
    values = np.array([0, 205, 421, 7])
    with pytest.raises(VolumeError, match=r"holds the values 7, 421, which --label-values does not name.*\*=0"):
        parse_label_values("205=1").apply(values)
    np.testing.assert_array_equal(parse_label_values("205=1,*=0").apply(values), [0, 1, 0, 0])
    np.testing.assert_array_equal(parse_label_values("*=1").apply(values), [0, 1, 1, 1])


def test_the_way_back_takes_the_value_that_was_named_first():
    mapping = parse_label_values("420=1,205=1,500=2,7=0")
    assert mapping.originals == {0: 0, 1: 420, 2: 500}
    np.testing.assert_array_equal(original_values(np.array([0, 1, 2]), mapping.originals), [0, 420, 500])
    assert parse_label_values("255=0,0=1").originals == {0: 255, 1: 0}  # 0 is no background here
    assert parse_label_values("7=0,0=0,1=1").originals == {0: 0, 1: 1}
    assert original_values(np.array([0, 1]), {0: 0, 1: 255}).dtype == np.uint8
    assert original_values(np.array([0, 1]), {0: -1, 1: 40000}).dtype == np.int32
    with pytest.raises(UsageError, match="class 3 has no original value"):
        original_values(np.array([3]), mapping.originals)


def test_a_suggestion_is_what_the_option_takes():
    assert suggestion([0, 255]) == "--label-values 255=1"
    assert suggestion([500, 205, 0]) == "--label-values 205=1,500=2"
    assert suggestion(range(100)).endswith("8=8,...")


# Stores


def test_a_store_holds_classes_and_keeps_the_mapping(heart, tmp_path):
    made = prepare(heart, tmp_path / "out", config(HEART))
    assert not made.failed
    assert made.store.classes == 3
    assert set(np.unique(made.store.labels)) == {0, 1, 2}
    assert set(made.store.cases[0].facts.label_volumes) == {"1", "2"}
    assert SliceStore(tmp_path / "out").label_values == parse_label_values(HEART)


def test_label_values_give_the_store_that_class_numbers_give(heart, tmp_path):
    """205 is the core here, class 2 of the site that was written."""
    write_site(tmp_path / "plain", cases=3)
    plain, mapped = (
        prepare(folder, tmp_path / name, config(text)).store
        for folder, name, text in ((tmp_path / "plain", "a", None), (heart, "b", "500=1,205=2"))
    )
    np.testing.assert_array_equal(plain.labels, mapped.labels)
    np.testing.assert_array_equal(plain.references, mapped.references)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({1: 500, 2: 205}, "holds label 500; .* --label-values 205=1,500=2"),
        ({1: 255, 2: 255}, "holds label 255; .* --label-values 255=1"),
        ({1: -1, 2: 1}, "values go from -1 to 1; .* --label-values -1=1,1=2"),
        ({1: 70000, 2: 1}, "values go from 0 to 70000; .* --label-values 1=1,70000=2"),
    ],
)
def test_values_that_are_no_classes_are_refused_with_the_option(tmp_path, table, message):
    write_site(tmp_path / "s", cases=1)
    revalue(tmp_path / "s", table, np.int32)
    with pytest.raises(VolumeError, match=message):
        prepare(tmp_path / "s", tmp_path / "out", config())
    option = str(next(iter(_failed(tmp_path / "s", tmp_path).values()))).rsplit(" ", 1)[1]
    assert not prepare(tmp_path / "s", tmp_path / "out", config(option)).failed  # what is suggested works


def _failed(source: Path, tmp_path: Path) -> dict[str, str]:
    write_site(source / ".." / "more", cases=1)
    (source / ".." / "more" / "case0").rename(source / "good")
    failed = prepare(source, tmp_path / "failing", config()).failed
    (source / "good").rename(source / ".." / "more" / "used")
    return failed


def test_gaps_between_values_are_warned_of_with_the_option(tmp_path):
    write_site(tmp_path / "s", cases=3)
    revalue(tmp_path / "s", {1: 85, 2: 170})
    store = prepare(tmp_path / "s", tmp_path / "out", config()).store
    assert any("--label-values 85=1,170=2" in text for text in store.warnings)
    store = prepare(tmp_path / "s", tmp_path / "other", config("85=1,170=2")).store
    assert not [text for text in store.warnings if "never occur" in text]


def test_later_runs_use_the_mapping_of_the_store(heart, tmp_path):
    prepare(heart, tmp_path / "out", config(HEART))
    write_site(tmp_path / "more", cases=1, radius=6.0)
    revalue(tmp_path / "more", {1: 500, 2: 420})
    (tmp_path / "more" / "case0").rename(heart / "new")
    again = prepare(heart, tmp_path / "out", config())
    assert (again.unchanged, again.added, again.failed) == (3, 1, {})
    assert again.store.label_values == parse_label_values(HEART)
    assert again.store.classes == 3


def test_another_mapping_makes_the_labels_anew(heart, tmp_path):
    prepare(heart, tmp_path / "out", config(HEART))
    again = prepare(heart, tmp_path / "out", config("500=1,*=0"))
    assert again.replaced == 3
    assert set(np.unique(again.store.labels)) == {0, 1}
    assert again.store.label_values == parse_label_values("500=1,*=0")


def test_cases_that_stay_with_another_mapping_are_a_conflict(heart, tmp_path):
    prepare(heart, tmp_path / "out", config(HEART))
    (heart / "case0").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"label_values is '205=1,420=1,500=2' for 1 cases that stay, such as case0"):
        prepare(heart, tmp_path / "out", config("500=1,*=0"))


def test_sparse_labels_keep_what_nobody_annotated(tmp_path):
    """The value of what nobody annotated is one of the file, and may be 0 or the number of a class."""
    write_site(tmp_path / "s", cases=1)
    revalue(tmp_path / "s", {0: 2, 1: 205, 2: 0})
    made = prepare(
        tmp_path / "s", tmp_path / "out", config("205=2,2=0", label_kind="scribble", unlabelled_value=0)
    )  # fmt: skip
    assert set(np.unique(made.store.labels)) == {0, 2, 255}


def test_tables_of_structures_hold_values_too(tmp_path):
    write_site(tmp_path / "s", cases=1)
    folder = tmp_path / "s" / "case0" / "label"
    (folder / "mask.nii.gz").unlink()
    (folder / "seen.csv").write_text("SLICE,LABEL\n2,205\n3,500\n")
    store = prepare(tmp_path / "s", tmp_path / "out", config(HEART, label_kind="image")).store
    assert store.classes == 3
    assert [np.flatnonzero(column).tolist() for column in store.presence.T[1:]] == [[2], [3]]


def test_a_class_number_too_high_is_no_case_for_the_option(tmp_path):
    write_site(tmp_path / "s", cases=1)
    with pytest.raises(VolumeError, match=r"holds label 2; 1 is the highest that is expected$"):
        prepare(tmp_path / "s", tmp_path / "out", config(classes=2))


def test_names_are_of_classes_not_of_values(heart, tmp_path):
    store = prepare(heart, tmp_path / "out", config(HEART, class_names={1: "myocardium", 2: "ventricle"})).store
    assert store.class_names == {1: "myocardium", 2: "ventricle"}


@pytest.mark.parametrize("changes", [{"mask_key": "mask", "mask_as_class": True}])
def test_a_mask_that_becomes_a_class_excludes_label_values(changes):
    with pytest.raises(UsageError, match="leave label_values out"):
        config(HEART, **changes)


# Segmenters


def labelled_segmenter(heart: Path, tmp_path: Path) -> Path:
    store = prepare(
        heart, tmp_path / "store", config(HEART, label_kind="dense", validation_share=0, test_share=0)
    ).store
    train_on_store(store, small_config(updates=1)).save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_segment_writes_the_values_of_the_labelled_site(heart, tmp_path):
    model = labelled_segmenter(heart, tmp_path)
    assert Segmenter.load(model).card.originals == {0: 0, 1: 205, 2: 500}
    image = heart / "case0" / "image" / "scan.nii.gz"
    (plain,) = segment([image], [model], tmp_path / "plain")
    (mapped,) = segment([image], [model], tmp_path / "mapped", outputs=Outputs(original_values=True))
    classes, values = (read_volume(path, integer=True).data for path in (plain, mapped))
    np.testing.assert_array_equal(values, np.array([0, 205, 500])[classes])
    assert set(np.unique(values)) > {0}  # an untrained network finds something


def test_a_segmenter_of_class_numbers_has_no_way_back(heart, tmp_path):
    untrained_segmenter().save(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="the labels that it learnt from are class numbers"):
        segment(
            [heart / "case0" / "image" / "scan.nii.gz"],
            [tmp_path / "model.safetensors"],
            tmp_path / "out",
            outputs=Outputs(original_values=True),
        )


def test_a_card_with_impossible_values_is_refused():
    card = untrained_segmenter().card
    for wrong in ({"a": 1}, {"300": 1}, {"-1": 1}, {"1": 2**40}):
        with pytest.raises(ConfigError, match="original_values"):
            type(card)(**{**vars(card), "original_values": wrong})


def test_synthetic_volumes_carry_the_values(tmp_path):
    manifest = {"class_names": {"1": "a"}, "original_values": {"0": 0, "1": 205}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert synthetic_labels(tmp_path) == manifest
    (tmp_path / "manifest.json").write_text(json.dumps({"original_values": {"1": "x"}}))
    with pytest.raises(UsageError, match="damaged"):
        synthetic_labels(tmp_path)


# References


def test_evaluate_reads_references_in_their_own_values(heart, tmp_path):
    reference = tmp_path / "reference"
    for number in range(2):
        label = ball_volume(seed=number)[1]
        write_volume(tmp_path / "predicted" / f"c{number}.nii.gz", label)
        write_volume(
            reference / f"c{number}.nii.gz", Volume(np.array([0, 205, 500], np.int16)[label.data], label.affine)
        )
    scores = evaluate(
        tmp_path / "predicted", reference, tmp_path / "scores.csv", values=parse_label_values(HEART)
    ).scores  # fmt: skip
    assert {(score.label, score.dice) for score in scores} == {(1, 1.0), (2, 1.0)}
    assert not [text for text in evaluate(tmp_path / "predicted", tmp_path / "predicted").warnings if "common" in text]
    found = evaluate(tmp_path / "predicted", reference)
    assert all(score.dice != 1.0 for score in found.scores)
    (warning,) = [text for text in found.warnings if "none in common" in text]
    assert warning.endswith("--label-values 205=1,500=2")


def test_labels_are_weakened_by_class(heart, tmp_path):
    with pytest.raises(VolumeError, match="--label-values 205=1,500=2"):
        weaken_folder(heart, tmp_path / "none", "box")
    weaken_folder(heart, tmp_path / "weak", "box", values=parse_label_values(HEART))
    label = read_volume(next((tmp_path / "weak").glob("case0/label/*.nii.gz")), integer=True)
    assert set(np.unique(label.data)) == {0, 1, 2}


# NaN and frames in stores and segmenters


def test_nan_as_background_goes_with_store_and_segmenter(tmp_path):
    write_site(tmp_path / "s", cases=3)
    for path in (tmp_path / "s").glob("case[01]/image/*.nii.gz"):
        image = read_volume(path)
        write_volume(path, Volume(np.where(image.data < 20, np.float32(np.nan), image.data), image.affine))
    first = prepare(tmp_path / "s", tmp_path / "out", config(validation_share=0, test_share=0))
    assert first.failed.keys() == {"case0", "case1"}
    assert all("--nan background" in text for text in first.failed.values())
    second = prepare(tmp_path / "s", tmp_path / "out", config(nan="background", validation_share=0, test_share=0))
    assert (second.added, second.unchanged, second.failed) == (2, 1, {})
    assert second.store.format.nan == "background"
    assert prepare(tmp_path / "s", tmp_path / "out", config(validation_share=0, test_share=0)).unchanged == 3
    with pytest.raises(UsageError, match="nan is background, not refuse"):
        prepare(tmp_path / "s", tmp_path / "out", config(nan="refuse"))
    train_on_store(second.store, small_config(updates=1)).save(tmp_path / "model.safetensors")
    image = tmp_path / "s" / "case0" / "image" / "scan.nii.gz"
    assert segment([image], [tmp_path / "model.safetensors"], tmp_path / "found")
    with pytest.raises(VolumeError, match="NaN"):
        segment([image], [tmp_path / "model.safetensors"], tmp_path / "other", nan="refuse")


def test_frames_are_cases_of_one_patient_in_stores_and_files_of_segment(tmp_path):
    for number in range(2):
        image, label = ball_volume(seed=number)
        later = ball_volume(seed=number + 10)
        case = tmp_path / "s" / f"anna{'ab'[number]}"
        write_volume(case / "image" / "cine.nii.gz", Volume(np.stack([image.data, later[0].data], 3), image.affine))
        write_volume(case / "label" / "cine.nii.gz", Volume(np.stack([label.data, later[1].data], 3), image.affine))
    with pytest.raises(VolumeError, match=r"2 frames .* --frames"):
        prepare(tmp_path / "s", tmp_path / "out", config())
    made = prepare(tmp_path / "s", tmp_path / "out", config(frames="each", validation_share=0, test_share=0))
    names = {case.name: case.patient for case in made.store.cases}
    assert names == {
        "annaa_frame01": "annaa", "annaa_frame02": "annaa", "annab_frame01": "annab", "annab_frame02": "annab",
    }  # fmt: skip
    assert not made.store.warnings
    one = prepare(tmp_path / "s", tmp_path / "one", config(frames="2"))
    alone = next(case for case in made.store.cases if case.name == "annaa_frame02")
    assert next(case for case in one.store.cases if case.name == "annaa").voxels == alone.voxels
    again = prepare(tmp_path / "s", tmp_path / "one", config(frames="1"))
    assert again.replaced == 2  # another frame is another case under the same name
    untrained_segmenter().save(tmp_path / "model.safetensors")
    image = tmp_path / "s" / "annaa" / "image" / "cine.nii.gz"
    found = segment([image], [tmp_path / "model.safetensors"], tmp_path / "found", frames="each")
    assert [path.name for path in found] == ["cine_frame01.nii.gz", "cine_frame02.nii.gz"]
    with pytest.raises(VolumeError, match="--frames"):
        segment([image], [tmp_path / "model.safetensors"], tmp_path / "none")


def test_a_table_of_patients_may_name_what_frames_were_cut_from(tmp_path):
    image = ball_volume()[0]
    cine = Volume(np.stack([image.data, image.data + 1], 3), image.affine)
    write_volume(tmp_path / "s" / "scan.nii.gz", cine)
    made = prepare(tmp_path / "s", tmp_path / "out", config(frames="each", patients={"scan": "p1"}))
    assert {case.patient for case in made.store.cases} == {"p1"}


def write_meta(path: Path, volume: Volume) -> None:
    """A MetaImage file, whose world has the opposite sign of x and y."""
    kind = {"float32": "MET_FLOAT", "uint8": "MET_UCHAR"}[volume.data.dtype.name]
    lines = [
        "ObjectType = Image", "NDims = 3", "TransformMatrix = -1 0 0 0 -1 0 0 0 1", "Offset = 0 0 0",
        f"ElementSpacing = {' '.join(map(str, volume.spacing))}", f"DimSize = {' '.join(map(str, volume.data.shape))}",
        f"ElementType = {kind}", "ElementDataFile = LOCAL", "",
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode() + volume.data.tobytes("F"))


def test_segment_evaluate_and_weaken_labels_read_other_formats(tmp_path):
    image, label = ball_volume()
    write_meta(tmp_path / "s" / "case0" / "image" / "scan.mha", image)
    write_meta(tmp_path / "s" / "case0" / "label" / "drawn.mha", label)
    write_volume(tmp_path / "scan.nii.gz", image)
    untrained_segmenter().save(tmp_path / "model.safetensors")
    images = [tmp_path / "s" / "case0" / "image" / "scan.mha", tmp_path / "scan.nii.gz"]
    ours, plain = (
        read_volume(segment([file], [tmp_path / "model.safetensors"], tmp_path / f"out{number}")[0], integer=True)
        for number, file in enumerate(images)
    )
    np.testing.assert_array_equal(ours.data, plain.data)
    np.testing.assert_allclose(ours.affine, plain.affine, atol=1e-6)
    write_volume(tmp_path / "predicted" / "case0.nii.gz", label)
    found = evaluate(tmp_path / "predicted", tmp_path / "s")
    assert {score.dice for score in found.scores} == {1.0}
    assert weaken_folder(tmp_path / "s", tmp_path / "weak", "box") == 1
