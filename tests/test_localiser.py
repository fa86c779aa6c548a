"""A localiser finds small organs in whole images, and slices are cut around them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig, localiser_config
from fedfactory.adaptation.engine.training_plan import DataFacts, TrainingPlan, plan_training
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.localiser import Localiser, find_place, load_localiser, locate
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.adaptation.training.segmenter_training import train_segmenter
from fedfactory.common.weights_file import read_weights, write_weights
from fedfactory.errors import CheckpointError, ConfigError, UsageError, VolumeError
from fedfactory.imaging.cases import CaseFiles, find_images
from fedfactory.imaging.centre_table import read_centre_table, write_centre_table
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import label_factory, train_localiser, train_on_store
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import folder_bytes, image_of, oriented
from test_cli import run
from test_field_of_view import table
from torch import nn

COARSE = PrepareConfig(domain="bright", size=24, z_bins=4, validation_share=0, test_share=0)
NARROW = replace(COARSE, size=16, field_of_view=30.0)  # a quarter of the body of 120 mm
TINY = SegmenterConfig(updates=120, width=8, depth=3, batch_size=8, learning_rate=1e-2, mirror=False, rotation=0.0)
ORGANS = ((44, 16), (16, 14), (42, 40))  # in-plane voxels of 2 mm, far from the body's middle at (35, 27)


def body(organ=None, seed=0) -> tuple[Volume, Volume]:
    """A body of 120 x 90 mm in air, with a bright organ of 14 mm or none; and its label."""
    image = np.random.default_rng(seed).normal(0, 0.5, (70, 60, 4)).astype(np.float32)
    image[5:65, 5:50] += 50
    label = np.zeros(image.shape, np.uint8)
    if organ is not None:
        label[organ[0] - 3 : organ[0] + 4, organ[1] - 3 : organ[1] + 4, 1:3] = 1
    image[label == 1] += 60
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    affine[:3, 3] = [-70, 30, 400]
    return Volume(image, affine), Volume(label, affine)


def write_cases(folder, organs) -> None:
    for number, organ in enumerate(organs):
        for volume, name in zip(body(organ, number), ("image", "label"), strict=True):
            write_volume(folder / f"case{number}" / name / "v.nii.gz", volume)


def tilted(volume: Volume) -> Volume:
    """The same voxels in another axis order, turned by 0.3 radians, elsewhere in the scanner."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    turn[:3, 3] = [30, -20, 100]
    flipped = oriented(volume, "LPS")
    return Volume(flipped.data, turn @ flipped.affine)


def middle(label: Volume) -> np.ndarray:
    """Of what is labelled, in scanner millimetres."""
    return (label.affine @ [*np.argwhere(label.data).mean(axis=0), 1.0])[:3]


@pytest.fixture(scope="module")
def organs(tmp_path_factory):
    """A folder of three cases with an organ each."""
    folder = tmp_path_factory.mktemp("organs")
    write_cases(folder, ORGANS)
    return folder


@pytest.fixture(scope="module")
def coarse(organs, tmp_path_factory):
    """A store of the whole images, in pixels of 5 mm."""
    return prepare(organs, tmp_path_factory.mktemp("stores") / "coarse", COARSE).store


@pytest.fixture(scope="module")
def localiser_file(coarse, tmp_path_factory):
    path = tmp_path_factory.mktemp("localiser") / "localiser.safetensors"
    train_localiser(coarse.path, TINY, out=path)
    return path


@pytest.fixture(scope="module")
def localiser(localiser_file) -> Localiser:
    return load_localiser(localiser_file)


def blind(localiser: Localiser, path) -> Localiser:
    """A localiser that finds nothing anywhere."""
    tensors, _ = read_weights(localiser.path, kind="segmenter")
    made = Segmenter.from_dict(localiser.segmenter.to_dict())
    made.network.load_state_dict(tensors)
    last = [module for module in made.network.modules() if getattr(module, "bias", None) is not None][-1]
    last.bias.data = torch.tensor([1000.0, 0.0])
    made.save(path)
    return load_localiser(path)


# finding


@pytest.mark.parametrize("organ", [(44, 16), (22, 40)])
def test_an_organ_far_from_the_middle_is_found_within_a_pixel(localiser, organ):
    for image, label in (body(organ, 7), tuple(map(tilted, body(organ, 7)))):
        found = find_place(image_of(image), localiser.segmenter)
        assert np.abs(np.array(found.centre) - middle(label)).max() < 5
        true = label.data.sum() * 20 / 1000
        assert 0.4 * true < found.millilitres < 2.5 * true


