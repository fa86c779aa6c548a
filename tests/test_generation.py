"""Labelled synthetic volumes: what is drawn, how it is written, and that it can be made again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.adapt import draw_slices, read_synthetic
from fedfactory.adaptation.generate_volumes import Drawing, generate_volumes
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.training.label_branch_training import LabelBranchConfig, train_label_branch
from fedfactory.adaptation.volume_formats import (
    READERS,
    WRITERS,
    SetFacts,
    SyntheticVolume,
    finish,
    refuse_unsuitable,
)
from fedfactory.cli import main
from fedfactory.errors import ConfigError, UsageError, VolumeError
from fedfactory.generative import FactoryConfig, TrainedFactory, make_generator
from fedfactory.generative.factory_facts import FactoryFacts
from fedfactory.generative.synthesis import between_latents, centre_style, group_size, slice_heights, synthesise_volume
from fedfactory.imaging.volume_files import read_volume
from fedfactory.node.store.original_slices import import_slices
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import folder_bytes, untrained_labelled_factory, untrained_segmenter, with_head

DARK = Drawing(domain="dark", volumes=3, seed=5)


def image_of(folder, number) -> np.ndarray:
    name = f"synthetic_{number:04d}"
    return read_volume(folder / name / "image" / f"{name}.nii.gz").data


def test_heights_are_evenly_spaced_from_the_lowest_bin_to_the_highest():
    heights = slice_heights(29, 10)
    assert len(heights) == 280
    assert (heights[0], heights[-1]) == (0, 28)
    torch.testing.assert_close(heights.diff(), torch.full((279,), 28 / 279))
    with pytest.raises(UsageError):
        slice_heights(1, 10)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", {32: 32, 64: 8, 512: 1, 1024: 1}), ("cuda", {32: 32, 64: 32, 512: 4, 1024: 1})],
)
def test_groups_follow_from_factory_and_device_alone_and_fit_into_memory(device, expected):
    sizes = {side: group_size(FactoryConfig(domains=("a",), image_size=side, channels=(1,) * n), torch.device(device))
             for side, n in ((32, 3), (64, 4), (512, 7), (1024, 8))}  # fmt: skip
    assert sizes == expected


def test_a_volume_depends_on_its_seed(labelled):
    heights = slice_heights(4, 3)
    first, labels = labelled.draw_volume("bright", heights, seed=7)
    again, _ = labelled.draw_volume("bright", heights, seed=7)
    other, _ = labelled.draw_volume("bright", heights, seed=8)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=0.01)
    assert first.shape == (9, 1, 16, 16) and labels.shape == (9, 16, 16)
    assert labels.dtype == np.uint8


def test_a_slice_does_not_depend_on_the_number_of_slices_drawn(labelled):
    """Forty slices are two groups, and the second is filled up; a volume of nine slices has the first nine of them."""
    generator = labelled.factory.generator
    z, heights = torch.randn(1, 8), torch.linspace(0, 3, 40)
    volumes = []
    for count in (9, 40):
        rng = torch.Generator().manual_seed(0)
        parts = synthesise_volume(generator, heights[:count], domain=1, rng=rng, z=z)
        volumes.append(torch.cat([part.anatomy for part in parts]))
    assert volumes[1].shape[0] == 40
    torch.testing.assert_close(volumes[0], volumes[1][:9], rtol=0, atol=1e-5)


def test_no_truncation_keeps_the_subject_and_full_truncation_gives_the_mean_subject(labelled):
    generator, heights = labelled.factory.generator, slice_heights(4, 2)
    whole, half, none = (
        [labelled.draw_volume("dark", heights, seed=seed, truncation=share)[0] for seed in (1, 2)]
        for share in (1.0, 0.5, 0.0)
    )
    distance = [np.abs(first - second).mean() for first, second in (whole, half, none)]
    assert distance[0] > distance[1] > distance[2]
    centre = centre_style(generator, 1)
    assert centre.shape == (4, generator.n_latent, 8)
    z, domain = torch.randn(4096, 8), torch.ones(4096, dtype=torch.long)
    drawn = torch.stack([generator.style_of(z, torch.full((4096,), k), domain).w.mean(0) for k in range(4)]).detach()
    assert float((drawn - centre).norm() / drawn.norm()) < 0.2


def test_interpolated_latents_keep_their_length_and_start_and_end_at_the_given_latents():
    a, b = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(between_latents(a, b, 0.0), a)
    assert torch.equal(between_latents(a, b, 1.0), b)
    half = between_latents(a, b, 0.5)
    assert min(a.norm(), b.norm()) * 0.95 < half.norm() < max(a.norm(), b.norm()) * 1.05
    torch.testing.assert_close(between_latents(a, a, 0.3), a)


def test_volumes_are_nifti_pairs_with_the_factorys_geometry(labelled_file, tmp_path):
    generate_volumes(labelled_file, tmp_path / "syn", DARK)
    folder = tmp_path / "syn" / "synthetic_0001"
    image = read_volume(folder / "image" / "synthetic_0001.nii.gz")
    label = read_volume(folder / "label" / "synthetic_0001.nii.gz", integer=True)
    assert image.data.shape == label.data.shape == (16, 16, 6)
    np.testing.assert_allclose(image.spacing, [6.0, 6.0, 100 / 6], rtol=1e-5)
    np.testing.assert_allclose(image.affine @ [7.5, 7.5, 2.5, 1], [0, 0, 0, 1], atol=1e-4)


def test_workers_do_not_change_a_byte(labelled_file, tmp_path):
    for workers in (1, 3):
        generate_volumes(labelled_file, tmp_path / str(workers), DARK, workers=workers)
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


def test_any_volume_can_be_made_again_alone(labelled_file, tmp_path):
    drawing = replace(DARK, truncation=0.7, between=1)
    generate_volumes(labelled_file, tmp_path / "all", drawing)
    generate_volumes(labelled_file, tmp_path / "alone", drawing, only=[1])
    assert [path.name for path in (tmp_path / "alone").glob("synthetic*")] == ["synthetic_0001"]
    assert folder_bytes(tmp_path / "alone" / "synthetic_0001") == folder_bytes(tmp_path / "all" / "synthetic_0001")
    latents, alone = (np.load(tmp_path / name / "latents.npy", allow_pickle=False) for name in ("all", "alone"))
    assert np.array_equal(latents[1:2], alone)
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert (manifest["truncation"], manifest["between"], manifest["seed"]) == (0.7, 1, 5)
    assert len(manifest["factory_sha256"]) == 64


def test_volumes_between_two_subjects_lie_between_them(labelled_file, tmp_path):
    generate_volumes(labelled_file, tmp_path / "way", replace(DARK, volumes=5, between=3))
    latents = np.load(tmp_path / "way" / "latents.npy")
    steps = np.linalg.norm(np.diff(latents, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.2)
    assert np.linalg.norm(latents[4] - latents[0]) > 2.5 * steps.mean()


def test_volumes_with_too_little_of_a_class_are_drawn_again(labelled_file, tmp_path):
    generate_volumes(labelled_file, tmp_path / "any", replace(DARK, volumes=6))
    shares = [volume["shares"] for volume in json.loads((tmp_path / "any" / "manifest.json").read_text())["volumes"]]
    smallest_share = sorted(min(volume) for volume in shares)[3] + 1e-5  # more than half of the volumes have less
    generate_volumes(labelled_file, tmp_path / "redrawn", replace(DARK, volumes=6, least_share=smallest_share))
    manifest = json.loads((tmp_path / "redrawn" / "manifest.json").read_text())
    assert all(min(volume["shares"]) >= smallest_share - 1e-5 for volume in manifest["volumes"])
    assert any(volume["attempt"] > 0 for volume in manifest["volumes"])
    with pytest.raises(UsageError, match="choose a lower value"):
        generate_volumes(labelled_file, tmp_path / "never", replace(DARK, volumes=2, least_share=0.9))
    assert not (tmp_path / "never").exists()


def test_keeping_largest_components_removes_islands(labelled_file, tmp_path):
    from scipy import ndimage

    generate_volumes(labelled_file, tmp_path / "k", Drawing(domain="bright", largest_component=True))
    path = tmp_path / "k" / "synthetic_0000" / "label" / "synthetic_0000.nii.gz"
    label = read_volume(path, integer=True).data
    for value in (1, 2):
        assert ndimage.label(label == value, np.ones((3, 3, 3)))[1] <= 1


def test_an_nnunet_data_set_is_what_its_planner_reads(labelled_file, tmp_path):
    out = tmp_path / "Dataset501_Synthetic"
    generate_volumes(labelled_file, out, DARK, layout="nnunet")
    generate_volumes(labelled_file, tmp_path / "pairs", DARK)
    description = json.loads((out / "dataset.json").read_text())
    assert description["numTraining"] == 3
    assert description["channel_names"] == {"0": "dark"}
    assert list(description["labels"].values()) == [0, 1, 2]
    images = sorted(path.name for path in (out / "imagesTr").iterdir())
    labels = sorted(path.name for path in (out / "labelsTr").iterdir())
    assert [name.replace("_0000.nii.gz", ".nii.gz") for name in images] == labels
    assert np.array_equal(read_volume(out / "imagesTr" / images[2]).data, image_of(tmp_path / "pairs", 2))
    with pytest.raises(UsageError, match="--layout nifti"):
        read_synthetic(out, "dark")


def test_nnunets_own_integrity_check_passes(labelled_file, tmp_path):
    integrity = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity", reason="nnunetv2 is not installed"
    )
    generate_volumes(labelled_file, tmp_path / "Dataset501_Synthetic", DARK, layout="nnunet")
    integrity.verify_dataset_integrity(str(tmp_path / "Dataset501_Synthetic"), 1)


def test_files_open_in_monai(labelled_file, tmp_path):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    generate_volumes(labelled_file, tmp_path / "syn", DARK)
    folder = tmp_path / "syn" / "synthetic_0000"
    paths = {kind: str(folder / kind / "synthetic_0000.nii.gz") for kind in ("image", "label")}
    read = Compose([LoadImaged(keys=("image", "label")), EnsureChannelFirstd(keys=("image", "label"))])(paths)
    assert read["image"].shape == read["label"].shape == (1, 16, 16, 6)
    assert set(np.unique(read["label"])) <= {0, 1, 2}


@pytest.mark.parametrize("layout", ["slices", "legacy-slices"])
def test_slices_have_the_published_fields(labelled_file, tmp_path, layout):
    out = tmp_path / "slices"
    generate_volumes(labelled_file, out, replace(DARK, volumes=2), layout=layout)
    generate_volumes(labelled_file, tmp_path / "pairs", replace(DARK, volumes=2))
    if layout == "legacy-slices":  # the published program's format, which is read here without executing code in it
        store = import_slices(out, tmp_path / "store", PrepareConfig(domain="dark", z_bins=4, test_share=0)).store
        assert len(store) == 12
        images = store.images[: store.cases[0].count, 0]
    else:
        paths = sorted(out.glob("fakeVolume0_slice*.npz"))
        with np.load(paths[0], allow_pickle=False) as record:
            assert record["data"].shape == (16, 16, 1)
            assert record["mask"].shape == (16, 16, 3)
            assert (record["mask"].sum(-1) == 1).all()
        images = np.stack([np.load(path)["data"][..., 0] for path in paths])
    expected = np.moveaxis(image_of(tmp_path / "pairs", 0), 2, 0)
    np.testing.assert_allclose(images.astype(np.float32), expected, atol=2e-3)  # stores hold float16


def test_unusable_requests_are_refused_and_write_nothing(labelled_file, tmp_path):
    out = tmp_path / "o"
    for call, error, message in [
        (lambda: Drawing(domain="dark", volumes=0), UsageError, "at least 1"),
        (lambda: Drawing(domain="dark", truncation=1.5), UsageError, "truncation"),
        (lambda: Drawing(domain="dark", between=-1), UsageError, "at least 0"),
        (lambda: Drawing(domain="dark", between=1, least_share=0.1), UsageError, "drawn again"),
        (lambda: generate_volumes(labelled_file, out, replace(DARK, domain="x")), ConfigError, "unknown domain"),
        (lambda: generate_volumes(labelled_file, out, replace(DARK, z_depth=9)), UsageError, "4 bins"),
        (lambda: generate_volumes(labelled_file, out, replace(DARK, z_depth=-1)), UsageError, "-1 bins"),
        (lambda: generate_volumes(labelled_file, out, DARK, device="cuda:77"), UsageError, "device"),
        (lambda: generate_volumes(labelled_file, out, DARK, layout="zip"), UsageError, "nnunet"),
        (lambda: generate_volumes(labelled_file, out, DARK, only=[3]), UsageError, "0 to 2"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert not out.exists()


def test_a_failure_in_the_middle_leaves_no_half_written_volume(labelled_file, tmp_path, monkeypatch):
    from fedfactory.adaptation import volume_formats

    def full(folder, volume):
        if volume.number == 2:
            raise OSError(28, "No space left on device")
        volume_formats.write_pair(folder, volume)

    monkeypatch.setitem(volume_formats.WRITERS, "nifti", full)
    with pytest.raises(OSError, match="No space"):
        generate_volumes(labelled_file, tmp_path / "full", DARK)
    assert list(tmp_path.glob("*full*")) == []


def test_the_published_networks_draw_labelled_volumes_too(config, tmp_path):
    published = replace(with_head(config, "image"), encoding_dim=6)
    torch.manual_seed(0)
    generator = make_generator(published).eval()
    factory = TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)
    segmenter = untrained_segmenter()
    made = train_label_branch(
        factory, segmenter, segmenter, domain="bright", config=LabelBranchConfig(updates=2, batch_size=2)
    )
    file = tmp_path / "labelled.safetensors"
    made.save(file)
    np.save(tmp_path / "mean.npy", np.ones((1, 6), np.float32))
    drawing = Drawing(domain="dark", seed=3)
    generate_volumes(file, tmp_path / "plain", drawing)
    generate_volumes(file, tmp_path / "embedded", drawing, clip_mean=tmp_path / "mean.npy")
    assert np.abs(image_of(tmp_path / "plain", 0) - image_of(tmp_path / "embedded", 0)).max() > 1e-3
    np.save(tmp_path / "wide.npy", np.ones((1, 7), np.float32))
    with pytest.raises(UsageError, match="must have 6"):
        generate_volumes(file, tmp_path / "wide", drawing, clip_mean=tmp_path / "wide.npy")
    assert not (tmp_path / "wide").exists()


def test_alarms_of_the_drawn_domain_are_written_with_its_volumes(labelled, tmp_path, capsys):
    labelled.factory.facts = FactoryFacts(alarms=("bright: too dark", "dark: it shares little anatomy"))
    labelled.save(tmp_path / "labelled.safetensors")
    words = ["--factory", tmp_path / "labelled.safetensors", "--domain", "dark", "--out", tmp_path / "drawn"]
    with pytest.raises(SystemExit) as end:
        main(["generate-volumes", *map(str, words)])
    assert end.value.code == 0
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert manifest["alarms"] == ["dark: it shares little anatomy"]
    assert "alarm: dark: it shares little anatomy" in capsys.readouterr().out


# Several channels, and pictures


def subject(channels: int, slices: int = 5, seed: int = 0) -> SyntheticVolume:
    """A subject of noise; corners of the images are -1 and 1."""
    random = np.random.default_rng(seed)
    images = random.uniform(-1, 1, (slices, channels, 8, 8)).astype(np.float32)
    images[..., 0, 0], images[..., 0, 1] = -1, 1
    labels = random.integers(0, 3, (slices, 8, 8)).astype(np.uint8)
    return SyntheticVolume(number=7, images=images, labels=labels, affine=np.eye(4), classes=3)


def test_volumes_of_several_channels_have_a_file_for_each(tmp_path):
    made = subject(4)
    WRITERS["nifti"](tmp_path, made)
    folder = tmp_path / "synthetic_0007"
    assert sorted(path.name for path in folder.iterdir()) == ["image0", "image1", "image2", "image3", "label"]
    images, labels = READERS["nifti"](tmp_path, "synthetic_0007", 4)
    np.testing.assert_array_equal(images, made.images)
    np.testing.assert_array_equal(labels, made.labels)
    WRITERS["nnunet"](tmp_path, made)
    names = sorted(path.name for path in (tmp_path / "imagesTr").iterdir())
    assert names == [f"synthetic_0007_000{channel}.nii.gz" for channel in range(4)]
    third = read_volume(tmp_path / "imagesTr" / names[2]).data
    np.testing.assert_array_equal(third, np.moveaxis(made.images[:, 2], 0, 2))
    finish(tmp_path, "nnunet", SetFacts(domain="mri", volumes=1, classes=3, channels=4))
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["channel_names"] == {str(channel): f"mri {channel}" for channel in range(4)}
    WRITERS["slices"](tmp_path, made)
    with np.load(tmp_path / "fakeVolume7_slice001.npz", allow_pickle=False) as record:
        np.testing.assert_array_equal(record["data"], np.moveaxis(made.images[1], 0, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_written_as_png_and_read_again(channels, tmp_path):
    from PIL import Image

    made = subject(channels, slices=1)
    WRITERS["images"](tmp_path, made)
    with Image.open(tmp_path / "images" / "synthetic_0007.png") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        shown = np.asarray(image).reshape(8, 8, channels)
    assert shown[0, 0].tolist() == [0] * channels and shown[0, 1].tolist() == [255] * channels
    np.testing.assert_allclose(shown / 127.5 - 1, np.moveaxis(made.images[0], 0, 2), atol=0.5 / 127.5 + 1e-6)
    with Image.open(tmp_path / "masks" / "synthetic_0007.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), made.labels[0])
    images, labels = READERS["images"](tmp_path, "synthetic_0007", channels)
    np.testing.assert_allclose(images, made.images, atol=0.5 / 127.5 + 1e-6)
    np.testing.assert_array_equal(labels, made.labels)
    with pytest.raises(VolumeError, match="do not fit together"):
        READERS["images"](tmp_path, "synthetic_0007", 4 - channels)
    (tmp_path / "images" / "synthetic_0007.png").write_bytes(b"no picture")
    with pytest.raises(VolumeError, match="is no PNG"):
        READERS["images"](tmp_path, "synthetic_0007", channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_subject_of_a_factory_of_pictures_is_one_picture(config, channels, tmp_path):
    torch.manual_seed(0)
    generator = make_generator(replace(config, z_bins=1, image_channels=channels)).eval()
    factory = TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=6.0)
    made = untrained_labelled_factory(factory, LabelBranch.for_generator(generator, 3).eval())
    made.save(tmp_path / "labelled.safetensors")
    for layout in ("images", "nifti"):
        generate_volumes(tmp_path / "labelled.safetensors", tmp_path / layout, DARK, layout=layout)
        data = read_synthetic(tmp_path / layout, "dark")
        assert data.images.shape == (3, channels, 16, 16) and data.volume.tolist() == [0, 1, 2]
    drawn = draw_slices(made, "dark", volumes=2, seed=0)
    assert drawn.images.shape == (2, channels, 16, 16) and drawn.volume.tolist() == [0, 1]
    with pytest.raises(UsageError, match="z_depth is 2; this factory draws pictures"):
        generate_volumes(tmp_path / "labelled.safetensors", tmp_path / "deep", replace(DARK, z_depth=2))


def test_volumes_cannot_be_written_as_pictures(labelled_file, tmp_path):
    with pytest.raises(UsageError, match="layout is 'images' and this factory draws volumes"):
        generate_volumes(labelled_file, tmp_path / "o", DARK, layout="images")
    with pytest.raises(UsageError, match=r"draws pictures of 4 channel\(s\)"):
        refuse_unsuitable("images", pictures=True, channels=4)
