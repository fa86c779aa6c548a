"""The memory that a node expects of a federated segmentation: never below what a round takes, whatever is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_from_boxes
from fedfactory.adaptation.methods.catalogue import METHOD_CATALOGUE
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.privacy.private_updates import PrivateUpdates
from fedfactory.node.policy.method_memory import OVERHEAD, kept_bytes
from fedfactory.node.policy.request_kind import SEGMENTATION
from fedfactory.node.policy.request_size import size_of
from helpers import CONFIG, SMALL, site, site_round_of
from torch.profiler import ProfilerActivity, profile

GIB = 2**30
LARGE = {"batch_size": 32, "width": 8, "updates": 2}
ALWAYS = {"warmup": 0.0, "min_assessor_accuracy": 0.0, "min_slice_confidence": 0.0}  # HSSF's terms take part
OPTIONS = {
    **SMALL,
    "fedmix": {"agreement": 0.0, "empty": "accept", "box_cover": 0.0},
    "hssf": {**SMALL["hssf"], **ALWAYS},
    "lssl": {**SMALL["lssl"], **ALWAYS},
}


def config_of(name: str, **changes) -> MethodConfig:
    options = {**OPTIONS.get(name, {}), **changes.pop("options", {})}
    return replace(CONFIG, **{"method": name, "options": options, **LARGE, **changes})


def estimate(config: MethodConfig | dict, *, slices: int = 12) -> float:
    values = config if isinstance(config, dict) else config.to_dict()
    return GIB * size_of(SEGMENTATION, {"config": values}, slices=slices).memory


def boxed() -> SiteSlices:
    """Slices with boxes, which have more losses than other labels."""
    dense = site()
    labels = np.log2(dense.candidates).astype(np.uint8)
    boxes = np.stack([candidates_from_boxes(label, 3) for label in labels])
    return SiteSlices(dense.images, boxes, np.array(["box"] * 12), 3)


def peak_of(config: MethodConfig, data: SiteSlices, **more) -> int:
    """Bytes that tensors take at most in two rounds: PyTorch's profiler sees every allocation."""
    method = make_method(config)

    def rounds():
        first = site_round_of(method, data)
        for number in (1, 2):
            method.train_round(replace(first, number=number, **more))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rounds()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("name", METHOD_CATALOGUE)
def test_the_estimate_is_above_what_a_round_of_each_method_takes_and_near_it(name):
    """Near: the rest is what the allocator and convolutions need beside tensors, and losses for other labels."""
    data = {"hssf": site("none"), "lssl": site("none"), "cmc": site(), "gaze": site()}.get(name) or boxed()
    config = config_of(name)
    taken = peak_of(config, data)
    assert OVERHEAD * taken < estimate(config) < 4 * taken


SITE_OF_PATIENTS = replace(site(), patients=np.repeat(np.arange(4), 3))


@pytest.mark.parametrize(
    ("name", "changes", "data", "more"),
    [
        ("fedavg", {"fold": 2, "norm": "group", "depth": 3}, boxed(), {}),
        ("fedicra", {"options": {"learnt_trees": True, "embedding": 64, "selections": 3}}, boxed(), {}),
        ("gaze", {"batch_size": 4, "options": {"levels": 3, "window": 7, "dilation": 4}}, site(), {}),
        ("hssf", {"batch_size": 2, "options": {"held_out": 1.0}}, site("none"), {}),
        ("hssf", {"options": {"held_out": 0.0, "network": "segresnet"}}, site("none"), {}),
        ("cmc", {"options": {"modalities": ["ct"]}}, site(), {}),
        ("cmc", {"options": {"views": "all", "descriptor": "block", "encoder_sharing": "separate"}}, site(), {}),
        ("fedmix", {"batch_size": 2, "fold": 4, "width": 4}, boxed(), {}),
        ("fedprox", {"width": 64, "batch_size": 1}, boxed(), {}),
        (
            "fedavg", {"dp_epsilon": 8.0, "width": 32, "batch_size": 12}, SITE_OF_PATIENTS,
            {"private": PrivateUpdates(noise=1.0, rng=np.random.default_rng(0))},
        ),
    ],
)  # fmt: skip
def test_no_setting_takes_more_than_the_estimate(name, changes, data, more):
    config = config_of(name, **changes)
    if name == "cmc" and len(config.options["modalities"]) == 2:
        more = {"modalities": {"ct": data, "mri": data}}
    assert 1.2 * peak_of(config, data, **more) < estimate(config)


@pytest.mark.parametrize(
    ("name", "small", "large", "times"),
    [
        ("gaze", {"levels": 2}, {"levels": 20}, 8),
        ("gaze", {"window": 5}, {"window": 101}, 8),
        ("gaze", {"dilation": 2}, {"dilation": 64}, 3),
        ("fedicra", {"embedding": 4}, {"embedding": 1024}, 5),
        ("hssf", {}, {"public_slices": 10**6}, 100),
        ("hssf", {"public_slices": 10**4}, {"public_slices": 10**4, "public_epochs": 1000}, 10),
        ("lssl", {"public_slices": 10**4}, {"public_slices": 10**4, "held_out": 1.0}, 20),
        ("cmc", {"views": "one"}, {"views": "all"}, 1.2),
    ],
)
def test_large_options_are_counted(name, small, large, times):
    assert estimate(config_of(name, options=large)) > times * estimate(config_of(name, options=small))


def test_slices_and_classes_of_pseudo_labels_are_counted():
    few, many = config_of("fedmix"), config_of("fedmix", classes=24)
    assert estimate(few, slices=10**4) > 5 * estimate(few)
    assert estimate(many, slices=10**4) > 4 * estimate(few, slices=10**4)
    assert estimate(config_of("fedavg"), slices=10**4) == estimate(config_of("fedavg"))


def test_folded_pixels_count_a_quarter_and_a_missing_fold_is_none():
    """A plan reads settings without a fold as those of networks without one."""
    folded = config_of("fedavg", size=128, width=32)
    plain = replace(folded, fold=1)
    assert folded.pixel_fold == 2 and 3 < estimate(plain) / estimate(folded) <= 4
    assert estimate(plain) == estimate({name: value for name, value in folded.to_dict().items() if name != "fold"})


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    layer = torch.nn.Linear(8, 4)
    x = torch.zeros(5, 8, requires_grad=True)
    assert kept_bytes(layer, lambda: layer(x)) == 5 * 8 * 4  # the input; the weight is one of its own
    assert kept_bytes(layer, lambda: torch.sigmoid(layer(x)) + layer(x)) == 5 * (8 + 4) * 4


def test_an_estimate_allocates_nothing():
    huge = config_of("fedavg", size=1024, width=256, batch_size=512)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        assert estimate(huge) > 100 * GIB
    events = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(size for size in events if size > 0) < 2**20
