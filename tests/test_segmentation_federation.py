"""Federated segmentation with real nodes: dense labels at one site, boxes at another, scribbles at the third."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fedbiomed.common.serializer import Serializer
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.labels.weak_labels import weaken
from fedfactory.adaptation.segmenter import KIND, Segmenter
from fedfactory.common.weights_file import read_weights
from fedfactory.errors import UsageError
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.segmentation import interrupted_run
from helpers import PATIENT, SITES, ball_volume

MIXED = "mixed-labels"
KINDS = {"bright": "dense", "dark": "box", "west": "scribble"}
NETWORKS = {"bright": "unet", "dark": "dynunet", "west": "segresnet"}
MODALITIES = {"bright": "ct", "dark": "ct", "west": "mri"}
OPTIONS = {
    "fedicra": {"body_share": 0.5, "adaptive_from": 2},
    "hssf": {"public_epochs": 1, "warmup": 0.0},
    "cmc": {"start": 0.5},
}
# `local`, from which nothing leaves, and the methods with their own rounds or aggregation; rounds of each.
# Two rounds where the second round starts from the state of the first.
RUN = {"local": 1, "fedicra": 2, "fedmix": 2, "hssf": 2, "cmc": 1}
# A single process, like a notebook: every method requests its approval, then every method runs.
DRIVER = """
import json, sys, time
from pathlib import Path
from fedbiomed.common.serializer import Serializer
folder, researcher, tag, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
decode, count = Serializer.loads, [0]
def loads(data):
    if b"TrainReply" in data:
        count[0] += 1
        (folder / f"reply{count[0]:03d}").write_bytes(data)
    return decode(data)
Serializer.loads = staticmethod(loads)
from fedfactory.errors import FederationError
from fedfactory.researcher.node_selection import NodeSelection
from fedfactory.researcher.segmentation import train_method
nodes = NodeSelection(tag=tag, min_nodes=3)
settings = {"researcher": researcher, "nodes": nodes, "updates": 3, "batch_size": 4, "width": 4}
rounds = json.loads(sys.argv[5])
needs = {name: {"rounds": count} for name, count in rounds.items()}
needs["hssf"]["public"] = sys.argv[6]
names = sys.argv[7:]
for name in names:
    try:
        train_method(name, folder / name, options=options.get(name, {}), **settings, **needs[name])
        sys.exit(f"{name} ran without approval")
    except FederationError as error:
        assert "not approved" in str(error), error
(folder / "asked").touch()
while not (folder / "go").exists():
    time.sleep(0.2)
for name in names:
    first = count[0]
    train_method(name, folder / name, options=options.get(name, {}), **settings, **needs[name])
    (folder / f"{name}.replies").write_text(json.dumps([first + 1, count[0]]))
from fedfactory.researcher.segmenting.survey import ask_sites
(folder / "sites.json").write_text(json.dumps(ask_sites(researcher, nodes).to_dict()))
import os, signal
killed = lambda number, updates: os.kill(os.getpid(), signal.SIGKILL)
train_method("hssf", folder / "killed", options=options["hssf"], **settings, **needs["hssf"], report_round=killed)
"""
# Another process goes on with the run that was killed after its first round, once it asks with the right settings.
RESUMER = """
import json, sys
from pathlib import Path
from fedfactory.errors import UsageError
from fedfactory.researcher.node_selection import NodeSelection
from fedfactory.researcher.segmentation import train_method
folder, researcher, tag, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
settings = {"researcher": researcher, "nodes": NodeSelection(tag=tag, min_nodes=3), "updates": 3, "batch_size": 4}
settings |= {"options": options["hssf"], "rounds": json.loads(sys.argv[5])["hssf"], "public": sys.argv[6]}
try:
    train_method("hssf", folder / "killed", **settings, width=8, resume=True)
    sys.exit("resumed with another width")
except UsageError as error:
    assert "(width 8 in place of 4)" in str(error), error
