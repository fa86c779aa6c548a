"""Patients of DICOM headers under names that a store's key makes."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fedfactory.common.files import restrict_access
from fedfactory.errors import UsageError
from fedfactory.imaging.archive.pseudonyms import KEY_FILE, PSEUDONYM, pseudonym
from fedfactory.node.store.patient_split import split_patients
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import INDEX, SliceStore
from fedfactory.node.store.store_writer import update_index
from helpers import ball_volume, folder_bytes, write_dicom

CONFIG = PrepareConfig(domain="x", size=16, z_bins=4, validation_share=0.25, test_share=0.25, seed=3)


def add_series(folder: Path, number: int, patient: str) -> None:
    image, _ = ball_volume(shape=(10, 9, 4), seed=number)
    write_dicom(folder / f"study{number}", image, patient=patient, uid=f"1.2.99.{number}")


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """Five series of four patients, whose identifiers are seven digits and what `write_dicom` adds."""
    folder = tmp_path_factory.mktemp("series")
    for number, patient in enumerate(["0004711", "0004712", "0004712", "0004713", "0004714"]):
        add_series(folder, number, patient)
    return folder


@pytest.fixture
def out(series, tmp_path) -> Path:
    prepare(series, tmp_path / "store", CONFIG)
    return tmp_path / "store"


def earlier_digest(identifier: str) -> str:
    """The name that earlier stores give a patient."""
    return hashlib.sha256(f"fedfactory/{identifier}".encode()).hexdigest()[:16]


def as_earlier(out: Path) -> None:
    """Make a store what an earlier version wrote: digests without a key, in its sentences too."""
    key = bytes.fromhex((out / KEY_FILE).read_text())
    digests = {pseudonym(key, d): d for d in (earlier_digest(f"{n:07d}-7") for n in range(4700, 4730))}
    index = SliceStore(out).read_index()
    index = replace(index, warnings=("all seem to be of one patient (" + index.cases[0].patient + ")",))
    (out / "work").mkdir()
    update_index(out, out / "work", index.with_patients(digests))
    (out / "work").rmdir()
    (out / KEY_FILE).unlink()


def parts(store: SliceStore) -> dict[str, str]:
    return {case.name: case.split for case in store.cases}


def test_a_store_without_its_key_cannot_be_searched_for_identifiers(out, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns(KEY_FILE))
    everything = b"".join(folder_bytes(copy).values()).decode("latin-1")
    assert PSEUDONYM.search(everything)
    for number in range(4000, 5500):
        for text in (f"{number:07d}-7", f"{number:07d}"):
            tried = [
                hashlib.sha256(text.encode()), hashlib.md5(text.encode()),
                hashlib.sha256(f"fedfactory/{text}".encode()),
                hmac.new(b"", text.encode(), "sha256"), hmac.new(b"", earlier_digest(text).encode(), "sha256"),
            ]  # fmt: skip
            assert not any(digest.hexdigest()[:16] in everything for digest in tried)
            assert text not in everything


def test_with_its_key_a_store_knows_its_patients(out):
    key = bytes.fromhex((out / KEY_FILE).read_text())
    named = [case.patient for case in SliceStore(out).cases]
    wanted = [pseudonym(key, earlier_digest(f"{n}-7")) for n in ("0004711", "0004712", "0004712", "0004713", "0004714")]
    assert named == wanted


def test_the_split_does_not_depend_on_the_key(series, out, tmp_path):
    again = prepare(series, tmp_path / "again", CONFIG).store
    assert [case.patient for case in again.cases] != [case.patient for case in SliceStore(out).cases]
    assert parts(again) == parts(SliceStore(out))
    assert sorted(set(parts(again).values())) == ["test", "train", "validation"]
    # As earlier versions drew it, in the order of the digests; seed 3 gives the second place to validation.
    ranks = {f"p{n}": earlier_digest(n) for n in ("0004711-7", "0004712-7", "0004713-7", "0004714-7")}
    drawn = split_patients(dict.fromkeys(ranks.values(), True), validation_share=0.25, test_share=0.25, seed=3)
    assert parts(again)["study0"] == drawn[earlier_digest("0004711-7")]
    assert parts(again)["study4"] == drawn[earlier_digest("0004714-7")]


def test_the_key_is_for_the_owner_alone_and_in_no_other_file(series, tmp_path):
    restrict_access(share_group=True)
    try:
        prepare(series, tmp_path / "store", CONFIG)
    finally:
        restrict_access()
    content = folder_bytes(tmp_path / "store")
    key = content.pop(KEY_FILE).strip()
    assert len(bytes.fromhex(key.decode())) == 32
    assert stat.filemode((tmp_path / "store" / KEY_FILE).stat().st_mode) == "-rw-------"
    everything = b"".join(content.values())
    assert key not in everything and bytes.fromhex(key.decode()) not in everything


def test_a_store_that_is_extended_keeps_its_key_and_knows_its_patients(series, out, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(series, more)
    add_series(more, 7, "0004714")
    key, before = (out / KEY_FILE).read_bytes(), {c.name: c for c in SliceStore(out).cases}
    store = prepare(more, out, CONFIG).store
    assert (out / KEY_FILE).read_bytes() == key
    (new,) = (case for case in store.cases if case.name == "study7")
    assert (new.patient, new.split) == (before["study4"].patient, before["study4"].split)


def test_patients_of_an_earlier_store_get_pseudonyms_when_it_is_prepared_again(series, out, tmp_path):
    as_earlier(out)
    digest = earlier_digest("0004711-7")
    assert digest in (out / INDEX).read_text()
    before = parts(SliceStore(out))
    done = prepare(series, out, CONFIG)  # nothing new in the folder
    assert done.unchanged == 5
    assert parts(done.store) == before
    for number in ("0004711", "0004712", "0004713", "0004714"):
        assert earlier_digest(f"{number}-7").encode() not in b"".join(folder_bytes(out).values())
    assert all(PSEUDONYM.fullmatch(case.patient) for case in SliceStore(out).cases)
    more = tmp_path / "more"
    shutil.copytree(series, more)
    add_series(more, 7, "0004714")
    as_earlier(out)
    store = prepare(more, out, CONFIG).store
    by_name = {case.name: case for case in store.cases}
    assert by_name["study7"].patient == by_name["study4"].patient
    assert by_name["study7"].split == before["study4"]
    assert digest.encode() not in b"".join(folder_bytes(out).values())


def test_a_store_whose_key_is_lost_is_not_extended_by_new_series(series, out, tmp_path):
    (out / KEY_FILE).unlink()
    assert prepare(series, out, CONFIG).unchanged == 5  # nothing depends on it
    before = folder_bytes(out)
    more = tmp_path / "more"
    shutil.copytree(series, more)
    add_series(more, 7, "0004714")
    with pytest.raises(UsageError, match=r"patients\.key is missing.*put it back"):
        prepare(more, out, CONFIG)
    assert folder_bytes(out) == before
    (out / KEY_FILE).write_text("abc")
    with pytest.raises(UsageError, match="is no key of 32 bytes"):
        prepare(more, out, CONFIG)


def test_names_that_a_site_gave_itself_stay(series, tmp_path):
    table = {f"study{n}": f"{n // 2:016x}" for n in range(5)}  # which look as the earlier digests do
    store = prepare(series, tmp_path / "store", replace(CONFIG, patients=table)).store
    assert [case.patient for case in store.cases] == list(table.values())
    assert not (store.path / KEY_FILE).exists()
    again = prepare(series, tmp_path / "store", replace(CONFIG, patients=table)).store
    assert [case.patient for case in again.cases] == list(table.values())
    assert json.loads((store.path / INDEX).read_text())["cases"][0]["patient"] == "0" * 16