def test_the_same_image_gives_the_same_place_and_digest_in_every_file(localiser, localiser_file, tmp_path):
    image, _ = body(ORGANS[0])
    localiser.segmenter.save(tmp_path / "copy.safetensors")
    copy = load_localiser(tmp_path / "copy.safetensors")
    assert copy.digest == localiser.digest == load_localiser(localiser_file).digest
    assert copy.find("a", image_of(image)) == localiser.find("a", image_of(image))
    assert blind(localiser, tmp_path / "blind.safetensors").digest != localiser.digest


def test_all_parts_of_structures_that_are_no_single_object_count(localiser):
    image, _ = body(ORGANS[0])
    image.data[13:20, 11:18, 1:3] += 60
    single, both = (
        find_place(image_of(image), Segmenter(localiser.segmenter.network, localiser.segmenter.format, card))
        for card in (localiser.segmenter.card, replace(localiser.segmenter.card, single_objects=()))
    )
    first, second = (middle(body(organ)[1]) for organ in (ORGANS[0], (16, 14)))
    assert localiser.segmenter.card.single_objects == (0, 1)
    assert min(np.abs(np.array(single.centre) - place).max() for place in (first, second)) < 5
    assert np.abs(np.array(both.centre) - (first + second) / 2).max() < 5
    assert both.millilitres > 1.5 * single.millilitres


def test_windows_of_a_localiser_are_whole_slices():
    plan = plan_training(DataFacts(size=60, extent=6, classes=2), localiser_config(SegmenterConfig()))
    assert plan.window >= 60
    assert plan_training(DataFacts(size=60, extent=6, classes=2), SegmenterConfig()).window < 30


def test_a_segmenter_that_sees_a_part_of_its_slices_is_no_localiser(coarse, tmp_path):
    train_on_store(coarse, replace(TINY, updates=1)).save(tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match="sees 8 of its slices' 24 pixels"):
        load_localiser(tmp_path / "s.safetensors")


def test_a_localiser_is_trained_on_whole_images_alone(organs, localiser, tmp_path):
    store = prepare(organs, tmp_path / "out", replace(NARROW, centres=localiser)).store
    with pytest.raises(UsageError, match=r"3 cases, such as case0, are cut around given places"):
        train_localiser(store.path, TINY)


@pytest.mark.parametrize(
    ("volumes", "accepted"), [(None, True), ((1.0, 1.5), True), ((20.0, 99.0), False), ((0.1, 0.2), False)]
)
def test_a_find_of_a_size_that_no_structures_have_is_none(localiser, volumes, accepted):
    segmenter = Segmenter(
        localiser.segmenter.network, localiser.segmenter.format, replace(localiser.segmenter.card, volumes=volumes)
    )
    given, image = Localiser(localiser.path, segmenter), body(ORGANS[0])[0]
    if accepted:
        assert given.find("a", image_of(image)) == localiser.find("a", image_of(image))
    else:
        with pytest.raises(VolumeError, match=r"finds \S+ ml \(\S+ to \S+ ml at the labelled site\) in a; write"):
            given.find("a", image_of(image))


# preparing


def test_a_quarter_of_the_image_holds_the_whole_organ_around_the_place_that_is_found(organs, localiser, tmp_path):
    lost = prepare(organs, tmp_path / "middle", NARROW).store
    store = prepare(organs, tmp_path / "found", replace(NARROW, centres=localiser)).store
    assert [case.facts.label_loss for case in lost.cases] == [1, 1, 1]
    assert [case.facts.label_loss for case in store.cases] == [0, 0, 0]
    assert {case.localiser for case in store.cases} == {localiser.digest}
    assert any("annotation outside the slices" in text for text in lost.warnings)
    assert not any("annotation outside the slices" in text for text in store.warnings)


def test_the_table_of_locate_gives_the_same_slices(organs, localiser, tmp_path):
    places, failed = locate(find_images([organs]).cases, localiser)
    assert failed == {}
    write_centre_table(tmp_path / "t.csv", {name: place.centre for name, place in places.items()})
    from_table = replace(NARROW, centres=read_centre_table(tmp_path / "t.csv"))
    seen = prepare(organs, tmp_path / "a", replace(NARROW, centres=localiser)).store
    same = prepare(organs, tmp_path / "b", from_table).store
    assert [case.checksum for case in seen.cases] == [case.checksum for case in same.cases]
    assert [case.centre for case in seen.cases] == [case.centre for case in same.cases]


