"""Several channels to slice stores: their order and windows, missing ones, and grids; one channel is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import Preparation, prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import ball_volume, image_of, image_slices, oriented

KEYS = "t1,t2,flair"
SIDE, SPACING = 24, 3.0  # the slices of the volumes of the tests are their own voxels


def channels_of(seed: int) -> tuple[list[Volume], Volume]:
    """Three contrasts of a ball with a core (T1, T2, FLAIR), of very different grey levels, and the label map."""
    image, label = ball_volume(seed=seed)
    rng = np.random.default_rng(seed + 100)
    tables = ([10, 60, 100], [900, 300, 500], [-5, -3, -4])
    noise = (2.0, 20.0, 0.1)
    made = [
        Volume(
            (np.array(t, np.float32)[label.data] + s * rng.normal(size=label.data.shape)).astype(np.float32),
            image.affine,
        )
        for t, s in zip(tables, noise, strict=True)
    ]
    return made, label


def write_case(folder: Path, seed: int, *, leave_out=()) -> None:
    volumes, label = channels_of(seed)
    for key, volume in zip(KEYS.split(","), volumes, strict=True):
        if key not in leave_out:
            write_volume(folder / key / "scan.nii.gz", volume)
    write_volume(folder / "label" / "mask.nii.gz", label)


def brain_site(folder: Path, cases=3) -> Path:
    for number in range(cases):
        write_case(folder / f"case{number}", number)
    return folder


def settings(**changes) -> PrepareConfig:
    values = {"domain": "x", "size": SIDE, "z_bins": 4, "spacing": SPACING, "crop": "none", "image_key": KEYS}
    return PrepareConfig(**{**values, "validation_share": 0.0, "test_share": 0.0, **changes})


def expected_images(volumes: dict[str, list[Volume | None]], channel: int) -> dict[str, np.ndarray]:
    """(slices, SIDE, SIDE) of a channel of each case in [-1, 1]: standardised, cut to the window of all, padded.

    With plain numpy: the window lies between the right edges of the bins, of 256 over the range, in which the shares
    of 0.1 % and 99.9 % of the voxels are reached. The volumes have the slices' own grid, so nothing is interpolated.
    """
    standardised = {}
    for name, channels in volumes.items():
        if channels[channel] is not None:
            data = channels[channel].data.astype(np.float64)
            standardised[name] = (data - data.mean()) / data.std()
    everything = np.concatenate([values.ravel() for values in standardised.values()])
    counts, edges = np.histogram(everything, 256)
    share = np.cumsum(counts) / counts.sum()
    low, high = (edges[1:][np.argmax(share >= limit)] for limit in (0.001, 0.999))
    found = {}
    for name, channels in volumes.items():
        rows, columns, slices = next(v for v in channels if v is not None).data.shape
        padded = np.full((slices, SIDE, SIDE), -1.0)
        if name in standardised:
            start = [(SIDE - n) // 2 for n in (rows, columns)]
            values = np.clip((standardised[name] - low) / (high - low), 0, 1) * 2 - 1
            padded[:, start[0] : start[0] + rows, start[1] : start[1] + columns] = np.moveaxis(values, 2, 0)
        found[name] = padded
    return found


def check(result: Preparation, volumes: dict[str, list[Volume | None]], order: list[int]) -> None:
    """The images of a store are those that plain numpy makes of the channels, in this order."""
    for place, channel in enumerate(order):
        expected = expected_images(volumes, channel)
        for case in result.store.cases:
            # The window's ends may lie in the neighbouring bin, whose edges are computed with other roundings.
            np.testing.assert_allclose(result.store.images[case.span, place], expected[case.name], atol=0.02)


@pytest.mark.parametrize("key", [KEYS, "flair, t1,t2", "t2"])
def test_every_channel_has_its_place_and_its_window(key, tmp_path):
    result = prepare(brain_site(tmp_path / "s"), tmp_path / "out", settings(image_key=key), workers=2)
    names = [name.strip() for name in key.split(",")]
    order = [KEYS.split(",").index(name) for name in names]
    store = result.store
    assert store.images.shape == (24, len(names), SIDE, SIDE)
    assert store.format.channels == len(names) and len(set(store.format.window)) == len(names)
    assert not store.format.colour and store.site.channels == (tuple(names) if len(names) > 1 else ())
    check(result, {f"case{n}": list(channels_of(n)[0]) for n in range(3)}, order)
    page = (tmp_path / "out" / "quality.html").read_text(encoding="utf-8")
    assert ("of flair" in page) == (len(names) > 1)
    store.verify()
    again = prepare(tmp_path / "s", tmp_path / "out", settings(image_key=key))
    assert again.unchanged == 3


def test_channels_of_another_order_do_not_extend_a_store(tmp_path):
    prepare(brain_site(tmp_path / "s", cases=1), tmp_path / "out", settings())
    with pytest.raises(UsageError, match=r"channels is \('t1', 't2', 'flair'\), not \('t2', 't1', 'flair'\)"):
        prepare(tmp_path / "s", tmp_path / "out", settings(image_key="t2,t1,flair"))
    for wrong in ("t1,,t2", "t1,t1"):
        with pytest.raises(UsageError, match="image_key is"):
            prepare(tmp_path / "s", tmp_path / "new", settings(image_key=wrong))


def test_a_case_that_lacks_a_channel_is_named_or_filled_with_background(tmp_path):
    source = brain_site(tmp_path / "s", cases=2)
    write_case(source / "part", 2, leave_out=("t1", "flair"))
    result = prepare(source, tmp_path / "out", settings())
    assert "part: has no channel t1, flair; add the files, or fill them" in result.failed["part"]
    filled = prepare(source, tmp_path / "filled", settings(fill_missing=True))
    assert not filled.failed and len(filled.store.cases) == 3
    part = next(case for case in filled.store.cases if case.name == "part")
    images = filled.store.images[part.span]
    assert (images[:, [0, 2]] == -1).all() and images[:, 1].std() > 0.1
    volumes = {f"case{n}": list(channels_of(n)[0]) for n in range(2)}
    volumes["part"] = [None, channels_of(2)[0][1], None]
    check(filled, volumes, [0, 1, 2])
    assert filled.store.labels[part.span].max() == 2  # its labels lie on the grid of the channel that is there


def test_a_channel_that_moves_to_the_place_of_a_missing_one_makes_another_case(tmp_path):
    source = brain_site(tmp_path / "s", cases=2)
    write_case(source / "part", 2, leave_out=("t1", "flair"))
    write_case(source / "twin", 2, leave_out=("t1", "flair"))
    (source / "twin" / "t2").rename(source / "twin" / "flair")  # the same file as another contrast
    result = prepare(source, tmp_path / "out", settings(fill_missing=True))
    part, twin = (next(c for c in result.store.cases if c.name == name) for name in ("part", "twin"))
    assert (result.store.images[twin.span][:, :2] == -1).all() and (result.store.images[part.span][:, 2] == -1).all()
    (source / "part" / "t2").rename(source / "part" / "t1")
    again = prepare(source, tmp_path / "out", settings(fill_missing=True))
    assert (again.replaced, again.unchanged) == (1, 3)
    assert (again.store.images[again.store.cases[2].span][:, 1:] == -1).all()


def test_a_channel_that_every_case_lacks_or_that_is_constant_is_named(tmp_path):
    source = tmp_path / "s"
    for number in range(2):
        write_case(source / f"case{number}", number, leave_out=("flair",))
    with pytest.raises(Exception, match="channel 2 is missing in every training case"):
        prepare(source, tmp_path / "out", settings(fill_missing=True))
    flat = channels_of(0)[0][1]
    write_volume(source / "case0" / "t2" / "scan.nii.gz", Volume(np.full_like(flat.data, 7), flat.affine))
    result = prepare(source, tmp_path / "out", settings(image_key="t1,t2"))
    assert list(result.failed) == ["case0"]
    assert "case0/t2/scan.nii.gz: all voxels have the same value" in result.failed["case0"]


def test_channels_of_different_grids_are_one_line(tmp_path):
    source = brain_site(tmp_path / "s", cases=4)
    volume = channels_of(1)[0][1]
    write_volume(source / "case1" / "t2" / "scan.nii.gz", Volume(volume.data[:, :, :-1], volume.affine))
    moved = volume.affine.copy()
    moved[0, 3] += 1
    write_volume(source / "case2" / "flair" / "scan.nii.gz", Volume(volume.data, moved))
    (source / "case3" / "t1" / "scan.nii.gz").write_bytes(b"no image")
    result = prepare(source, tmp_path / "out", settings())
    assert [case.name for case in result.store.cases] == ["case0"]
    assert "case1/t2/scan.nii.gz: shape is (20, 24, 7)" in result.failed["case1"]
    assert "case2/flair/scan.nii.gz: its affine differs" in result.failed["case2"]
    assert "case3/t1/scan.nii.gz" in result.failed["case3"]


@pytest.mark.parametrize("codes", ["LPI", "SAR", "AIR"])
def test_a_channel_in_another_axis_order_is_brought_to_the_first(codes, tmp_path):
    source = brain_site(tmp_path / "s", cases=2)
    volumes, label = channels_of(0)
    write_volume(source / "case0" / "t2" / "scan.nii.gz", oriented(volumes[1], codes))
    write_volume(source / "case0" / "label" / "mask.nii.gz", oriented(label, codes))
    found = prepare(source, tmp_path / "out", settings()).store
    expected = prepare(brain_site(tmp_path / "plain", cases=2), tmp_path / "other", settings()).store
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.images, expected.images, atol=2e-3)


def test_the_box_of_several_channels_holds_all_their_boxes(tmp_path):
    """Air is cropped where every channel has air."""
    affine = np.diag([3.0, 3.0, 5.0, 1.0])
    rng = np.random.default_rng(0)
    for key, part in (("a", np.s_[2:9, 3:20]), ("b", np.s_[6:17, 5:14])):
        data = np.zeros((20, 24, 6), np.float32)
        data[part] = 50 + rng.normal(0, 5, data[part].shape)
        write_volume(tmp_path / "s" / "case" / key / "x.nii.gz", Volume(data, affine))
    boxes = [
        prepare(tmp_path / "s", tmp_path / key, settings(image_key=key, crop="air")).store.cases[0].box
        for key in ("a", "b", "a,b")
    ]
    expected = tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(boxes[0], boxes[1], strict=True))
    assert boxes[2] == expected and boxes[0] != boxes[1]


# nnU-Net


def nnunet(folder: Path, channels: int, *, cases=3, name="case{n}", key="channel_names") -> Path:
    """An nnU-Net raw data set; channel k of case n is that contrast of its ball, a fourth one the first mirrored."""
    names = {str(k): f"contrast {k}" for k in range(channels)}
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({key: names, "labels": {"background": 0, "ball": 1, "core": 2}}))
    for number in range(cases):
        volumes, label = channels_of(number)
        volumes.append(Volume(volumes[0].data[::-1].copy(), volumes[0].affine))
        case = name.format(n=number)
        for channel in range(channels):
            write_volume(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", volumes[channel])
        write_volume(folder / "labelsTr" / f"{case}.nii.gz", label)
    return folder


@pytest.mark.parametrize(("key", "order"), [("image", [0, 1, 2, 3]), ("3,1", [3, 1]), ("2", [2])])
def test_channels_of_nnunet_are_chosen_by_their_numbers(key, order, tmp_path):
    source = nnunet(tmp_path / "s", 4)
    result = prepare(source, tmp_path / "out", settings(image_key=key))
    assert result.store.images.shape[1] == len(order) and not result.failed
    volumes = {f"case{n}": [*(v := channels_of(n)[0]), Volume(v[0].data[::-1], v[0].affine)] for n in range(3)}
    check(result, volumes, order)


def test_a_case_of_nnunet_that_lacks_a_channel_is_named_or_filled(tmp_path):
    source = nnunet(tmp_path / "s", 4)
    (source / "imagesTr" / "case1_0002.nii.gz").unlink()
    result = prepare(source, tmp_path / "out", settings(image_key="image"))
    assert "case1: has no channel 2" in result.failed["case1"] and len(result.store.cases) == 2
    filled = prepare(source, tmp_path / "filled", settings(image_key="image", fill_missing=True))
    case = filled.store.cases[1]
    assert case.name == "case1" and (filled.store.images[case.span][:, 2] == -1).all()
    (source / "imagesTr" / "case0_0003.nii").write_bytes(b"")
    with pytest.raises(UsageError, match=r"case0_0003.nii and .*case0_0003.nii.gz: are both channel 3 of case0"):
        prepare(source, tmp_path / "twice", settings(image_key="image"))
    with pytest.raises(UsageError, match="image_key is 't1'; an nnU-Net data set numbers its channels"):
        prepare(nnunet(tmp_path / "t", 1), tmp_path / "other", settings(image_key="t1,t2"))


@pytest.mark.parametrize("key", ["channel_names", "modality"])
@pytest.mark.parametrize("labels", [True, False])
def test_four_digits_that_number_the_cases_are_no_channels(key, labels, tmp_path):
    """Files named prostate_0000.nii.gz and so on, without a channel's number; also without label maps beside them."""
    source = tmp_path / "s"
    nnunet(source, 1, cases=0, key=key)
    for number in range(3):
        volumes, label = channels_of(number)
        write_volume(source / "imagesTr" / f"prostate_{number + 1:04d}.nii.gz", volumes[0])
        if labels:
            write_volume(source / "labelsTr" / f"prostate_{number + 1:04d}.nii.gz", label)
    found = find_cases(source)
    assert [case.name for case in found.cases] == ["prostate_0001", "prostate_0002", "prostate_0003"]
    assert all(len(case.channels) == 1 and bool(case.labels) == labels for case in found.cases)