settings["nodes"] = NodeSelection(tag=tag, min_nodes=2)  # which may be another number: a site may be gone for good
train_method("hssf", folder / "killed", **settings, width=4, resume=True)
"""


def write_mixed_site(folder, kind) -> None:
    """Three training cases with labels of this kind, and a test case with dense labels."""
    for number in range(4):
        image, label = ball_volume(shape=(32, 32, 6), radius=9.0, seed=number)
        if kind != "dense" and number < 3:
            weak = weaken(label.data, kind, seed=number)
            label = Volume(np.where(weak == UNLABELLED, 9, weak).astype(np.uint8), label.affine)
        case = folder / f"{PATIENT}_case{number}"
        write_volume(case / "image" / "scan.nii.gz", image)
        write_volume(case / "label" / "mask.nii.gz", label)


@pytest.fixture(scope="module")
def runs(approved, tmp_path_factory):
    """Every method once, at the federation's nodes."""
    out = tmp_path_factory.mktemp("methods")
    add, public = {}, out / f"{PATIENT}_bright.store"
    for name, kind in KINDS.items():
        source, store = out / "volumes" / name, out / f"{PATIENT}_{name}.store"
        write_mixed_site(source, kind)
        names = tuple(f"{PATIENT}_case{number}" for number in range(4))
        common = {"domain": SITES[name], "size": 32, "z_bins": 4}
        sparse = {"unlabelled_value": 9} if kind == "scribble" else {}
        weak = PrepareConfig(**common, label_kind=kind, split="train", exclude=names[3:], **sparse)
        prepare(source, store, weak)
        prepare(source, store, PrepareConfig(**common, split="test", exclude=names[:3]))
        words = ["add", str(approved.nodes[name]), "--store", str(store), "--tag", MIXED]
        words += ["--network", NETWORKS[name], "--public", str(public), "--modality", MODALITIES[name]]
        if name == "dark":
            words += ["--other", f"mri={public}"]
        add[name] = approved.site_command(*words)
    approved.run_together("add-mixed", add)
    words = [str(out), str(approved.researcher), MIXED, json.dumps(OPTIONS), json.dumps(RUN), str(public), *RUN]
    with (out / "log").open("wb") as log:
        command = [sys.executable, "-c", DRIVER, *words]
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=approved._environment())
        while not (out / "asked").exists():
            assert driver.poll() is None, (out / "log").read_text()
            time.sleep(0.2)
        approve = {name: approved.site_command("approve", str(path), "--yes") for name, path in approved.nodes.items()}
        approved.run_together("approve-methods", approve)
        (out / "go").touch()
        assert driver.wait(400) == -signal.SIGKILL, (out / "log").read_text()
        ended = subprocess.run(
            [sys.executable, "-c", RESUMER, *words],
            check=False,
            stdout=log,
            stderr=log,
            env=approved._environment(),
            timeout=200,
        )
        assert ended.returncode == 0, (out / "log").read_text()
    return out


@pytest.mark.parametrize("name", RUN)
def test_every_method_runs_with_mixed_labels_at_real_nodes(name, runs):
    result = json.loads((runs / name / "results.json").read_text())
    averaged = name != "hssf"  # hssf has no average to be scored
    assert len(result["sites"]) == 3 and len(result["history"]) == RUN[name] + averaged
    kinds = sorted(next(key for key in row if key.startswith("slices_")) for row in result["sites"].values())
    assert kinds == ["slices_box", "slices_dense", "slices_scribble"]
    for row in result["sites"].values():
        assert 0 <= row["own_dice"] <= 1 and ("global_dice" in row) == averaged
        if name == "cmc":
            held = {key for key in row if key.startswith("modality_slices_")}
            assert len(held) == 1 + ("slices_box" in row)
        else:
            assert row["own_test_cases"] == 1
    for number, site_updates in enumerate(result["history"]):
        shares = [update["share"] for update in site_updates.values()]
        assert sum(shares) == pytest.approx(1 if number < RUN[name] else 0)  # the last round only scores
    assert (runs / name / "scores.csv").read_text().count("\n") == 5


