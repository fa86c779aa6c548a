"""Preparing a store: extended, by several threads, by two runs at once, killed, and on a full disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from fedfactory.errors import StoreError, UsageError, VolumeError
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.volume_files import write_volume
from fedfactory.node.store import prepare as prepare_module
from fedfactory.node.store import store_writer
from fedfactory.node.store.prepare import prepare, prepare_cases
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import ball_volume, folder_bytes, write_site
from safetensors.numpy import save_file

CONFIG = PrepareConfig(domain="x", size=16, z_bins=4)


def files_of(store) -> list[str]:
    return sorted(path.name for path in store.path.iterdir())


def test_another_sites_format_is_adopted_and_names_no_patient(site, tmp_path):
    first = prepare(site, tmp_path / "first", replace(CONFIG, spacing=4.5)).store
    text = (first.path / "format.json").read_text()
    assert "case" not in text
    write_site(tmp_path / "wide", shape=(40, 40, 6), spacing=(4.0, 4.0, 5.0))
    same = prepare(
        tmp_path / "wide", tmp_path / "same", PrepareConfig(domain="x").like(first.path / "format.json")
    ).store
    assert same.format == first.format
    other = prepare(tmp_path / "wide", tmp_path / "other", PrepareConfig(domain="y").like(first.path)).store
    assert replace(other.format, window=first.format.window) == first.format
    assert other.format.window != first.format.window
    with pytest.raises(UsageError, match="no such file"):
        PrepareConfig(domain="x").like(tmp_path / "nowhere.json")
    (tmp_path / "odd.json").write_text('{"format": {"size": -1}}')
    with pytest.raises(StoreError, match="not a slice format"):
        PrepareConfig(domain="x").like(tmp_path / "odd.json")


def test_a_second_run_adds_replaces_and_skips(site, tmp_path):
    out = tmp_path / "out"
    before = prepare(site, out, CONFIG).store
    images, window, names = np.array(before.images), before.format.window, files_of(before)
    bytes_before = folder_bytes(out)
    again = prepare(site, out, CONFIG)
    assert (again.added, again.replaced, again.unchanged, again.kept) == (0, 0, 3, 0)
    assert folder_bytes(out) == bytes_before
    image, label = ball_volume(seed=9)
    write_volume(site / "case1" / "image" / "scan.nii.gz", image)
    write_volume(site / "case1" / "label" / "mask.nii.gz", label)
    write_volume(site / "b" / "image" / "i.nii.gz", ball_volume(seed=10)[0])
    (site / "case2" / "image" / "scan.nii.gz").unlink()
    (out / "embedding.npy").write_bytes(b"of the earlier slices")
    after = prepare(site, out, CONFIG)
    assert (after.added, after.replaced, after.unchanged, after.kept) == (1, 1, 1, 1)
    assert [case.name for case in after.store.cases] == ["b", "case0", "case1", "case2"]
    assert after.store.format.window == window
    np.testing.assert_array_equal(after.store.images[8:16], images[:8])
    np.testing.assert_array_equal(after.store.images[24:], images[16:])
    assert not np.array_equal(after.store.images[16:24], images[8:16])
    assert (after.store.labels[:8] == UNLABELLED).all()
    assert len(files_of(after.store)) == len(names)  # old arrays, and what was made of them, are gone
    after.store.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 32}, "size is 16, not 32"), ({"z_bins": 9}, "z_bins is 4, not 9"), ({"domain": "y"}, "is x, not y"),
     ({"plane": "coronal"}, "plane"), ({"spacing": 2.0}, "spacing")],
)  # fmt: skip
def test_a_store_is_not_extended_with_slices_of_another_kind(site, tmp_path, change, message):
    prepare(site, tmp_path / "out", CONFIG)
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        prepare(site, tmp_path / "out", replace(CONFIG, **change))
    assert folder_bytes(tmp_path / "out") == before


def test_a_store_holds_cases_with_labels_of_different_kinds(site, tmp_path):
    write_site(site, cases=4)
    names = [f"case{n}" for n in range(4)]

    def of(number, **changes):
        exclude = tuple(name for name in names if name != f"case{number}")
        return prepare(site, tmp_path / "out", replace(CONFIG, exclude=exclude, **changes)).store

    of(0, split="train")
    of(1, label_kind="image", split="train")
    assert of(2, label_kind="none", split="train").label_kind == "mixed"
    store = of(3, label_kind="box", split="test")
    kinds = [(case.label_kind, case.split) for case in store.cases]
    assert kinds == [("dense", "train"), ("image", "train"), ("none", "train"), ("box", "test")]
    np.testing.assert_array_equal(store.labelled_slices("train"), np.arange(8))
    with pytest.raises(
        StoreError, match=r"no case .* dense labels in the test part; its labels are of kind box, image"
    ):
        store.labelled_slices("test")
    assert (store.labels[8:24] == UNLABELLED).all() and store.presence[8:16].any() and not store.presence[16:].any()
    with pytest.raises(UsageError, match="needs training cases first"):
        prepare(site, tmp_path / "other", replace(CONFIG, split="test"))
    assert not (tmp_path / "other").exists()
    again = of(0, label_kind="image", split="train")  # the same files, read otherwise
    assert again.cases[0].label_kind == "image" and (again.labels[:8] == UNLABELLED).all()
    again.verify()


def test_the_store_does_not_depend_on_the_number_of_workers(site, tmp_path):
    write_site(site, cases=7)
    prepare(site, tmp_path / "single", CONFIG)
    prepare(site, tmp_path / "four", CONFIG, workers=4)
    assert folder_bytes(tmp_path / "single") == folder_bytes(tmp_path / "four")


def test_threads_take_their_usual_turns_again_after_a_run(site, tmp_path):
    before, seen = sys.getswitchinterval(), []

    def survey(*_):
        seen.append(sys.getswitchinterval())
        raise VolumeError("no case is good enough")

    with pytest.raises(VolumeError, match="good enough"):
        prepare_cases(find_cases(site), tmp_path / "out", CONFIG, source=site, survey=survey)
    assert max(seen) < before == sys.getswitchinterval()


def test_cases_with_equal_files_are_cut_at_the_same_time(tmp_path, monkeypatch):
    """Equal files have one name in the working folder; a file that both threads write would be gone for the second."""
    image, label = ball_volume()
    for name in ("case0", "case1"):
        write_volume(tmp_path / "s" / name / "image" / "i.nii.gz", image)
        write_volume(tmp_path / "s" / name / "label" / "l.nii.gz", label)
    together = Barrier(2)

    def save(*arguments):
        together.wait(timeout=30)  # both have found that nobody has cut the case yet
        save_file(*arguments)
        together.wait(timeout=30)

    monkeypatch.setattr(store_writer, "save_file", save)
    result = prepare(tmp_path / "s", tmp_path / "out", CONFIG, workers=2)
    assert [case.count for case in result.store.cases] == [8, 8] and not result.failed
    result.store.verify()


def test_cut_slices_are_read_by_threads_that_interrupt_each_other(site, tmp_path):
    """CPython's `ast`, which parses `.npy` headers, counts its depth for all threads together and raises at random."""
    prepare_interrupted = """
import gc, sys, time
from pathlib import Path
from fedfactory.node.store.prepare import prepare, prepare_cases
from fedfactory.node.store.prepare_config import PrepareConfig
sys.setswitchinterval(1e-6)
gc.set_threshold(7)
gc.callbacks.append(lambda phase, facts: time.sleep(0))  # lets another thread run at any point
prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareConfig(domain="x", size=16, validation_share=0), workers=4)
"""
    write_site(site, cases=60)
    command = [sys.executable, "-c", prepare_interrupted, str(site), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-500:]


