"""Real Fed-BioMed nodes and researcher on this machine: approval, training, persistence, endings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fedfactory import __version__
from fedfactory.common.weights_file import read_weights
from fedfactory.demo.demo import DemoRun, DemoSize, _make_site, run_demo
from fedfactory.demo.demo_result import METHODS
from fedfactory.demo.local_federation import READY, _fedfactory
from fedfactory.errors import FederationError, UsageError
from fedfactory.generative import FactoryConfig, load_factory
from fedfactory.node.fedbiomed_hooks import open_node
from fedfactory.node.ledger.ledger import Ledger
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.round_guard import REFUSED
from fedfactory.node.site_check import check_site
from fedfactory.node.store.derived.embedding import embed_store
from fedfactory.node.store.derived.pseudo_labels import pseudo_label_facts
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.run_state import RunState
from fedfactory.researcher.training import export
from helpers import (
    CLIP_WIDTH,
    DOMAINS,
    PATIENT,
    SITES,
    TAG,
    plans_of,
    port_is_free,
    processes_of,
    state_files,
    train,
    with_head,
    write_clip,
    write_site,
)

SMALL = DemoSize(
    train_subjects=2,
    test_subjects=1,
    rounds=2,
    updates_per_round=2,
    segmenter_updates=3,
    synthetic_volumes=2,
)


def read_state(path):
    from fedbiomed.common.serializer import Serializer

    return Serializer.load(str(path))


def newest_state(federation, domain):
    return read_state(state_files(federation, domain)[-1])


def test_without_approval_a_run_names_the_next_step_and_leaves_nothing(withheld):
    message, left = withheld
    assert "fedfactory site approve" in message
    assert "bright, dark, west" in message
    assert not left


def test_the_administrator_sees_the_source_that_will_run(approved):
    shown = (approved.folder / "logs" / f"approve-{DOMAINS[0]}.log").read_text()
    assert "class FactoryPlan(FactoryTrainingPlan)" in shown
    assert f"fedfactory {__version__}, " in shown
    assert "SHA-256 of all" in shown


def test_a_run_gives_a_factory_with_its_history_and_measurements(reference, config, tmp_path):
    """test_survival checks that the same seed gives the same factory again, with killed processes on the way."""
    factory = export(reference.folder, tmp_path / "factory.safetensors")
    assert [len(rounds) for rounds in factory.history.values()] == [6, 12]  # two sites have the second domain
    assert factory.spacing == pytest.approx(72 / 16)
    assert factory.height == pytest.approx(40)
    assert (reference.folder / "previews" / "round_0006.png").is_file()
    tensors, _ = read_weights(tmp_path / "factory.safetensors", kind="factory")
    assert not [name for name in tensors if "discriminator" in name or name.startswith("d.")]
    assert load_factory(tmp_path / "factory.safetensors").config == config
    state = RunState.load(reference.folder)
    assert set(state.shared_anatomy[-1].pairs) == {"bright / dark"}
    assert all(set(state.quality(domain)) == {"distance", "layout", "contrast"} for domain in DOMAINS)
    assert factory.facts.shared_anatomy == state.shared_anatomy[-1]
    assert factory.facts.alarms == tuple(state.alarms()) != ()  # eighteen updates are no training


def test_a_node_keeps_optimizers_discriminator_and_counter_between_rounds(reference):
    kept = [read_state(path) for path in reference.states]
    updates = [state["extra"]["trainer"]["updates_done"] for state in kept]
    assert updates == [15, 18]  # both are 3 if the node lost its state; older ones are removed
    moments = kept[-1]["optimizers"]["discriminator"]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {18}


def test_published_networks_train_with_guidance_and_a_refinement_stage(approved, config, tmp_path):
    federation = approved
    write_clip(tmp_path / "clip")
    for name in SITES:
        store = federation.folder / f"{PATIENT}_{name}.store"
        embed_store(store, encoder=f"local-dir:{tmp_path / 'clip'}", weights=tmp_path / "clip" / "weights.safetensors")
    published = replace(
        with_head(config, "image"), encoding_dim=CLIP_WIDTH, path_weight=2.0, style_mixing=0.9, augment=True
    )
    extra = ["--clip-weight", 0.2, "--refine-rounds", 1, "--refine-updates", 2, "--refine-clip-weight", 50]
    train(federation, published, tmp_path / "published", *extra)
    factory = export(tmp_path / "published", tmp_path / "factory.safetensors")
    assert factory.config == replace(published, clip_weight=50.0)
    assert factory.facts.rounds == 4
    assert factory.facts.stages[1] == {"rounds": 1, "updates_per_round": 2, "clip_weight": 50.0}
    for rounds in factory.history.values():
        assert len(rounds) in (4, 8)  # the domain has one or two sites
        assert all("loss_generator" in row for row in rounds)
        assert "loss_path" in rounds[0]
        assert any("loss_guidance" in row for row in rounds)
    kept = newest_state(federation, DOMAINS[0])["extra"]["trainer"]
    assert kept["updates_done"] == 3 * 3 + 2
    assert kept["path_mean"] > 0
    assert kept["augmentation"]["calls"] == 11


def test_real_nodes_refuse_a_malicious_researcher_and_write_down_why(approved, prepared_patients):
    """Requests outside the policy, a generator made to ask for grey values, and scores as an oracle for labels."""
    scorings, patients, scored = 2, "patients", DOMAINS[0]  # one node is enough for the scores
    store = shutil.copytree(prepared_patients, approved.folder / f"{PATIENT}_patients.store")
    add = approved.site_command("add", str(approved.nodes[scored]), "--store", str(store), "--tag", patients)
    approved.run_together("add-patients", {scored: add})
    Policy(scorings_a_day=scorings).save(approved.nodes[scored])
    before = {name: len(list(Ledger(path).entries())) for name, path in approved.nodes.items()}
    script = [sys.executable, Path(__file__).with_name("malicious_researcher.py"), approved.researcher, TAG]
    script += [approved.folder / "config.json", patients, scorings + 1]
    approve = approved.site_command("approve", str(approved.nodes[scored]), "--yes", "--wait", "120")
    approved.run_together("attack", {"researcher": [str(word) for word in script], scored: approve})
    log = (approved.folder / "logs" / "attack-researcher.log").read_text()
    found = json.loads(log.rpartition("FOUND ")[2].splitlines()[0])
    assert len(found["refused"]) == 5
    assert "it ran" not in found["refused"].values(), found
    assert list(found["quality"].values()) == 3 * [[]], found
    assert found["scores"][:scorings] == scorings * ["scored"], found
    assert REFUSED in found["scores"][scorings], found
    Policy(least_patients_scored=1).save(approved.nodes[scored])  # as before
    for name, path in approved.nodes.items():
        ledger = Ledger(path)
        assert ledger.verify().problem is None
        entries = list(ledger.entries())[before[name] :]
        refused = [entry.facts["reasons"] for entry in entries if entry.event == "refused"]
        if name == scored:
            assert refused.pop() == [
                f"scorings in the last 24 hours are {scorings}; another one must be within {scorings}"
            ]
            assert sum(entry.event == "scoring" for entry in entries) == scorings
        rounds = [entry.facts for entry in entries if entry.event == "round"]
        failed = [facts["failed"] for facts in rounds if "failed" in facts]
        assert len(refused) + len(failed) == len(found["refused"]), (refused, failed)
        *_, honest, unusual = rounds
        assert not [name for facts in (honest, unusual) for name in facts["numbers"] if name.startswith("quality")]
        assert "quality (the generator is not the usual next one)" in unusual["withheld"]
        assert all(not facts["tensors"] for facts in rounds[:-2])
        words = " ".join(str(entry.facts) for entry in entries)
        assert all(word in words for word in ("batch_size", "test_ratio", "latent_dim", "only this site", "encoding"))


def test_shared_discriminators_need_an_approval_of_their_own_and_are_averaged(approved, config, tmp_path):
    """The approved text promises that discriminators stay at the site; a setting cannot change that."""
    federation, shared = approved, replace(config, discriminator="shared")
    path = federation.folder / "shared-config.json"
    path.write_text(json.dumps(shared.to_dict()))
    words = ["train", "--researcher", federation.researcher, "--tag", TAG, "--config", path, "--rounds", 2]
    words += ["--updates-per-round", 2, "--out", tmp_path / "shared", "--min-nodes", 3, "--approval-timeout", 90]
    approve = {
        n: federation.site_command("approve", str(p), "--yes", "--wait", "90") for n, p in federation.nodes.items()
    }
    with federation.background("train-shared", [str(word) for word in words], rounds=2):
        federation.run_together(
            "approve-shared", approve
        )  # fails if no plan waits for approval, which would be so if this plan were approved
    shown = (federation.folder / "logs" / "approve-shared-bright.log").read_text()
    assert "generator AND discriminator are averaged" in " ".join(shown.split())
    factory = export(tmp_path / "shared", tmp_path / "factory.safetensors")
    assert load_factory(tmp_path / "factory.safetensors").discriminate(torch.zeros(4, 1, 16, 16), "dark", 0).shape == (
        4,
        1,
    )
    networks = [factory.generator, factory.discriminator]
    count = sum(p.numel() for network in networks for p in network.parameters())
    site_updates = RunState.load(tmp_path / "shared").site_updates.values()
    assert {update.num_bytes for update in site_updates} == {4 * count}


def test_a_first_guess_travels_as_an_average_and_its_pseudo_labels_train_a_factory(approved, config, tmp_path):
    """The order of work: one labelled site, one that takes part without labels, and one that joins afterwards."""
    federation, tag, least = approved, "guess", ("--least-confidence", "0")
    labels = {"bright": "dense", "west": "none", "dark": "none"}
    stores = {name: federation.folder / f"{PATIENT}_{name}_guess.store" for name in labels}
    for number, (name, kind) in enumerate(labels.items()):
        write_site(tmp_path / name, cases=4, shape=(32, 32, 6), radius=9.0 + number)
        settings = PrepareConfig(domain=SITES[name], size=32, z_bins=4, label_kind=kind, split="train")
        prepare(tmp_path / name, stores[name], settings)

    def register(step, *names):
        add = {
            name: federation.site_command(
                "add", str(federation.nodes[name]), "--store", str(stores[name]), "--tag", tag
            )
            for name in names
        }
        federation.run_together(step, add)

    def run(step, *words, names, plan):
        words = [*words, "--researcher", federation.researcher, "--tag", tag, "--min-nodes", len(names)]
        words += ["--rounds", 2, "--approval-timeout", 120]
        asked = [name for name in names if plan not in plans_of(federation.nodes[name])]  # other tests may have
        approve = {
            name: federation.site_command("approve", str(federation.nodes[name]), "--yes", "--wait", "120")
            for name in asked
        }
        with federation.background(step, [str(word) for word in words], rounds=2):
            federation.run_together(f"approve-{step}", approve)
        assert all(plan in plans_of(federation.nodes[name]) for name in names)

    def pseudo_label(name, segmenter):
        words = ["pseudo-label", str(stores[name]), "--segmenter", str(segmenter), *least]
        federation.run_together("label", {name: _fedfactory(*words)})
        return pseudo_label_facts(SliceStore(stores[name]))

    register("add-guess", "bright", "west")
    first = ["train-segmenter", "--method", "fedavg", "--first-guess", "--out", tmp_path / "guess"]
    first += ["--updates-per-round", 60, "--width", 4]
    run("guess", *first, names=("bright", "west"), plan="FedAvgPlan")
    own = stores["west"].with_name(f"{stores['west'].name}.segmenters") / "dark_fedavg_global.safetensors"
    of_west, of_dark = pseudo_label("west", own), pseudo_label("dark", tmp_path / "guess" / "average.safetensors")
    assert of_west.slices == of_dark.slices == 24
    assert of_west.agreement is not None
    register("add-pseudo", "west", "dark")
    factory = replace(config, image_size=32, channels=(8, 8, 8), classes=3)
    (tmp_path / "config.json").write_text(json.dumps(factory.to_dict()))
    words = ["train", "--config", tmp_path / "config.json", "--pseudo-labels", "--out", tmp_path / "drawn"]
    words += ["--updates-per-round", 2]
    run("drawn", *words, names=("bright", "west", "dark"), plan="LabelledFactoryPlan")
    made = export(tmp_path / "drawn", tmp_path / "factory.safetensors")
    assert made.config == replace(factory, pseudo_labels=True)
    state = RunState.load(tmp_path / "drawn")
    assert len(state.site_updates) == 3 and not state.events
    for name in ("west", "dark"):
        assert SliceStore(stores[name]).label_kinds() == {"none": 24}
        ledger = Ledger(federation.nodes[name])
        numbers = [entry.facts["numbers"] for entry in ledger.entries() if entry.event == "round"][-1]
        assert not [number for number in numbers if "pseudo" in number]


def test_a_taken_port_and_a_missing_component_give_one_line(approved, config, tmp_path):
    federation = approved
    # Both address families: a program that holds the port in a single family leaves "localhost" usable in the other.
    with (
        socket.create_server(("", federation.port), family=socket.AF_INET6, dualstack_ipv6=True),
        pytest.raises(FederationError, match="cannot listen"),
    ):
        train(federation, config, tmp_path / "port")
    with pytest.raises(UsageError, match="no Fed-BioMed node here"):
        open_node(tmp_path)


def test_a_real_node_behind_a_dead_proxy_is_named_at_both_ends(approved, config, tmp_path, monkeypatch):
    from fedbiomed.node.config import node_component

    federation, behind, proxy = approved, tmp_path / "behind", "http://127.0.0.1:9"
    monkeypatch.setenv("FBM_RESEARCHER_PORT", str(federation.port))
    node_component.initiate(root=str(behind), alias="behind")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "fedbiomed.node.node_pm", "--config", str(behind), "--node-args", "{}"]
        node = subprocess.Popen(command, stdout=file, stderr=file, env={**environment, "https_proxy": proxy})
    try:
        deadline = time.monotonic() + 90
        while READY not in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.2)
        path = federation.folder / "config.json"
        words = ["train", "--researcher", federation.researcher, "--tag", TAG, "--config", path, "--rounds", 1]
        words += ["--out", tmp_path / "out", "--min-nodes", len(SITES) + 1, "--node-timeout", 8]
        with (
            pytest.raises(FederationError, match=rf"3 of 4 nodes offer data.*node behind: https_proxy={proxy}"),
            federation.background("train-behind", [str(word) for word in words], rounds=1),
        ):
            while port_is_free(federation.port) and time.monotonic() < deadline:
                time.sleep(0.2)
            checks = {check.name: check for check in check_site(behind)}
            assert {checks[name].state for name in ("port", "researcher's certificate")} == {"ok"}
            assert checks["proxy"].state == "problem"
            assert f"https_proxy={proxy} is used to reach localhost" in checks["proxy"].found
            assert "no_proxy=localhost" in checks["proxy"].remedy
            own = {check.name: check.state for check in check_site(federation.nodes["bright"])}
            assert {own[name] for name in ("port", "proxy", "approval", "stores", "versions")} == {"ok"}
    finally:
        node.kill()
        node.wait()


def test_a_killed_node_ends_the_run_with_its_name(approved, config, tmp_path):
    federation = approved
    path = federation.folder / "config.json"
    words = ["train", "--researcher", federation.researcher, "--tag", TAG, "--config", path, "--out", tmp_path / "k"]
    with (
        pytest.raises(FederationError, match="node dark stopped"),
        federation.background("train-killed", [str(word) for word in [*words, "--rounds", 500]], rounds=500),
    ):
        deadline = time.monotonic() + 60
        while not (tmp_path / "k").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(federation.pid_of("dark"), signal.SIGKILL)
    federation.signal("train-killed", signal.SIGKILL)
    for name in ("train-killed", "dark"):
        federation.forget(name)
    federation.start(["dark"])


@pytest.mark.tutorial
def test_the_demo_runs_from_subjects_to_report(tmp_path):
    result = run_demo(tmp_path / "demo", sites=2, seed=3, size=SMALL)
    saved = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(saved) == {"dice", "seconds", "seed", "versions"}
    assert saved["seed"] == 3
    assert saved["dice"] == result.dice
    for row in saved["dice"].values():
        assert set(row) == set(METHODS)
        assert all(0 <= value <= 1 for value in row.values())
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "simulated" in page
    assert page.count("data:image/png;base64,") == 6
    assert "contours of their labels" in page
    assert page.index("held-out slices with contours") < page.index("by site and method") < page.index("<table>")
    assert "http" not in page.replace("http-equiv", "")
    assert f"{saved['dice']['t2']['adapted']:.3f}" in page
    assert not processes_of(tmp_path / "demo")


def test_a_used_folder_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path, number):
    out = tmp_path / "demo"
    code = (
        "from fedfactory.demo.demo import *; from pathlib import Path; import sys;"
        "run_demo(Path(sys.argv[1]), sites=2, size=DemoSize(train_subjects=1, test_subjects=1))"
    )
    with (tmp_path / "log").open("wb") as log:
        demo = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(processes_of(out / "federation")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes_of(out / "federation")) >= 2, (tmp_path / "log").read_text()
    demo.send_signal(number)
    demo.wait(30)
    deadline = time.monotonic() + 10
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(out)


def test_each_subject_of_the_demo_is_a_patient(tmp_path):
    """The policy of a node, the split and the audit count patients, and names such as t1_train_000 begin alike."""
    size, config = DemoSize(train_subjects=3, test_subjects=1), FactoryConfig.preset("tiny", ("t1", "t2"))
    site = _make_site(DemoRun(out=tmp_path, size=size, config=config, seed=0), "t1", 0)
    assert len({case.patient for case in SliceStore(site.store).cases}) == 3