def test_cases_are_cut_again_if_the_localiser_differs_and_only_then(organs, localiser, localiser_file, tmp_path):
    config = replace(NARROW, centres=localiser)
    prepare(organs, tmp_path / "out", config, workers=2)
    before = folder_bytes(tmp_path / "out")
    again = prepare(organs, tmp_path / "out", replace(NARROW, centres=load_localiser(localiser_file)))
    assert (again.unchanged, again.replaced) == (3, 0) and folder_bytes(tmp_path / "out") == before
    prepare(organs, tmp_path / "other", config)
    assert folder_bytes(tmp_path / "other") == before  # whatever the number of workers
    changed = replace(localiser.segmenter.card, settings={**localiser.segmenter.card.settings, "seed": 1})
    Segmenter(localiser.segmenter.network, localiser.segmenter.format, changed).save(tmp_path / "n.safetensors")
    other = load_localiser(tmp_path / "n.safetensors")
    after = prepare(organs, tmp_path / "out", replace(NARROW, centres=other))
    assert (after.unchanged, after.replaced) == (0, 3)
    assert {case.localiser for case in after.store.cases} == {other.digest}
    assert prepare(organs, tmp_path / "out", NARROW).replaced == 3  # around the body's middle again
    assert prepare(organs, tmp_path / "out", NARROW).unchanged == 3
    by_hand = table(tmp_path / "t.csv", [(f"case{number}", *organ, 1) for number, organ in enumerate(ORGANS)])
    last = prepare(organs, tmp_path / "out", replace(NARROW, centres=by_hand))
    assert last.replaced == 3 and {case.localiser for case in last.store.cases} == {None}
    assert prepare(organs, tmp_path / "out", config).replaced == 3


def test_a_case_without_a_find_is_left_out_and_named(localiser, tmp_path):
    write_cases(tmp_path / "cases", (*ORGANS[:2], None))
    result = prepare(tmp_path / "cases", tmp_path / "out", replace(NARROW, centres=localiser))
    assert [case.name for case in result.store.cases] == ["case0", "case1"]
    assert list(result.failed) == ["case2"]
    assert re.search(r": finds (nothing|\S+ ml \(2 to 2 ml at .* site\)) in case2; write", result.failed["case2"])
    nothing = replace(NARROW, centres=blind(localiser, tmp_path / "blind.safetensors"))
    with pytest.raises(VolumeError, match=r"not one of 3 cases can be used; the first: .*finds nothing in case0"):
        prepare(tmp_path / "cases", tmp_path / "no", nothing)


# segmenting


def test_an_organ_beside_the_middle_is_segmented_around_the_place_that_is_found(organs, localiser, tmp_path):
    store = prepare(organs, tmp_path / "store", replace(NARROW, centres=localiser)).store
    train_on_store(store, replace(TINY, updates=60)).save(tmp_path / "m.safetensors")
    image, label = map(tilted, body((20, 38), 9))
    write_volume(tmp_path / "images" / "a.nii.gz", image)
    images, models = [tmp_path / "images"], [tmp_path / "m.safetensors"]

    def dice(name, **given):
        (path,) = segment(images, models, tmp_path / name, **given)
        found = read_volume(path, integer=True).data == 1
        return 2 * (found & (label.data == 1)).sum() / (found.sum() + label.data.sum())

    point = middle(label)
    by_hand = table(tmp_path / "t.csv", [("a", *point)], "case,x,y,z")
    with pytest.raises(UsageError, match=r"m\.safetensors: was trained on slices around given places; give a `localis"):
        dice("plain")
    assert not (tmp_path / "plain").exists()
    assert dice("found", centres=localiser) > 0.6
    assert dice("table", centres=by_hand) > 0.6
    write_volume(tmp_path / "images" / "b.nii.gz", body(None)[0])
    for source, reason in ((localiser, "finds .* in b"), (by_hand, "has no row for b")):
        with pytest.raises(VolumeError, match=f"1 of 2 images have no centre: b; .*{reason}"):
            segment(images, models, tmp_path / "no", centres=source)
    air = table(tmp_path / "air.csv", [("a", 0, 0, 1), ("b", 0, 0, 1)])
    with pytest.raises(VolumeError, match=r"a: the centre is voxel .* in the air that is cropped away"):
        segment(images, models, tmp_path / "no", centres=air)
    assert not (tmp_path / "no").exists()


# the labelled factory