@pytest.mark.parametrize("name", RUN)
def test_a_site_sends_what_the_approved_plan_allows_and_nothing_private(name, runs):
    first, last = json.loads((runs / f"{name}.replies").read_text())
    replies = [(runs / f"reply{number:03d}").read_bytes() for number in range(first, last + 1)]
    assert len(replies) == 3 * (RUN[name] + (name != "hssf"))  # three sites, rounds and the last scores
    sent = [set(Serializer.loads(reply)["params"]) for reply in replies]
    assert all(names == sent[0] for names in sent)
    if name == "local":
        assert not sent[0]
    elif name == "hssf":
        assert sent[0] == {"margins", "grades", "round"}
    elif name == "cmc":
        assert any(".norms.ct." in key for key in sent[0]) and any(".norms.mri." in key for key in sent[0])
    else:
        assert any(key.endswith("final_conv.weight") for key in sent[0])
    for reply in replies:
        for private in (PATIENT.encode(), b".store", str(runs).encode(), b"case0", b"mix.", b"own.final"):
            assert private not in reply


def test_a_run_whose_researcher_was_killed_goes_on_to_the_same_networks(runs):
    """The networks of the sites, of the researcher, and its optimizer are those that the first round left: any new
    beginning gives other weights. Both runs have the same seed."""
    resumed, whole = (json.loads((runs / name / "results.json").read_text()) for name in ("killed", "hssf"))
    assert len(resumed["history"]) == RUN["hssf"] and resumed["run"]["finished"]
    assert (resumed["run"]["min_nodes"], resumed["run"]["quorum_changes"]) == (2, [{"round": 2, "before": 3}])
    for node, site in whole["sites"].items():
        for number in ("loss", "own_dice", "distilled"):
            assert resumed["sites"][node][number] == pytest.approx(site[number], abs=1e-3), number
    ours, theirs = (read_weights(runs / name / "server.safetensors", kind=KIND)[0] for name in ("killed", "hssf"))
    assert max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours) < 1e-6
    with pytest.raises(UsageError, match="nothing to resume"):
        interrupted_run(runs / "killed")


def test_a_survey_of_real_nodes_shows_their_labels_and_the_methods_that_fit(runs):
    found = json.loads((runs / "sites.json").read_text())
    assert found["agree"] and found["situation"] == "modalities"
    sites = {next(iter(site["label_kinds"])): site for site in found["sites"].values()}
    assert {kind: site["network"] for kind, site in sites.items()} == {KINDS[n]: NETWORKS[n] for n in KINDS}
    assert all((site["patients"], site["slices"], site["size"]) == (3, 18, 32) for site in sites.values())
    fits = {method["name"]: method["fits"] for method in found["methods"]}
    assert not fits.pop("gaze") and all(fits.values()) and next(iter(fits)) == "cmc"


def test_a_site_keeps_its_own_segmenter_and_can_use_it(runs):
    store = SliceStore(runs / f"{PATIENT}_west.store")
    folder = store.path.with_name(f"{store.path.name}.segmenters")
    image = runs / "volumes" / "west" / f"{PATIENT}_case3" / "image" / "scan.nii.gz"
    for name in RUN:
        for which in ("own", "global")[: 1 if name == "hssf" else 2]:
            model = folder / f"dark_{'mri_' if name == 'cmc' else ''}{name}_{which}.safetensors"
            assert Segmenter.load(model).card.federated.weights == which
    own, server = Segmenter.load(folder / "dark_hssf_own.safetensors"), Segmenter.load(runs / "hssf/server.safetensors")
    assert own.card.federated.context.network == "segresnet" and server.classes == own.classes == 3
    (written,) = segment([image], [folder / "dark_fedicra_own.safetensors"], runs / "maps")
    assert read_volume(written, integer=True).data.shape == read_volume(image).data.shape


def test_what_a_site_announces_is_what_it_holds(runs):
    assert SliceStore(runs / f"{PATIENT}_west.store").label_kinds() == {"scribble": 18}
    assert SliceStore(runs / f"{PATIENT}_dark.store").label_kinds() == {"box": 18}
