"""What a site chooses for federated segmentation, what of it is announced, and what the researcher makes of it."""

from __future__ import annotations

import json

import pytest
from fedbiomed.common.dataset_types import DataReturnFormat
from fedbiomed.common.exceptions import FedbiomedError
from fedfactory.adaptation.methods.catalogue import describe
from fedfactory.errors import ConfigError, FederationError, StoreError, UsageError
from fedfactory.imaging.volume_files import write_volume
from fedfactory.node.plans.segmentation_plan import SegmentationDataset
from fedfactory.node.plans.site_settings import SiteSettings
from fedfactory.node.site_choices import SiteChoices, digest
from fedfactory.node.site_facts import ModalityFacts, description_of, read_facts, store_facts
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.segmentation import agreed_config
from helpers import CONFIG, ball_volume, site_facts


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, SliceStore]:
    """Four stores: labelled, without labels, of another size, and a copy of the labelled store."""
    folder = tmp_path_factory.mktemp("choices")
    for number in range(2):
        image, label = ball_volume(seed=number)
        write_volume(folder / "volumes" / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(folder / "volumes" / f"case{number}" / "label" / "mask.nii.gz", label)
    common = {"domain": "x", "z_bins": 4, "split": "train"}
    made = {
        "own": PrepareConfig(**common, size=32, label_kind="none"),
        "public": PrepareConfig(**common, size=32),
        "copy": PrepareConfig(**common, size=32),
        "small": PrepareConfig(**common, size=16),
    }
    return {name: prepare(folder / "volumes", folder / name, config).store for name, config in made.items()}


def test_choices_are_announced_without_a_path(stores):
    own = stores["own"]
    choices = SiteChoices(
        network="dynunet", public=str(stores["public"].path), modality="ct", others={"mri": str(stores["copy"].path)}
    )
    choices.check(own)
    text = description_of(store_facts(own, choices))
    facts = read_facts(text)
    assert facts.network == "dynunet" and facts.public_digest == digest(stores["public"])
    assert facts.modalities["ct"].label_kinds == {"none": 16}
    assert facts.modalities["mri"] == ModalityFacts(slices=16, classes=3, label_kinds={"dense": 16})
    assert str(own.path.parent) not in text and "case0" not in text
    nothing_chosen = store_facts(own, SiteChoices())
    assert (nothing_chosen.network, nothing_chosen.public_digest, nothing_chosen.modalities) == (None, None, {})


def test_a_copy_of_the_public_store_is_the_same_and_another_is_not(stores):
    assert digest(stores["public"]) == digest(stores["copy"]) != digest(stores["small"])


@pytest.mark.parametrize(
    "choices, message",
    [
        (lambda s: SiteChoices(network="resnet"), "network is 'resnet'"),
        (lambda s: SiteChoices(public=str(s["small"].path)), "have 16 px, .* 32; prepare"),
        (lambda s: SiteChoices(public=str(s["own"].path)), "dense labels"),
        (lambda s: SiteChoices(others={"mri": str(s["copy"].path)}), "choose the modality of the store itself"),
        (lambda s: SiteChoices(modality="mri", others={"mri": str(s["copy"].path)}), "which others has too"),
        (lambda s: SiteChoices(modality="a.b"), "use letters"),
        (lambda s: SiteChoices(public=str(s["own"].path / "nowhere")), "nowhere"),
    ],
)
def test_choices_that_cannot_work_are_refused_when_a_site_is_added(choices, message, stores):
    with pytest.raises((UsageError, ConfigError, StoreError), match=message):
        choices(stores).check(stores["own"])


def test_choices_lie_beside_the_store_and_damage_is_seen(stores):
    own = stores["own"]
    assert SiteChoices.load(own) == SiteChoices()
    choices = SiteChoices(network="unet")
    choices.save(own)
    file = own.path.with_name(own.path.name + ".choices.json")
    assert SiteChoices.load(own) == choices
    for damage in ("{", '{"magic": 1}', "[1]"):
        file.write_text(damage)
        with pytest.raises(StoreError, match="register the store again"):
            SiteChoices.load(own)
    file.unlink()


def dataset(store, **site_settings) -> SegmentationDataset:
    made = SegmentationDataset()
    made.config, made.site_settings = CONFIG, SiteSettings(**site_settings)
    made.load(str(store.path), DataReturnFormat.TORCH)
    return made


def test_a_node_trains_with_the_researchers_public_slices_alone(stores):
    own = stores["own"]
    SiteChoices(public=str(stores["public"].path), modality="ct", others={"mri": str(stores["copy"].path)}).save(own)
    read = dataset(own, public_digest=digest(stores["public"]))
    assert len(read.public) == 16 and set(read.modalities) == {"ct", "mri"}
    with pytest.raises(FedbiomedError, match="not the researcher's"):
        dataset(own, public_digest="0" * 64)
    SiteChoices().save(own)
    with pytest.raises(FedbiomedError, match="no public slices"):
        dataset(own, public_digest=digest(stores["public"]))
    SiteChoices(public="/nowhere").save(own)
    with pytest.raises(FedbiomedError, match="see the node's log") as error:
        dataset(own)
    assert "nowhere" not in str(error.value)
    own.path.with_name(own.path.name + ".choices.json").unlink()


def test_the_researcher_configures_hssf_from_what_sites_announce(stores):
    public = stores["public"]
    sites = {node: site_facts(classes=1, public_digest=digest(public)) for node in ("n1", "n2")}
    config = agreed_config(describe("hssf"), sites, public, rounds=2)
    assert (config.classes, config.sites, config.options["public_slices"]) == (3, 2, 16)
    json.dumps(config.to_dict())
    with pytest.raises(UsageError, match="public is None"):
        agreed_config(describe("hssf"), sites, None, rounds=2)
    with pytest.raises(UsageError, match="size of the public slices is 16; it must be the sites', 32"):
        agreed_config(describe("hssf"), sites, stores["small"], rounds=2)
    with pytest.raises(UsageError, match="dense labels"):
        agreed_config(describe("hssf"), sites, stores["own"], rounds=2)
    with pytest.raises(FederationError, match="n2: other or no public slices"):
        agreed_config(describe("hssf"), {**sites, "n2": site_facts(classes=1)}, public, rounds=2)
    with pytest.raises(UsageError, match="uses no public slices"):
        agreed_config(describe("fedavg"), sites, public, rounds=2)


def test_the_researcher_configures_cmc_from_what_sites_announce():
    part = ModalityFacts(slices=4, classes=3, label_kinds={"dense": 4})
    sites = {
        "n1": site_facts(classes=1, modalities={"mri": part, "ct": part}),
        "n2": site_facts(classes=1, modalities={"ct": part}),
    }
    config = agreed_config(describe("cmc"), sites, None, rounds=2, options={"start": 0.5})
    assert config.options == {"start": 0.5, "modalities": ["ct", "mri"]} and config.classes == 3
    with pytest.raises(FederationError, match="n2: no modality registered"):
        agreed_config(describe("cmc"), {**sites, "n2": site_facts(classes=1)}, None, rounds=2)
    with pytest.raises(UsageError, match="all sites have ct only"):
        agreed_config(describe("cmc"), {"n2": sites["n2"]}, None, rounds=2)
