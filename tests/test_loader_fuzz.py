"""Damaged files of every kind that a loader reads: an error of this package in one line, or it is read.

By default a few mutations of each kind; `pytest -m fuzz` runs three hundred.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.adaptation.averaged_segmenter import AVERAGE, load_segmenter
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.common.weights_file import CARD, write_weights
from fedfactory.errors import FedFactoryError
from fedfactory.generative.factory_file import load_factory
from fedfactory.generative.image_encoder import read_embedding
from fedfactory.generative.original_checkpoint import import_checkpoint
from fedfactory.imaging.centre_table import read_centre_table
from fedfactory.imaging.formats.label_values import parse_label_values
from fedfactory.imaging.layouts.description import read_description
from fedfactory.imaging.patients import read_patient_table
from fedfactory.imaging.pictures.colour_table import read_colour_table
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import description_of, read_facts, store_facts
from fedfactory.node.store.derived.pseudo_labels import (
    PseudoLabelFacts,
    pseudo_label_facts,
    pseudo_labels,
    write_pseudo_labels,
)
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.node_selection import Federation
from fedfactory.researcher.run_state import RunState, Stage
from helpers import method_of, untrained_segmenter
from mutations import damaged_bytes, damaged_json

FEW, MANY = 12, 300
LONGEST = 5.0  # seconds


def edit_json(content: bytes, rng: random.Random) -> bytes:
    return damaged_json(content.decode("utf-8"), rng).encode("utf-8", "surrogatepass")


def edit_card(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose card, an entry of its header, is damaged, and whose sizes fit."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][CARD] = damaged_json(header["__metadata__"][CARD], rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def edit_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is damaged."""
    (length,) = struct.unpack("<Q", content[:8])
    text = damaged_json(content[8 : 8 + length].decode(), rng).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def edit_array(content: bytes, rng: random.Random) -> bytes:
    """A `.npy` file whose header says something else."""
    start = content.index(b"{")
    end = content.index(b"\n", start)
    odd = [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",
        b"{'descr': '<f2', 'fortran_order': False, 'shape': (" + b"9" * 300 + b",), }",
        b"{'descr': '<f2', 'fortran_order': True, 'shape': (-1, 4), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': 0, 'shape': (1,)}",
        b"(" * 90,
        b"{'descr': '<f2', 'shape': (1,)}",
        b"{'descr': '<M8[ns]', 'fortran_order': False, 'shape': ()}",
        b"__import__('os').system('true')",
    ]
    text = rng.choice(odd)[: end - start].ljust(end - start)
    return content[:start] + text + content[end:]


def files_of(folder: Path, kinds: dict[str, Callable]) -> list[tuple[Path, Callable]]:
    return [(folder / name, edit) for name, edit in kinds.items()]


