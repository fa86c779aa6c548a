"""Segmenting new images and scoring label maps."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from fedfactory.adaptation.engine.object_rule import keep_single_objects
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.scores import score_case
from fedfactory.adaptation.inference import Outputs, segment
from fedfactory.adaptation.segmenter import KIND, Segmenter
from fedfactory.common.weights_file import write_weights
from fedfactory.errors import CheckpointError, UsageError
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import train_on_store
from helpers import ball_volume, oriented, small_config, untrained_segmenter, write_dicom

EVERYTHING = Outputs(probabilities=True, pictures=True)


@pytest.fixture
def model(store, tmp_path):
    made = train_on_store(store, small_config())
    made.card = replace(made.card, single_objects=())  # labels are those of the probabilities
    made.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def oblique(volume: Volume) -> Volume:
    angle = 0.3
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return Volume(volume.data, turn @ volume.affine)


CASES = {
    "plain": lambda: ball_volume()[0],
    "oblique": lambda: oblique(ball_volume()[0]),
    "flipped": lambda: oriented(ball_volume()[0], "LPI"),
    "turned": lambda: oriented(ball_volume()[0], "SAR"),
    "anisotropic": lambda: ball_volume(shape=(20, 24, 4), spacing=(3.0, 3.0, 12.0))[0],
    "single_slice": lambda: Volume(ball_volume()[0].data[:, :, 4:5], ball_volume()[0].affine),
}


@pytest.mark.parametrize("kind", CASES)
def test_label_map_and_probabilities_lie_on_the_images_own_grid(kind, model, tmp_path):
    write_volume(tmp_path / "case.nii.gz", CASES[kind]())
    image = read_volume(tmp_path / "case.nii.gz")
    (path,) = segment([tmp_path / "case.nii.gz"], [model], tmp_path / "out", outputs=EVERYTHING)
    found = read_volume(path, integer=True)
    assert found.data.shape == image.data.shape
    np.testing.assert_array_equal(found.affine, image.affine)
    likely = nib.load(tmp_path / "out" / "case_probabilities.nii.gz")
    np.testing.assert_array_equal(likely.affine, image.affine)
    values = np.asarray(likely.dataobj)
    assert values.shape == (*image.data.shape, 3)
    assert values.min() >= 0
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
    clear = np.sort(values, -1)[..., -1] - np.sort(values, -1)[..., -2] > 1e-4
    np.testing.assert_array_equal(values.argmax(-1)[clear], found.data[clear])
    picture = matplotlib.image.imread(tmp_path / "out" / "case.png")
    assert picture.ndim == 3
    assert picture.std() > 0


def test_what_is_written_opens_where_the_image_opens(model, tmp_path):
    """A sheared sform with a good qform: ITK reads the qform alone, and could not read the sform without it."""
    volume = ball_volume()[0]
    sheared = volume.affine.copy()
    sheared[:3, 1] += 0.02 * volume.affine[:3, 0]
    image = nib.Nifti1Image(volume.data, None)
    image.header.set_qform(volume.affine, 1)
    image.header.set_sform(sheared, 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"DOE^JANE"
    nib.save(image, tmp_path / "case.nii.gz")
    (path,) = segment([tmp_path / "case.nii.gz"], [model], tmp_path / "out", outputs=Outputs(probabilities=True))
    for written in map(nib.load, (path, tmp_path / "out" / "case_probabilities.nii.gz")):
        for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z"):
            np.testing.assert_array_equal(written.header[field], image.header[field])
        np.testing.assert_array_equal(written.header["pixdim"][:4], image.header["pixdim"][:4])
        assert written.header.get_xyzt_units()[0] == "mm" and written.header["descrip"].item() == b""


def test_an_image_without_any_organ_is_all_background_and_can_be_scored(store, tmp_path):
    made = train_on_store(store, small_config())
    last = [module for module in made.network.modules() if hasattr(module, "bias") and module.bias is not None][-1]
    last.bias.data = last.bias.data + 1000 * (np.arange(3) == 0)  # predicts background everywhere
    made.save(tmp_path / "m.safetensors")
    image, label = ball_volume()
    write_volume(tmp_path / "case.nii.gz", image)
    (path,) = segment([tmp_path / "case.nii.gz"], [tmp_path / "m.safetensors"], tmp_path / "out", outputs=EVERYTHING)
    found = read_volume(path, integer=True)
    assert not found.data.any()
    assert {score.dice for score in score_case("case", found, label)} == {0.0}


def test_a_dicom_series_is_segmented_on_its_own_grid(model, tmp_path):
    image, _ = ball_volume()
    write_dicom(tmp_path / "series", image)
    (path,) = segment([tmp_path / "series"], [model], tmp_path / "out")
    assert path.name == "series.nii.gz"
    found = read_volume(path, integer=True)
    assert sorted(found.data.shape) == sorted(image.data.shape)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        segment([tmp_path / "empty"], [model], tmp_path / "other")


def test_a_whole_data_set_is_segmented_and_scored_by_its_cases_names(site, model, tmp_path):
    paths = segment([site], [model], tmp_path / "out")
    assert [path.name for path in paths] == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]
    assert {score.case for score in evaluate(tmp_path / "out", site).scores} == {"case0", "case1", "case2"}


def test_an_ensemble_gives_the_mean_probabilities_of_its_members(store, model, tmp_path):
    other = train_on_store(store, small_config(seed=1))
    other.save(tmp_path / "n.safetensors")
    write_volume(tmp_path / "case.nii.gz", ball_volume()[0])

    def likely(name, *models):
        segment([tmp_path / "case.nii.gz"], models, tmp_path / name, outputs=EVERYTHING)
        return np.asarray(nib.load(tmp_path / name / "case_probabilities.nii.gz").dataobj)

    first, second = likely("a", model), likely("b", tmp_path / "n.safetensors")
    np.testing.assert_allclose(likely("both", model, tmp_path / "n.safetensors"), (first + second) / 2, atol=1e-5)


def test_mirrored_views_make_probabilities_symmetric_and_need_a_network_trained_with_mirroring(store, model, tmp_path):
    image, _ = ball_volume(shape=(20, 24, 8))
    symmetric = Volume(np.maximum(image.data, image.data[::-1]), np.diag([3.0, 3.0, 5.0, 1.0]))
    symmetric.affine[0, 3] = -28.5  # the middle of the volume is the middle of the slices
    write_volume(tmp_path / "case.nii.gz", symmetric)
    segment([tmp_path / "case.nii.gz"], [model], tmp_path / "out", outputs=Outputs(probabilities=True, views=2))
    likely = np.asarray(nib.load(tmp_path / "out" / "case_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(likely, likely[::-1], atol=1e-4)
    train_on_store(store, small_config(updates=1, mirror=False)).save(tmp_path / "n.safetensors")
    with pytest.raises(UsageError, match="views is 6; choose from 1 to 5"):
        segment([tmp_path / "case.nii.gz"], [tmp_path / "n.safetensors"], tmp_path / "p", outputs=Outputs(views=6))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("classes", 2.0, "classes is '2.0'"),
        ("network", "resnet", "network is 'resnet'; it must be that of the plan"),
        ("network", "translator", "network is 'translator'; it must be that of the plan"),
        ("plan", None, "network is 'dynunet'; it must be that of the plan"),
        ("plan", {"network": "unet"}, "TrainingPlan lacks the entry"),
        ("translator", {"factory": {}}, "lacks the entry 'domains'"),
        ("federated", {"method": {}, "context": {}, "weights": "own"}, "not usable"),
        ("training", {"slices": "many"}, "slices is 'many'"),
        ("training", {"patients": 3}, "unknown entries"),
        ("chosen", [3], "chosen is of type list"),
        ("format", None, "format is None"),
    ],
)
def test_an_unusable_card_of_a_segmenter_is_refused_by_name(entry, value, message, tmp_path):
    made = untrained_segmenter()
    write_weights(tmp_path / "m.safetensors", made.network.state_dict(), {**made.to_dict(), "kind": KIND, entry: value})
    with pytest.raises(CheckpointError, match=message):
        Segmenter.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("network", ["translator", "federated"])
def test_a_card_without_what_its_network_is_built_from_is_refused(network, tmp_path):
    made = untrained_segmenter()
    card = {**made.to_dict(), "kind": KIND, "network": network, "plan": None}
    write_weights(tmp_path / "m.safetensors", made.network.state_dict(), card)
    with pytest.raises(CheckpointError, match=f"'{network}', but the entry that it must be built from is missing"):
        Segmenter.load(tmp_path / "m.safetensors")


def test_a_label_map_has_one_object_of_a_structure_that_is_one(model, tmp_path):
    write_volume(tmp_path / "case.nii.gz", ball_volume()[0])
    (path,) = segment([tmp_path / "case.nii.gz"], [model], tmp_path / "plain")
    made = Segmenter.load(model)
    made.card = replace(made.card, single_objects=(1, 2))
    made.save(tmp_path / "n.safetensors")
    plain = read_volume(path, integer=True).data
    (path,) = segment([tmp_path / "case.nii.gz"], [tmp_path / "n.safetensors"], tmp_path / "tidy")
    tidy = read_volume(path, integer=True).data
    np.testing.assert_array_equal(tidy, keep_single_objects(plain, (1, 2)))
    assert (tidy != plain).any()  # a network that was hardly trained leaves islands


def test_models_of_different_formats_are_no_ensemble(store, model, tmp_path):
    made = Segmenter.load(model)
    Segmenter(made.network, replace(made.format, spacing=9.0), made.card).save(tmp_path / "n.safetensors")
    write_volume(tmp_path / "case.nii.gz", ball_volume()[0])
    with pytest.raises(CheckpointError, match="share"):
        segment([tmp_path / "case.nii.gz"], [model, tmp_path / "n.safetensors"], tmp_path / "out")
