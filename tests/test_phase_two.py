"""Label branch, synthetic volumes, adaptation, inference and evaluation, on tiny networks."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from fedfactory.adaptation.adapt import pseudo_label, read_synthetic
from fedfactory.adaptation.evaluation.scores import score_case
from fedfactory.adaptation.evaluation.summary import mean_dice
from fedfactory.adaptation.generate_volumes import Drawing, generate_volumes
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labelled_slices import LabelledSlices, joined
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.segmenter_training import train_segmenter
from fedfactory.common.seeding import seeded
from fedfactory.errors import CheckpointError, ConfigError, FedFactoryError, StoreError, UsageError
from fedfactory.generative.synthesis import slice_heights
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import label_factory, labelled_slices, train_on_store
from fedfactory.node.site_adaptation import Adaptation, adapt_site
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import ball_volume, small_config


def test_a_segmenter_learns_a_ball_and_labels_a_new_image_on_its_own_grid(store, tmp_path):
    model = train_on_store(store, small_config(updates=120, batch_size=8, width=16))
    model.save(tmp_path / "m.safetensors")
    image, label = ball_volume(seed=9)
    turned = Volume(image.data[::-1, :, :], image.affine @ np.diag([-1.0, 1, 1, 1]))
    write_volume(tmp_path / "new.nii.gz", turned)
    (path,) = segment([tmp_path / "new.nii.gz"], [tmp_path / "m.safetensors"], tmp_path / "pred")
    found = read_volume(path, integer=True)
    assert found.data.shape == image.data.shape
    np.testing.assert_allclose(found.affine, turned.affine)
    scores = score_case("new", found, Volume(label.data[::-1, :, :], turned.affine))
    assert mean_dice(scores) > 0.8  # labels that are not turned back give less than 0.5 for an off-centre ball


def test_the_same_seed_trains_the_same_segmenter(store):
    def weights(seed):
        return next(iter(train_on_store(store, small_config(seed=seed)).network.parameters()))

    torch.manual_seed(int(torch.randint(1000, (1,))))  # the caller's random state must not matter
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_seeding_a_training_leaves_the_callers_random_state_alone():
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(3)
    torch.manual_seed(3)
    with seeded(0):
        np.random.rand()
        torch.rand(1)
    assert (np.random.rand(), torch.rand(1)) == expected


def test_the_same_latent_has_the_same_labels_in_every_domain(labelled):
    heights = slice_heights(4, 2)
    bright, bright_labels = labelled.draw_volume("bright", heights, seed=7)
    dark, dark_labels = labelled.draw_volume("dark", heights, seed=7)
    np.testing.assert_array_equal(bright_labels, dark_labels)
    assert not np.allclose(bright, dark, atol=0.01)


def test_label_and_adapt_work_from_files_alone(trained, store, site, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    config = small_config(updates=2)
    made = label_factory(tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", classes=3, config=config)
    assert 0 <= made.card.agreement <= 1
    generate_volumes(tmp_path / "l.safetensors", tmp_path / "syn", Drawing(domain="bright", volumes=2))
    adaptation = Adaptation(segmenter=config, volumes=2)
    adapt_site(store.path, tmp_path / "a.safetensors", factory_file=tmp_path / "l.safetensors", adaptation=adaptation)
    adapt_site(store.path, tmp_path / "b.safetensors", synthetic=tmp_path / "syn", adaptation=adaptation)
    for name in "ab":
        assert Segmenter.load(tmp_path / f"{name}.safetensors").format == store.format


def test_synthetic_slices_and_a_sites_own_are_joined_in_equal_parts():
    synthetic = LabelledSlices(np.zeros((30, 8, 8)), np.zeros((30, 8, 8), np.uint8), 2)
    own = LabelledSlices(np.ones((7, 8, 8)), np.ones((7, 8, 8), np.uint8), 2)
    for first, second in ((synthetic, own), (own, synthetic)):
        both = joined(first, second)
        assert both.images.mean() == pytest.approx(0.5, abs=0.05)
        np.testing.assert_array_equal(both.images[:, 0], both.labels)


def test_the_robust_segmenter_travels_in_the_labelled_factory(labelled, labelled_file, store):
    loaded = LabelledFactory.load(labelled_file)
    expected = pseudo_label(store.images, labelled.robust)
    np.testing.assert_array_equal(pseudo_label(store.images, loaded.robust).labels, expected.labels)


def test_adaptation_never_reads_the_sites_labels(labelled_file, store, tmp_path):
    labels = store.path / store.files["labels"]
    labels.write_bytes(labels.read_bytes()[:-10] + b"\xff" * 10)
    brief = Adaptation(segmenter=small_config(updates=2), volumes=1)
    first = adapt_site(store.path, tmp_path / "a.safetensors", factory_file=labelled_file, adaptation=brief)
    index = json.loads((store.path / "store.json").read_text())
    del index["arrays"]["labels"]
    for case in index["cases"]:
        case["label_kind"] = "none"
    (store.path / "store.json").write_text(json.dumps(index))
    second = adapt_site(store.path, tmp_path / "b.safetensors", factory_file=labelled_file, adaptation=brief)
    for parameter, again in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(parameter, again)


@pytest.mark.parametrize("name", ["../site/case0", "..", "/etc", ""])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, name):
    manifest = {"volumes": [{"name": name}], "classes": 2, "domain": "bright", "layout": "nifti"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no plain name"):
        read_synthetic(tmp_path, "bright")


@pytest.mark.parametrize("classes", [-1, 1, 256, 70_000])
def test_a_manifest_cannot_have_more_classes_than_labels_can_count(tmp_path, classes):
    manifest = {"volumes": [{"name": "a"}], "classes": classes, "domain": "bright", "layout": "nifti"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=f"classes is {classes}; it must be from 2 to 255"):
        read_synthetic(tmp_path, "bright")


def test_wrong_requests_of_phase_two_are_refused_and_write_nothing(trained, labelled_file, store, site, tmp_path):
    factory = tmp_path / "f.safetensors"
    trained.save(factory)
    foreign = prepare(site, tmp_path / "foreign", PrepareConfig(domain="other", size=16, z_bins=4)).store
    small = prepare(site, tmp_path / "small", PrepareConfig(domain="bright", size=8, z_bins=4)).store
    unlabelled = PrepareConfig(domain="bright", size=16, z_bins=4, label_kind="none")
    bare = prepare(site, tmp_path / "bare", unlabelled).store
    out = tmp_path / "out.safetensors"
    for call, error, message in [
        (lambda: label_factory(factory, foreign.path, out), ConfigError, "bright, dark"),
        (lambda: label_factory(factory, small.path, out), StoreError, "--size 16"),
        (lambda: label_factory(factory, bare.path, out), StoreError, "no case"),
        (lambda: label_factory(factory, store.path, out, classes=4), UsageError, "3 values"),
        (lambda: label_factory(labelled_file, store.path, out), CheckpointError, "expected a factory"),
        (lambda: adapt_site(foreign.path, out, factory_file=labelled_file), ConfigError, "unknown domain"),
        (lambda: adapt_site(small.path, out, factory_file=labelled_file), StoreError, "--size 16"),
        (lambda: adapt_site(store.path, out), UsageError, "exactly one"),
        (lambda: adapt_site(store.path, out, synthetic=tmp_path), UsageError, "manifest"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert not out.exists()


@pytest.mark.parametrize("cut", [0, 7, 100, -50])
def test_a_truncated_weights_file_is_refused(labelled_file, cut):
    labelled_file.write_bytes(labelled_file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="not a readable"):
        LabelledFactory.load(labelled_file)


def test_a_file_that_pickles_code_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    torch.save({"g": Bomb()}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError):
        LabelledFactory.load(tmp_path / "f.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_bad_images_stop_segmentation_before_anything_is_written(store, tmp_path):
    train_on_store(store, small_config(updates=1)).save(tmp_path / "m.safetensors")
    image, _ = ball_volume()
    write_volume(tmp_path / "good.nii.gz", image)
    nib.save(nib.Nifti1Image(image.data[:, :, 0], image.affine), tmp_path / "flat.nii.gz")
    (tmp_path / "text.nii.gz").write_text("hello")
    for bad in ("flat", "text", "absent"):
        with pytest.raises(FedFactoryError, match=bad):
            segment(
                [tmp_path / "good.nii.gz", tmp_path / f"{bad}.nii.gz"], [tmp_path / "m.safetensors"], tmp_path / "p"
            )
        assert not (tmp_path / "p").exists()


def test_a_segmenter_whose_loss_is_not_finite_stops():
    from fedfactory.errors import TrainingError
    from fedfactory.imaging.slice_format import SliceFormat

    images = np.full((4, 16, 16), np.nan, np.float32)
    data = LabelledSlices(images, np.zeros((4, 16, 16), np.uint8), 2)
    fmt = SliceFormat(size=16, spacing=1.0, window=(0.0, 1.0), z_bins=1)
    with pytest.raises(TrainingError, match="loss"):
        train_segmenter(data, fmt, small_config(updates=1), title="t")


def test_labelled_slices_leave_out_cases_without_labels(site, tmp_path):
    import shutil

    shutil.rmtree(site / "case1" / "label")
    store = prepare(site, tmp_path / "s", PrepareConfig(domain="bright", size=16, z_bins=4)).store
    assert len(labelled_slices(store).images) == 16
