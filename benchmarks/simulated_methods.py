"""Federated segmentation in a single process, with the training rounds and the aggregation of the package."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fedfactory.adaptation.labels.candidate_labels import SiteSlices
from fedfactory.adaptation.methods.interface.federated_method import FederatedMethod
from fedfactory.adaptation.methods.interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from fedfactory.adaptation.methods.public_slice_method import PublicSliceMethod
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FEDERATED, SegmenterCard
from fedfactory.node.site_data.held_out_scores import case_scores
from fedfactory.node.store.slice_store import SliceStore
from torch import Tensor


@dataclass
class SimulatedSite:
    """A site of a simulated federation.

    Attributes:
        data: its training slices.
        tests: stores with its test cases, by modality; "" for methods without modalities.
        network: name of the network that it has chosen; "" if it has not chosen any.
        public: the public slices, for methods that need them.
        modalities: its training slices by modality, for methods that need modalities.
    """

    data: SiteSlices
    tests: dict[str, SliceStore]
    network: str = ""
    public: SiteSlices | None = None
    modalities: dict[str, SiteSlices] = field(default_factory=dict)


def run_federation(
    method: FederatedMethod, sites: list[SimulatedSite], *, which: str, device: str = "cpu"
) -> dict[str, Any]:
    """Run all rounds, on one thread.

    Args:
        method: with its settings; a network of the researcher is trained on the device too.
        sites: in the order of their numbers.
        which: whose scores are wanted: "own" for each site's own model, "average" for the last average.
        device: to train and score on.

    Returns: "scores" of every test case by number of the site and modality, "history" of the sites' updates by round,
        "seconds" of all rounds, and "bytes_per_round" that a site sends.
    """
    torch.set_num_threads(1)
    if device != "cpu" and isinstance(method, PublicSliceMethod):  # the researcher's network is to be there too
        untrained = method.untrained
        method.untrained = lambda network: untrained(network).to(device)
    models = [method.build().to(device) for _ in sites]
    optimizers = [method.optimizers(model) for model in models]
    states = [method.new_state() for _ in sites]
    local_names = method.local_parameters(models[0])
    shared = {name: value for name, value in _on_cpu(models[0].state_dict()).items() if name not in local_names}
    num_bytes = sum(value.nbytes for value in shared.values())
    history = []
    began = time.monotonic()
    for number in range(1, method.config.rounds + 1):
        site_updates: dict[int, SiteUpdate] = {}
        sent = {}
        for index, (site, model) in enumerate(zip(sites, models, strict=True)):
            model.load_state_dict(shared, strict=False)
            site_round = SiteRound(
                model=model,
                optimizers=optimizers[index],
                data=site.data,
                site=index,
                number=number,
                state=states[index],
                network=site.network,
                public=site.public,
                modalities=site.modalities,
            )
            site_updates[index] = method.train_round(site_round)
            sent[index] = {name: v for name, v in _on_cpu(model.state_dict()).items() if name not in local_names}
        shared, shares = method.aggregate(site_updates, sent.__getitem__, shared)
        history.append(
            [{**_dictionary(site_update), "share": shares[index]} for index, site_update in site_updates.items()]
        )
    seconds = time.monotonic() - began
    if which == "average":
        for model in models:
            model.load_state_dict(shared, strict=False)
    scores = _scores(method, sites, models, states=states if which == "own" else None, device=device)
    return {"scores": scores, "history": history, "seconds": round(seconds, 1), "bytes_per_round": num_bytes}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, as they arrive over a network."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _scores(
    method: FederatedMethod,
    sites: list[SimulatedSite],
    models: list,
    *,
    states: list[MethodState] | None,
    device: str,
) -> list[dict[str, Any]]:
    """Mean Dice over classes of every test case: of the sites' own models if `states` are given, of the average
    otherwise; None where no class is defined."""
    rows = []
    for index, (site, model) in enumerate(zip(sites, models, strict=True)):
        for modality, store in site.tests.items():
            context = SiteContext(site=index, network=site.network, modality=modality)
            network = method.segmenter(copy.deepcopy(model), context, states[index] if states else None)
            card = SegmenterCard(
                classes=method.config.classes, network=FEDERATED, single_objects=method.config.single_objects
            )
            segmenter = Segmenter(network.to(device), store.format, card)
            by_case: dict[tuple[str, str], list[float]] = {}
            for score in case_scores(store, segmenter):
                by_case.setdefault((score.patient, score.case), []).append(score.dice)
            for (patient, case), values in by_case.items():
                defined = [value for value in values if math.isfinite(value)]
                dice = round(sum(defined) / len(defined), 4) if defined else None
                rows.append({"site": index, "modality": modality, "patient": patient, "case": case, "dice": dice})
    return rows


def _dictionary(site_update: SiteUpdate) -> dict[str, float | None]:
    """The fields of a site update; None for values that are not finite, which JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in site_update.to_dict().items()}