@pytest.fixture
def loaders(store, trained, labelled, tmp_path):
    """Kind of file to the files that are damaged, with the way, and the loader."""
    folder = tmp_path / "files"
    folder.mkdir()
    trained.save(folder / "factory.safetensors")
    labelled.save(folder / "labelled.safetensors")
    untrained_segmenter().save(folder / "segmenter.safetensors")
    SiteChoices(network="unet").save(store)
    run = RunState(config=trained.config, federation=Federation(tag="tag"), stages=(Stage(3),), seed=0, save_every=1)
    run.save(folder)
    np.save(folder / "mean.npy", np.ones((1, 8), np.float32))
    torch.save({"g": {"a": torch.ones(2)}, "d": {}, "g_ema": {"a": torch.ones(2)}}, folder / "original.pt")
    (folder / "values.json").write_text('{"205": 1, "420": 2, "*": 0}')
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "training": [{"image": "a"}]})
    )
    (folder / "imagesTr").mkdir()
    (folder / "centres.csv").write_text("CASE,X,Y,Z\na,1.5,2,3\nb,4,5,6\n")
    (folder / "patients.csv").write_text("CASE,PATIENT\na,p1\nb,p2\n")
    (folder / "colours.csv").write_text("R,G,B,CLASS\n255,0,0,1\n0,255,0,2\n")
    (folder / "facts.txt").write_text(description_of(store_facts(store, SiteChoices())))
    (folder / "volumes.json").write_text("{}")
    index = store.path / "store.json"
    array = store.path / store.files["images"]

    def verify(path: Path) -> None:
        SliceStore(path.parent).verify()

    unlabelled = SliceStore(shutil.copytree(store.path, folder / "unlabelled.store"))
    facts = PseudoLabelFacts(
        made_by="test", images=store.files["images"], segmenter="0" * 64, segmenter_domain="x", classes=3,
        least_confidence=0.5, slices=1, known_share=0.5, structure_share=0.1, agreement=None, dice=0.5, dice_cases=1,
        doubts=("one",),
    )  # fmt: skip
    write_pseudo_labels(unlabelled, np.zeros(unlabelled.images[:, 0].shape, np.uint8), facts)
    average, method = folder / "average.safetensors", method_of("fedavg")
    card = {"kind": AVERAGE, "config": method.config.to_dict(), "facts": {}}
    write_weights(average, method.build().state_dict(), card)
    fitting = replace(store.format, size=32)

    weights = (edit_card, edit_header, damaged_bytes)
    made = {
        "store index": (index, (edit_json, damaged_bytes), verify),
        "store array": (array, (edit_array, damaged_bytes), verify),
        "store format": (store.path / "format.json", (edit_json, damaged_bytes), PrepareConfig(domain="x").like),
        "site choices": (
            store.path.with_name(store.path.name + ".choices.json"),
            (edit_json, damaged_bytes),
            lambda path: SiteChoices.load(store).check(store),
        ),
        "factory": (folder / "factory.safetensors", weights, load_factory),
        "labelled factory": (folder / "labelled.safetensors", weights, LabelledFactory.load),
        "segmenter": (folder / "segmenter.safetensors", weights, Segmenter.load),
        "average": (average, weights, lambda path: load_segmenter(path, fitting)),
        "pseudo-labels": (
            unlabelled.path / "pseudo_labels.npy", (edit_array, damaged_bytes), lambda path: pseudo_labels(unlabelled),
        ),
        "facts about pseudo-labels": (
            unlabelled.path / "pseudo_labels.json", (edit_json, damaged_bytes),
            lambda path: (pseudo_label_facts(unlabelled) or facts).rows(),
        ),
        "run": (folder / "experiment.json", (edit_json, damaged_bytes), lambda path: RunState.load(path.parent)),
        "embedding": (folder / "mean.npy", (edit_array, damaged_bytes), read_embedding),
        "original checkpoint": (folder / "original.pt", (damaged_bytes,), import_checkpoint),
        "label values": (
            folder / "values.json", (edit_json, damaged_bytes), lambda path: parse_label_values(str(path)),
        ),
        "nnU-Net description": (
            folder / "dataset.json", (edit_json, damaged_bytes), lambda path: read_description(path.parent),
        ),
        "table of centres": (folder / "centres.csv", (damaged_bytes,), read_centre_table),
        "table of patients": (folder / "patients.csv", (damaged_bytes,), read_patient_table),
        "table of colours": (folder / "colours.csv", (damaged_bytes,), read_colour_table),
        "announcement": (
            folder / "facts.txt",
            (damaged_bytes,),
            lambda path: read_facts(path.read_text(encoding="utf-8", errors="replace")),
        ),
    }  # fmt: skip
    for path, _, load in made.values():  # all are read as they are
        try:
            load(path)
        except FedFactoryError as error:
            assert path.name == "original.pt", error  # which is no whole network
    return made


KINDS = (
    "store index", "store array", "store format", "site choices", "factory", "labelled factory", "segmenter", "run",
    "embedding", "original checkpoint", "label values", "nnU-Net description", "table of centres", "table of patients",
    "table of colours", "announcement", "average", "pseudo-labels", "facts about pseudo-labels",
)  # fmt: skip


def check(made, kind: str, count: int) -> None:
    path, edits, load = made[kind]
    original = path.read_bytes()
    rng = random.Random(kind)
    faults = []
    for number in range(count):
        content = edits[number % len(edits)](original, rng)
        path.write_bytes(content)
        started = time.perf_counter()
        try:
            load(path)
        except FedFactoryError as error:
            if not str(error).isprintable() or len(str(error)) > 12_000:
                faults.append(f"{number}: a message of several lines or of {len(str(error))} signs: {error!r:.200}")
        except Exception as error:
            faults.append(f"{number}, {edits[number % len(edits)].__name__}: {error!r:.300}")
        if time.perf_counter() - started > LONGEST:
            faults.append(f"{number}: took {time.perf_counter() - started:.1f} s")
    path.write_bytes(original)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_an_error_of_one_line_or_is_read(kind, loaders):
    check(loaders, kind, FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_damaged_files_are_errors_of_one_line_or_are_read(kind, loaders):
    check(loaders, kind, MANY)