@pytest.fixture
def factory_file(trained, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def test_a_localiser_travels_in_the_labelled_factory(factory_file, organs, coarse, localiser, tmp_path):
    store = prepare(organs, tmp_path / "store", replace(NARROW, centres=localiser)).store
    brief, out = replace(TINY, updates=1), tmp_path / "l.safetensors"
    options = {"config": brief, "branch_updates": 1}
    made = label_factory(factory_file, store.path, out, localiser=coarse.path, **options)
    assert made.localiser.classes == 2 and made.localiser.format == coarse.format
    loaded = LabelledFactory.load(out)
    assert loaded.localiser.card == made.localiser.card
    for parameter, other in zip(
        loaded.localiser.network.parameters(), made.localiser.network.parameters(), strict=True
    ):
        assert torch.equal(parameter, other)
    assert load_localiser(out).digest == Localiser(out, made.localiser).digest
    label_factory(factory_file, store.path, out, localiser=localiser.path, **options)
    assert load_localiser(out).digest == localiser.digest  # as it was: stores need not be cut again
    assert load_localiser(out).find("a", image_of(body(ORGANS[0])[0])) == localiser.find(
        "a", image_of(body(ORGANS[0])[0])
    )


def test_a_labelled_factory_without_a_localiser_is_read_as_before(labelled, tmp_path):
    path = tmp_path / "l.safetensors"
    labelled.save(path)
    assert LabelledFactory.load(path).localiser is None
    tensors, card = read_weights(path, kind="labelled factory")
    del card["localiser"]  # as earlier versions wrote it
    write_weights(path, tensors, card)
    assert LabelledFactory.load(path).localiser is None
    with pytest.raises(UsageError, match="has no localiser; give one that was made by"):
        load_localiser(path)


def test_damaged_and_foreign_files_are_refused(labelled, localiser, factory_file, tmp_path):
    with pytest.raises(CheckpointError, match="is a factory, expected a labelled factory or segmenter"):
        load_localiser(factory_file)
    labelled.localiser = localiser.segmenter
    labelled.save(tmp_path / "l.safetensors")
    tensors, card = read_weights(tmp_path / "l.safetensors", kind="labelled factory")
    for change, message in (({"localiser": 3}, "its card is not usable"), ({"localiser": {}}, "lacks the entry")):
        write_weights(tmp_path / "bad.safetensors", tensors, {**card, **change})
        with pytest.raises(CheckpointError, match=message):
            load_localiser(tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=message):
            LabelledFactory.load(tmp_path / "bad.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("localiser.")}
    write_weights(tmp_path / "bad.safetensors", fewer, card)
    for load in (load_localiser, LabelledFactory.load):
        with pytest.raises(CheckpointError, match="weights do not fit the card"):
            load(tmp_path / "bad.safetensors")


def test_a_coarse_store_of_another_domain_is_refused(factory_file, store, organs, tmp_path):
    other = prepare(organs, tmp_path / "dark", replace(COARSE, domain="dark")).store
    with pytest.raises(UsageError, match="domain is 'dark'; it must be 'bright'"):
        label_factory(factory_file, store.path, tmp_path / "l.safetensors", config=TINY, localiser=other.path)
    assert not (tmp_path / "l.safetensors").exists()


# commands


def test_locate_writes_a_table_that_prepare_and_segment_read(localiser, localiser_file, tmp_path, capsys):
    write_cases(tmp_path / "cases", (*ORGANS[:2], None))
    words = ["locate", tmp_path / "cases", "--localiser", localiser_file, "--out", tmp_path / "c.csv"]
    assert run(*words) == 3
    written = capsys.readouterr()
    assert "case0: (" in written.out and " ml" in written.out
    assert "not located: case2: " in written.err and "1 images could not be located" in written.err
    numbers = "6 entries: 2 used (2 images), 1 of cases that are left out, 3 passed over"
    assert written.out.splitlines()[0] == numbers
    found = read_centre_table(tmp_path / "c.csv")
    assert list(found.places) == ["case0", "case1"] and not found.in_voxels
    expected = locate([CaseFiles("case0", (tmp_path / "cases" / "case0" / "image" / "v.nii.gz",))], localiser)[0]
    assert found.places["case0"] == expected["case0"].centre
    assert run(*words) == 2 and "exists, perhaps with corrections" in capsys.readouterr().err
    narrow = ["--domain", "bright", "--size", 16, "--field-of-view", 30, "--z-bins", 4]
    prepared = ["prepare", tmp_path / "cases", "--out", tmp_path / "s", *narrow]
    assert run(*prepared, "--centres", tmp_path / "c.csv") == 3
    assert run(*prepared, "--localiser", localiser_file) == 3
    assert "2 replaced" in capsys.readouterr().out
    index = json.loads((tmp_path / "s" / "store.json").read_text())
    assert {case["localiser"] for case in index["cases"]} == {localiser.digest}
    blind(localiser, tmp_path / "blind.safetensors")
    words[3], words[5] = tmp_path / "blind.safetensors", tmp_path / "none.csv"
    assert run(*words) == 1 and "not one of 3 images could be located" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("command", [["prepare", "x", "--domain", "a"], ["segment", "x", "--model", "m"]])
def test_a_table_and_a_localiser_together_are_refused(command, tmp_path, capsys):
    words = [*command, "--out", tmp_path / "y", "--centres", "c.csv", "--localiser", "l.safetensors"]
    assert run(*words) == 2
    assert "--centres is c.csv and --localiser is l.safetensors; give one of them" in capsys.readouterr().err


def test_a_localiser_is_trained_from_the_command_line(coarse, tmp_path, capsys):
    out = tmp_path / "l.safetensors"
    assert run("train-localiser", "--store", coarse.path, "--out", out, "--updates", 1) == 0
    assert "localiser of bright, from 12 slices" in capsys.readouterr().out
    made = load_localiser(out).segmenter
    assert made.classes == 2 and made.card.plan.widths[0] == 16 and made.card.settings["contrast"] is not None


def test_names_of_images_are_those_that_prepare_gives(tmp_path):
    for name in ("a/x", "b/x"):
        write_volume(tmp_path / "set" / f"{name}.nii.gz", body()[0])
    assert [case.name for case in find_images([tmp_path / "set"]).cases] == ["a/x", "b/x"]
    with pytest.raises(UsageError, match="'x', is not unique"):
        find_images([tmp_path / "set" / "a" / "x.nii.gz", tmp_path / "set" / "b" / "x.nii.gz"])


def test_what_a_network_labels_in_the_padding_beside_an_image_is_no_find():
    image, _ = body()
    fmt = SliceFormat(size=40, spacing=5.0, window=(-2.0, 2.0), z_bins=4, crop="none")
    images = np.full((4, 40, 40), -1, np.float32)
    data = LabelledSlices(images, np.zeros((4, 40, 40), np.uint8), 2, np.zeros(4, int))
    made = train_segmenter(data, fmt, localiser_config(replace(TINY, updates=1)), title="t")
    last = [module for module in made.network.modules() if getattr(module, "bias", None) is not None][-1]
    last.bias.data = torch.tensor([0.0, 1000.0])
    found = find_place(image_of(image), made)  # the whole volume is labelled, and nothing beside it
    voxels = np.prod(image.data.shape)
    assert found.millilitres == pytest.approx(voxels * 20 / 1000, rel=0.1)
    assert np.abs(np.array(found.centre) - (image.affine @ [34.5, 29.5, 1.5, 1])[:3]).max() <= 5


# several channels


class Both(nn.Module):
    """Class 1 where both channels are brighter than their means by a deviation and a half."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        least = windows.amin(1, keepdim=True)
        return torch.cat([torch.zeros_like(least), 20 * (least - 1.5)], 1)


def test_a_localiser_uses_all_channels_and_a_missing_one_is_background(tmp_path):
    fmt = SliceFormat(size=24, spacing=5.0, window=((-3.0, 5.0),) * 2, z_bins=4)
    plan = TrainingPlan(window=24, widths=(8, 8, 8), fold=1, classes=2, batch_size=1, updates=1, channels=2)
    made = Segmenter(Both(), fmt, SegmenterCard(classes=2, network="dynunet", plan=plan))
    image, label = body(ORGANS[0])
    other = Volume(image.data.copy(), image.affine)
    image.data[13:20, 11:18, 1:3] += 60  # bright in the first channel alone
    other.data[50:57, 40:47, 1:3] += 60  # and in the second
    found = find_place(image_of(image, other), made)
    assert np.abs(np.array(found.centre) - middle(label)).max() < 5
    place = Localiser(tmp_path / "l.safetensors", made).voxel_in("case", image_of(image, other))
    np.testing.assert_allclose(place, np.argwhere(label.data).mean(0), atol=2.5)
    assert find_place(image_of(image, None), made) is None  # nothing is bright in both
    with pytest.raises(VolumeError, match="has 1 channels; it must have 2"):
        find_place(image_of(image), made)