def test_two_runs_on_one_store_do_not_mix(site, tmp_path, monkeypatch):
    def second(*_, **__):
        with pytest.raises(UsageError, match="another `fedfactory prepare`"):
            prepare(site, tmp_path / "out", CONFIG)
        raise StoreError("stopped")

    monkeypatch.setattr(prepare_module, "store_warnings", second)
    with pytest.raises(StoreError, match="stopped"):
        prepare(site, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_of_five_runs_that_start_together_on_a_new_store_none_harms_another(site, tmp_path):
    def run(out: Path) -> str:
        try:
            return f"{prepare(site, out, CONFIG).added} added"
        except UsageError as error:
            assert "another `fedfactory prepare`" in str(error)
            return "refused"

    ends = []
    for attempt in range(6):
        out = tmp_path / f"out{attempt}"
        with ThreadPoolExecutor(5) as pool:
            ends += (found := list(pool.map(run, [out] * 5)))
        assert found.count("3 added") == 1
        SliceStore(out).verify()
        assert not (out / ".partial").exists()
    assert "refused" in ends


CHILD = """
import sys
from fedfactory.node.store.prepare import prepare, prepare_cases
from fedfactory.node.store.prepare_config import PrepareConfig
print("ready", flush=True)
sys.stdin.readline()
prepare(sys.argv[1], sys.argv[2], PrepareConfig(domain="x", size=32, z_bins=4), workers=2)
"""


@pytest.mark.parametrize("append", [False, True], ids=["new", "extended"])
def test_a_killed_run_leaves_a_valid_store_and_the_next_one_finishes_it(tmp_path, append):
    """Killed at many moments between start and end; the result must be that of a single run, byte for byte."""
    source, first = tmp_path / "site", tmp_path / "first"
    write_site(source, cases=4)
    config = PrepareConfig(domain="x", size=32, z_bins=4)
    if append:
        prepare(source, first, config)
        write_site(source, cases=9)
    reference = tmp_path / "reference"
    subprocess.run(["cp", "-r", first, reference], check=True) if append else None
    started = time.monotonic()
    prepare(source, reference, config, workers=2)
    whole = time.monotonic() - started
    expected, stages = folder_bytes(reference), set()
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        if append:
            subprocess.run(["cp", "-r", first, out], check=True)
        child = subprocess.Popen([sys.executable, "-c", CHILD, source, out], stdin=-1, stdout=-1, text=True)
        child.stdout.readline()
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(whole * (attempt + 0.5) / 5)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if append:
            SliceStore(out).verify()
        stages.add((out / ".partial").exists())
        prepare(source, out, config)
        assert folder_bytes(out) == expected
    assert True in stages  # some run was killed while it was writing


def test_a_full_disk_gives_a_single_line_and_the_next_run_goes_on(site, tmp_path):
    """A limit on file size stands for the full disk: the slices fit, the store's array does not."""
    out = tmp_path / "out"
    program = f'{sys.executable} -c "from fedfactory.cli import main; main()"'
    command = f"ulimit -f 44; exec {program} prepare {site} --out {out} --domain x --size 32"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "File too large" in result.stderr
    assert not (out / "store.json").exists()
    assert prepare(site, out, PrepareConfig(domain="x", size=32)).added == 3
    assert not (out / ".partial").exists()