# Files that are given one by one.


def test_files_of_channels_are_one_image(tmp_path):
    source = nnunet(tmp_path / "s", 2, cases=2) / "imagesTr"
    for paths in ([source], sorted(source.iterdir())[::-1]):
        found = find_images(paths, channels=2).cases
        assert sorted(case.name for case in found) == ["case0", "case1"]
        assert all([p.name[-11:-7] for p in case.channels] == ["0000", "0001"] for case in found)
    (source / "case1_0000.nii.gz").unlink()
    with pytest.raises(UsageError, match="case1 has no file case1_0000; an image has 2 channels here"):
        find_images([source], channels=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "case0_0001.nii.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="are both channel 1 of case0"):
        find_images([*source.glob("case0*"), tmp_path / "other" / "case0_0001.nii.gz"], channels=2)


def test_one_channel_is_resampled_as_before(tmp_path):
    """A store of interpolated slices has exactly the values that the grid and numpy give for a volume."""
    image, label = ball_volume(seed=3)
    write_volume(tmp_path / "s" / "case" / "image" / "x.nii.gz", image)
    write_volume(tmp_path / "s" / "case" / "label" / "x.nii.gz", label)
    config = settings(image_key="image", spacing=4.5, size=16, window=(-1.0, 2.0))
    store = prepare(tmp_path / "s", tmp_path / "out", config).store
    grid = image_of(image).grid(store.format)
    mean = image.data.mean(dtype=np.float64)
    deviation = np.sqrt(np.square(image.data - np.float32(mean)).mean(dtype=np.float64))
    slices = (image_slices(grid, image) - np.float32(mean)) / np.float32(deviation)
    scaled = np.nan_to_num((np.clip(slices, -1, 2) + 1) * np.float32(2 / 3) - 1, nan=-1.0).astype(np.float16)
    np.testing.assert_array_equal(store.images[:, 0], scaled)
    np.testing.assert_array_equal(store.labels, grid.label_slices(label))


def test_volumes_and_pictures_do_not_share_a_store(tmp_path):
    from fedfactory.imaging.pictures.decoding import write_picture

    prepare(brain_site(tmp_path / "s", cases=1), tmp_path / "out", settings(image_key="t1"))
    (tmp_path / "p").mkdir()
    write_picture(tmp_path / "p" / "a.png", np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8))
    config = PrepareConfig(domain="x", size=SIDE)
    with pytest.raises(UsageError, match="content is volumes, not pictures"):
        prepare(tmp_path / "p", tmp_path / "out", config)
    prepare(tmp_path / "p", tmp_path / "pictures", config)
    with pytest.raises(UsageError, match="content is pictures, not volumes"):
        prepare(tmp_path / "s", tmp_path / "pictures", settings(image_key="t1"))
    with pytest.raises(VolumeError, match="is a volume; it must be one of the pictures that the slices are made of"):
        prepare(tmp_path / "s", tmp_path / "new", PrepareConfig(domain="x", image_key="t1").like(tmp_path / "pictures"))
