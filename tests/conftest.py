"""Small factories and stores that many tests use."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.errors import FederationError
from fedfactory.generative import FactoryConfig, TrainedFactory, make_generator
from fedfactory.generative.factory_facts import FactoryFacts
from helpers import (
    DOMAINS,
    PATIENT,
    SITES,
    TAG,
    ball_volume,
    port_is_free,
    processes_of,
    state_files,
    train,
    untrained_labelled_factory,
    write_site,
)

SLOW = (
    "test_survival.py",
    "test_federation.py",
    "test_segmentation_federation.py",
    "test_pictures_federation.py",
    "test_remote_adaptation.py",
)  # started first, each in its own process of a test run

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as cores, all processes together
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# Fed-BioMed opens a researcher component when it is imported. Every process of a test run gets its own component.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fedfactory-tests-")  # the log of unforeseen errors
os.environ["FBM_RESEARCHER_COMPONENT_ROOT"] = tempfile.mkdtemp(prefix="fedfactory-tests-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def unchanged_umask() -> Iterator[None]:
    """Commands and plans set the umask of their process, which the tests share with them."""
    mask = os.umask(0)
    os.umask(mask)
    yield
    os.umask(mask)


@pytest.fixture
def synced(monkeypatch) -> list[int]:
    """Inode numbers of the files and folders that this process waited for until they were on the disk, in order."""
    waited, fsync = [], os.fsync

    def note(handle: int) -> None:
        waited.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    return waited


@pytest.fixture(scope="session")
def config() -> FactoryConfig:
    return FactoryConfig(
        domains=DOMAINS, image_size=16, z_bins=4, channels=(8, 8), latent_dim=8, batch_size=4, r1_every=2
    )


@pytest.fixture
def trained(config) -> TrainedFactory:
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    history = {domain: [{"round": 1, "loss_generator": 0.5, "loss_discriminator": 1.0}] for domain in DOMAINS}
    return TrainedFactory(
        generator=generator,
        latest=generator.state_dict(),
        spacing=6.0,
        height=100.0,
        history=history,
        facts=FactoryFacts(rounds=1, seed=0),
    )


@pytest.fixture
def labelled(trained):
    torch.manual_seed(1)
    branch = LabelBranch.for_generator(trained.generator, 3).eval()
    return untrained_labelled_factory(trained, branch)


@pytest.fixture
def labelled_file(labelled, tmp_path):
    labelled.save(tmp_path / "labelled.safetensors")
    return tmp_path / "labelled.safetensors"


@pytest.fixture
def site(tmp_path):
    """A folder of three labelled cases."""
    write_site(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def store(site, tmp_path):
    """The slice store of `site`, prepared for `config`."""
    from fedfactory.node.store.prepare import prepare
    from fedfactory.node.store.prepare_config import PrepareConfig

    return prepare(site, tmp_path / "store", PrepareConfig(domain="bright", size=16, z_bins=4)).store


@pytest.fixture(scope="session")
def prepared_store(tmp_path_factory):
    """What `store` gives, prepared once."""
    from fedfactory.node.store.prepare import prepare
    from fedfactory.node.store.prepare_config import PrepareConfig

    folder = tmp_path_factory.mktemp("prepared")
    write_site(folder / "site")
    return prepare(folder / "site", folder / "store", PrepareConfig(domain="bright", size=16, z_bins=4)).store.path


@pytest.fixture
def copied_store(prepared_store, tmp_path):
    """A copy of `prepared_store`, for tests that need no volumes: preparing takes half a second."""
    from fedfactory.node.store.slice_store import SliceStore

    return SliceStore(shutil.copytree(prepared_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def prepared_patients(tmp_path_factory):
    """A store of 32 px with three training and two test patients; one of the test patients lacks the second class."""
    from fedfactory.imaging.volume_files import write_volume
    from fedfactory.node.store.prepare import prepare
    from fedfactory.node.store.prepare_config import PrepareConfig

    folder = tmp_path_factory.mktemp("patients")
    for number in range(5):
        image, label = ball_volume(shape=(32, 32, 6), radius=9.0, seed=number)
        if number == 4:
            label.data[label.data == 2] = 1
        case = folder / ("train" if number < 3 else "test") / f"case{number}"
        write_volume(case / "image" / "scan.nii.gz", image)
        write_volume(case / "label" / "mask.nii.gz", label)
    for split in ("train", "test"):
        config = PrepareConfig(domain="bright", size=32, z_bins=4, split=split)
        store = prepare(folder / split, folder / "patients.store", config).store
    return store.path


@pytest.fixture
def patients(prepared_patients, tmp_path):
    """A copy of `prepared_patients`, beside which a test may write."""
    return Path(shutil.copytree(prepared_patients, tmp_path / "patients.store"))


@pytest.fixture(scope="session")
def unapproved(tmp_path_factory, config):
    """Three running nodes, each with a store and no approved plan; every path and case has a patient's name in it."""
    from fedfactory.demo.local_federation import LocalFederation
    from fedfactory.node.policy.policy import Policy
    from fedfactory.node.store.prepare import prepare
    from fedfactory.node.store.prepare_config import PrepareConfig

    folder = tmp_path_factory.mktemp("federation")
    with LocalFederation(folder, list(SITES)) as running:
        running.begin()
        for number, (name, domain) in enumerate(SITES.items()):
            volumes = folder / "volumes" / name
            write_site(volumes, cases=3 + number)
            for case in volumes.iterdir():
                case.rename(volumes / f"{PATIENT}_{case.name}")
            prepare(volumes, folder / f"{PATIENT}_{name}.store", PrepareConfig(domain=domain, size=16, z_bins=4))
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        running.wait_for("create")
        running.run_together(
            "add",
            {
                name: running.site_command(
                    "add", str(path), "--store", str(folder / f"{PATIENT}_{name}.store"), "--tag", TAG
                )
                for name, path in running.nodes.items()
            },
        )
        for path in running.nodes.values():
            Policy(least_patients_scored=1).save(path)  # sites of tests have one test patient
        running.start_nodes()
        yield running
    assert not processes_of(folder)
    assert port_is_free(running.port)


@pytest.fixture(scope="session")
def withheld(unapproved, config) -> tuple[str, bool]:
    """The message of a run started before the plan was approved, and whether it left a folder; approves the plan."""
    federation = unapproved
    out = federation.folder / "withheld"
    with pytest.raises(FederationError) as caught:
        train(federation, config, out)
    approve = {n: federation.site_command("approve", str(p), "--yes") for n, p in federation.nodes.items()}
    federation.run_together("approve", approve)
    return str(caught.value), out.exists()


@pytest.fixture(scope="session")
def approved(withheld, unapproved):
    """The federation, with the plan approved at every node."""
    return unapproved


@pytest.fixture(scope="session")
def reference(approved):
    """An uninterrupted seeded run: its experiment folder, and the state files that the first node keeps of it."""
    folder = approved.folder / "reference"
    words = ["train", "--researcher", approved.researcher, "--tag", TAG, "--config", approved.folder / "config.json"]
    words += ["--out", folder, "--rounds", 6, "--updates-per-round", 3, "--seed", 5, "--node-timeout", 60]
    with approved.background("train-reference", [str(word) for word in words], rounds=6):
        pass
    newest = state_files(approved, DOMAINS[0])[-1]
    return SimpleNamespace(
        folder=folder, states=[p for p in state_files(approved, DOMAINS[0]) if p.parent == newest.parent]
    )
