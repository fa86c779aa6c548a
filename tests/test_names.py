"""Names of domains, classes, modalities and tags: what is refused, where they are entered and where they arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fedfactory.adaptation.methods.interface.site_round import SiteContext
from fedfactory.adaptation.network_names import check_modality
from fedfactory.adaptation.segmenter_card import TrainingFacts
from fedfactory.common.names import MAX_LENGTH, as_file_name, check_label, check_name
from fedfactory.errors import ConfigError, StoreError, UsageError
from fedfactory.generative.config import FactoryConfig
from fedfactory.imaging.class_names import check_names
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import SiteFacts, store_facts
from fedfactory.node.sites import add_store
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import INDEX, SliceStore
from fedfactory.researcher.node_selection import NodeSelection

GOOD = ("CT", "Zürich 3T", "心臓", "MR-T1", "a.b", "x_(2)", "a" * MAX_LENGTH, "GE+GAN=1", "auxiliary", "com10")
NO_LABELS = (
    "", " ", " a", "a ", "..", ".a", "-rf", "a\0", "a\nb", "a\x1b[2J", "a\u202eb", "a\u2066b", "\ufeffa", "a\u200bb",
    "a\u00a0b", "\ud800", "a" * (MAX_LENGTH + 1), None, 3, ["a"],
)  # fmt: skip
NO_NAMES = (
    *NO_LABELS,
    "../a",
    "a/b",
    "a\\b",
    "a:b",
    "a*",
    "a?",
    'a"b',
    "<a>",
    "a|b",
    "a.",
    "CON",
    "nul",
    "Aux.txt",
    "com1",
)


@pytest.mark.parametrize("name", GOOD)
def test_names_that_people_give_are_kept(name):
    assert check_name("domain", name) == check_label("tag", name) == name
    assert as_file_name(name) == name


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_names_that_no_file_should_have_are_refused(name):
    with pytest.raises(ConfigError, match=r"domain is .*it must be a name that a file can have") as refusal:
        check_name("domain", name)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 400
    if name in NO_LABELS or name.startswith("."):
        with pytest.raises(ConfigError, match=r"tag is .*it must have 1 to 64 printable characters"):
            check_label("tag", name)
    else:
        assert check_label("class", name) == name


@pytest.mark.parametrize("name", [name for name in NO_NAMES if isinstance(name, str)], ids=ascii)
def test_a_text_as_a_file_name_is_one(name, tmp_path):
    made = as_file_name(name)
    assert made not in ("", ".", "..") and made[0] not in ".-" and made[-1] not in ". "
    if len(made) < 200:
        (tmp_path / made).write_text("a")
        assert [path.name for path in tmp_path.iterdir()] == [made]


def test_names_are_checked_where_they_are_entered_and_where_they_arrive(store, tmp_path):
    facts = store_facts(store, SiteChoices()).to_dict()
    assert SiteFacts.from_dict(facts).domain == store.domain
    part = {"slices": 1, "classes": 0, "label_kinds": {}}
    for evil in ("../../x", "a/b", "\x1b[2J", "-rf", "CON"):
        for attempt in (
            lambda evil=evil: PrepareConfig(domain=evil),
            lambda evil=evil: FactoryConfig(domains=("a", evil)),
            lambda evil=evil: SiteFacts.from_dict({**facts, "domain": evil}),
            lambda evil=evil: SiteFacts.from_dict({**facts, "modalities": {evil: part}}),
            lambda evil=evil: TrainingFacts(domain=evil),
            lambda evil=evil: SiteContext(modality=evil),
            lambda evil=evil: check_modality(evil),
            lambda evil=evil: replace(store.read_index(), domain=evil),
        ):
            with pytest.raises(ConfigError):
                attempt()
    for evil in ("\x1b[2J", "-x", "a\u202e"):
        for attempt in (
            lambda evil=evil: NodeSelection(tag=evil),
            lambda evil=evil: add_store(tmp_path, store.path, evil * 3),
            lambda evil=evil: check_names({1: evil}),
            lambda evil=evil: SiteFacts.from_dict({**facts, "version": f"a{evil}\x07"}),
        ):
            with pytest.raises(UsageError):
                attempt()


def test_a_store_with_an_impossible_name_is_refused(store, tmp_path):
    index = (store.path / INDEX).read_text().replace(f'"domain": "{store.domain}"', '"domain": "../x"')
    (store.path / INDEX).write_text(index)
    with pytest.raises(StoreError, match=r"domain is '\.\./x'"):
        SliceStore(store.path)
