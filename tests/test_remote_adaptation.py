"""Phase two at a site for a researcher without access to it: a real node, and the bytes that it sends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fedbiomed.common.serializer import Serializer
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.errors import ConfigError, NodeDataError
from fedfactory.generative import TrainedFactory, make_generator
from fedfactory.node.plans.adaptation_plan import AdaptationTrainingPlan
from fedfactory.node.site_adaptation import Adaptation
from helpers import PATIENT, SITES, TAG, plans_of, untrained_labelled_factory

RECORDER = """
import sys
from fedbiomed.common.serializer import Serializer
decode, replies = Serializer.loads, []
def loads(data):
    if b"TrainReply" in data:
        replies.append(data)
        with open(sys.argv[sys.argv.index("--out") + 1] + f".reply{len(replies)}", "xb") as file:
            file.write(data)
    return decode(data)
Serializer.loads = staticmethod(loads)
from fedfactory.cli import main
main()
"""
REPORTED = {
    "domain", "slices", "labelled_slices", "synthetic_slices", "alarms", "seconds", "explained_adapted",
    "explained_first_guess", "test_cases",
}  # fmt: skip


def labelled_factory(config) -> LabelledFactory:
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    branch = LabelBranch.for_generator(generator, 3).eval()
    factory = TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)
    return untrained_labelled_factory(factory, branch)


def test_a_site_adapts_after_its_own_approval_and_sends_only_measures(approved, config, tmp_path):
    federation, name = approved, next(name for name, domain in SITES.items() if domain == "dark")
    same = [other for other, domain in SITES.items() if domain == "dark"]
    made = labelled_factory(config)
    made.save(tmp_path / "labelled.safetensors")
    out = tmp_path / "report.json"
    words = [
        "adapt-remote", "--factory", tmp_path / "labelled.safetensors", "--researcher", federation.researcher,
        "--tag", TAG, "--domain", "dark", "--updates", 3, "--volumes", 2, "--out", out, "--approval-timeout", 90,
    ]  # fmt: skip
    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-c", RECORDER, *(str(word) for word in words)]
    run = subprocess.Popen(command, stdout=log, stderr=log, env=federation._environment())
    approve = {n: federation.site_command("approve", str(federation.nodes[n]), "--yes", "--wait", "90") for n in same}
    federation.run_together("approve-adapt", approve)
    assert run.wait(120) == 0, (tmp_path / "log").read_text()
    shown = (federation.folder / "logs" / f"approve-adapt-{name}.log").read_text()
    assert "No weight and no image leaves the site" in " ".join(shown.split())

    asked = {site for site, path in federation.nodes.items() if "AdaptationPlan" in plans_of(path)}
    assert asked == set(same)  # not the site of another domain, whose administrator has nothing to decide

    site_updates = json.loads(out.read_text())
    assert set(site_updates) == set(same)
    for update in site_updates.values():
        quality = {name for name in update if name.startswith("quality_")}  # only of a usual generator
        assert set(update) - {"test_dice"} - quality == REPORTED
        assert update.pop("domain") == "dark"
        assert all(isinstance(value, int | float) for value in update.values())
    sent = [path.read_bytes() for path in tmp_path.glob("report.json.reply*")]
    assert len(sent) == len(same)
    for reply in sent:
        assert b"explained_first_guess" in reply
        assert Serializer.loads(reply)["params"] == {}
        assert len(reply) < 4096
        for private in (PATIENT.encode(), str(federation.folder).encode(), b".store", b"case0", b"generator.head"):
            assert private not in reply

    for site in same:
        folder = federation.folder / f"{PATIENT}_{site}.store.segmenters"
        (kept,) = folder.glob("dark_*.safetensors")
        assert Segmenter.load(kept).card.training.domain == "dark"
    assert not (federation.folder / f"{PATIENT}_bright.store.segmenters").exists()


def plan_with(config, **changes) -> None:
    arguments = {"card": labelled_factory(config).to_dict(), "adaptation": Adaptation().to_dict()}
    AdaptationTrainingPlan().init_model({**arguments, **changes})


def test_settings_from_the_researcher_are_checked_at_the_site(config):
    card = labelled_factory(config).to_dict()
    plan_with(config)
    with pytest.raises(NodeDataError, match="cannot be used"):
        plan_with(config, card={**card, "branches": 10_000})
    with pytest.raises(NodeDataError, match="cannot be used"):
        plan_with(config, card={"kind": "labelled factory"})
    with pytest.raises(NodeDataError, match="at most"):
        plan_with(config, adaptation=replace(Adaptation(), volumes=10**9).to_dict())
    for segmenter, message in [
        (SegmenterConfig(updates=10**9), "updates is 1000000000; a site makes at most"),
        (SegmenterConfig(minutes=1.5), "minutes is 1.5; give the number of updates instead"),
    ]:
        with pytest.raises(NodeDataError, match=message):
            plan_with(config, adaptation=Adaptation(segmenter=segmenter).to_dict())
    with pytest.raises(ConfigError, match="cannot be used"):
        plan_with(config, adaptation={"engine": "segmenter"})
    with pytest.raises(ConfigError, match="cannot be used"):
        plan_with(config, adaptation={**Adaptation().to_dict(), "out": "/etc/passwd"})


def test_settings_of_an_adaptation_survive_the_transport():
    config = SegmenterConfig(network="unet3d", width=8, contrast=ContrastMix(curves=0.1), rotation=0.15)
    adaptation = Adaptation(engine="translator", segmenter=config, keep=2, one_target_slice=True)
    assert Adaptation.from_dict(json.loads(json.dumps(adaptation.to_dict()))) == adaptation
