"""Which methods fit sites by what they announce, what disagrees, and what `fedfactory sites` shows of it."""

from __future__ import annotations

import json
import re

import pytest
from fedfactory.adaptation.methods.catalogue import METHOD_CATALOGUE, describe
from fedfactory.adaptation.methods.recommendation import SITUATIONS, in_order, situation_of
from fedfactory.cli import main
from fedfactory.errors import ConfigError, FederationError, UsageError
from fedfactory.node.connection.component import CONFIG
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.numbers import leaving_numbers
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import ModalityFacts, SiteFacts, description_of, read_facts, store_facts
from fedfactory.researcher.segmenting.site_agreement import (
    agreed_config,
    disagreements_of,
    misfit_of,
    require_agreement,
)
from fedfactory.researcher.segmenting.survey import fits_of, remarks_on, survey_of
from helpers import site_facts

DIGEST = "0" * 63 + "1"


def facts(**kinds: str) -> dict[str, SiteFacts]:
    """Sites with one kind of labels each; "none" has no classes."""
    return {n: site_facts(label_kinds={kind: 3}, classes=0 if kind == "none" else 3) for n, kind in kinds.items()}


def part(kind: str, classes: int = 3) -> ModalityFacts:
    return ModalityFacts(slices=3, classes=classes, label_kinds={kind: 3})


def fitting(sites: dict[str, SiteFacts]) -> list[str]:
    return [method.name for method in fits_of(sites) if method.fits]


SUPERVISED = {"local", "fedavg", "fedprox", "fedbn", "fedicra"}


@pytest.mark.parametrize(
    ("kinds", "fit", "first"),
    [
        ({"a": "dense", "b": "dense"}, SUPERVISED | {"fedmix"}, "fedbn"),
        ({"a": "dense", "b": "box", "c": "none"}, SUPERVISED | {"fedmix"}, "fedmix"),
        ({"a": "scribble", "b": "box"}, SUPERVISED, "fedbn"),
        ({"a": "gaze", "b": "none"}, SUPERVISED | {"gaze"}, "gaze"),
        ({"a": "none", "b": "none"}, set(), None),
    ],
)
def test_methods_fit_by_the_kinds_of_labels(kinds, fit, first):
    found = fitting(facts(**kinds))
    assert set(found) == fit
    assert (found[0] if found else None) == first


def test_public_slices_must_be_the_same_at_all_sites():
    sites = {node: site_facts(label_kinds={"none": 3}, classes=0, public_digest=DIGEST) for node in "abc"}
    assert fitting(sites) == ["hssf", "lssl"]
    sites["b"] = site_facts(label_kinds={"none": 3}, classes=0, public_digest="2" * 64)
    assert misfit_of(describe("hssf"), sites).startswith("b: other or no public slices")
    assert misfit_of(describe("lssl"), facts(a="none")).startswith("a: other or no public slices")


def test_cmc_needs_two_modalities_and_a_modality_at_every_site():
    sites = {
        "a": site_facts(modalities={"ct": part("dense"), "mri": part("none", 0)}),
        "b": site_facts(label_kinds={"none": 3}, classes=0, modalities={"mri": part("none", 0)}),
    }
    assert fitting(sites)[0] == "cmc"
    assert "all sites have mri only" in misfit_of(
        describe("cmc"), {"b": sites["b"], **facts(c="none")} | {"c": site_facts(modalities={"mri": part("dense")})}
    )
    assert misfit_of(describe("cmc"), {**sites, **facts(c="dense")}).startswith("c: no modality registered")


def test_every_wrong_combination_is_refused_before_anything_is_trained():
    """The survey and the training name the same reason, because they make the same checks."""
    for method, sites, message in [
        ("fedmix", facts(a="box", b="image"), "0 of 2 sites have dense labels"),
        ("gaze", facts(a="dense", b="dense"), "0 of 2 sites have fixations"),
        ("fedavg", facts(a="none"), "0 of 1 sites have labels"),
        ("fedavg", {**facts(a="dense"), "b": site_facts(classes=2)}, "number of label values (a: 3, b: 2)"),
        ("cmc", {"a": site_facts(modalities={"ct": part("dense"), "mri": part("dense", 2)})}, "a mri: 2"),
    ]:  # fmt: skip
        (reason,) = [found.reason for found in fits_of(sites) if found.name == method and not found.fits]
        assert message in reason


def test_sites_without_labels_and_fixations_say_nothing_about_the_number_of_classes():
    sites = {**facts(a="dense", b="none"), "c": site_facts(label_kinds={"gaze": 3}, classes=2)}
    assert agreed_config(describe("gaze"), sites, None, rounds=2).classes == 3
    differing = {**sites, "d": site_facts(classes=4)}
    with pytest.raises(FederationError, match=r"a: 3, d: 4.*`classes` 4"):
        agreed_config(describe("fedavg"), differing, None, rounds=2)
    assert agreed_config(describe("fedavg"), differing, None, rounds=2, classes=4).classes == 4
    with pytest.raises(UsageError, match="classes is 3; the sites' labels have 4 values"):
        agreed_config(describe("fedavg"), differing, None, rounds=2, classes=3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("version", "0.0"), ("size", 64), ("channels", 2), ("plane", "coronal"), ("crop", "none"), ("intensities", "x")],
)
def test_a_setting_that_differs_is_named_with_its_site_and_ends_a_training(setting, value):
    sites = {"a": site_facts(), "b": site_facts(**{setting: value}), "c": site_facts()}
    (found,) = disagreements_of(sites)
    assert (found.setting, found.sites) == (setting, ["b"])
    assert f"b: {value}" in found.text and found.text.endswith("unlike the others: b")
    assert found.values["b"] == str(value) and found.values["a"] == found.values["c"] != str(value)
    with pytest.raises(FederationError, match=re.escape(found.text)):
        require_agreement(sites)


def test_what_differs_without_harm_to_the_training_is_a_remark():
    sites = {
        "a": site_facts(spacing=1.0, class_names={"1": "liver", "2": "spleen"}),
        "b": site_facts(spacing=1.6, class_names={"1": "spleen"}),
        "c": site_facts(label_kinds={"none": 3}, spacing=1.2),
    }
    assert disagreements_of(sites) == []
    spacing, name, unlabelled = remarks_on(sites)
    assert "a: 1, b: 1.6, c: 1.2" in spacing
    assert "label 1 has several names (a: liver, b: spleen)" in name
    assert unlabelled.startswith("c has no labels")
    assert remarks_on(facts(a="dense", b="box")) == []


def test_a_survey_becomes_json_and_tells_when_a_site_cannot_be_read():
    described = {node: description_of(site) for node, site in facts(a="dense", b="box").items()}
    survey = survey_of(described)
    assert survey.agree and survey.situation == "mixed"
    values = json.loads(json.dumps(survey.to_dict()))
    assert values["agree"] is True and values["methods"][0]["name"] == "fedmix"
    assert values["sites"]["b"]["label_kinds"] == {"box": 3}
    survey = survey_of({**described, "c": "a picture archive"})
    assert survey.unreadable == ["c"] and not survey.agree
    empty = survey_of({"c": "a picture archive"})
    assert not empty.agree and empty.methods == [] and json.dumps(empty.to_dict())


def test_the_table_of_recommendations_names_methods_once_and_leaves_none_out():
    names = list(METHOD_CATALOGUE)
    for situation, row in SITUATIONS.items():
        assert set(row.methods) <= set(names) and len(set(row.methods)) == len(row.methods)
        assert sorted(in_order(situation, names)) == sorted(names)
    assert situation_of([{"dense", "none"}, {"dense"}]) == "mixed"
    assert situation_of([{"dense"}, {"dense"}], {"ct"}) == "dense"
    assert situation_of([{"dense"}, {"none"}], {"ct", "mri"}) == "modalities"


def test_what_is_new_in_an_announcement_is_in_the_list_of_numbers_and_can_be_kept(patients):
    from fedfactory.node.store.slice_store import SliceStore

    store = SliceStore(patients)
    store.class_names = {1: "shell", 2: "core", 7: "in no label map"}
    told = store_facts(store, SiteChoices())
    assert (told.patients, told.spacing) == (3, store.format.spacing)
    assert told.class_names == {"1": "shell", "2": "core"}
    assert read_facts(description_of(told)) == told
    assert store_facts(store, SiteChoices(announce_class_names=False)).class_names == {}
    numbers = {"patients": told.patients, "spacing": told.spacing, "slices": told.slices}
    assert leaving_numbers(numbers, Policy()) == (numbers, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patients", -1), ("patients", True), ("spacing", 0), ("spacing", "1"), ("spacing", float("nan")),
        ("class_names", ["liver"]), ("class_names", {"1": "x" * 65}), ("class_names", {"one": "liver"}),
        ("class_names", {"1": "\x1b[2J"}), ("class_names", {str(n): "x" for n in range(300)}),
    ],
)  # fmt: skip
def test_an_impossible_announcement_is_refused(name, value):
    with pytest.raises(ConfigError):
        SiteFacts.from_dict({**site_facts().to_dict(), name: value})
    assert read_facts(json.dumps({**site_facts().to_dict(), name: value})) is None


def test_the_command_shows_sites_reasons_and_problems(monkeypatch, tmp_path, capsys):
    from fedfactory.researcher.segmenting import survey

    sites = {
        "n1": site_facts(patients=2, spacing=1.5, class_names={"1": "disc"}, network="unet", public_digest=DIGEST),
        "n2": site_facts(label_kinds={"box": 3}, plane="coronal"),
    }
    found = survey_of({node: description_of(site) for node, site in sites.items()})
    monkeypatch.setattr(survey, "ask_sites", lambda researcher, nodes: found)
    (tmp_path / CONFIG).parent.mkdir(exist_ok=True)
    (tmp_path / CONFIG).touch()
    words = ["sites", "--researcher", str(tmp_path), "--tag", "hearts"]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "n1", "3 of 2 patients: 32 px, 1.5 mm per pixel, 1 channel", "3 box", "3, background included (1 disc)",
        "unet", "SHA-256 00000000...", "problem: plane differs (n1: axial, n2: coronal)", "do not agree", "fedmix",
        "0 of 2 sites have fixations",
    ):  # fmt: skip
        assert text in shown, text
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["disagreements"][0]["setting"] == "plane"
