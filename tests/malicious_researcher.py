"""Requests of a malicious researcher to real nodes, one Fed-BioMed experiment each; prints what came of each as JSON.

The sites must have approved FactoryPlan, and approve FedAvgPlan, for which this program asks.

Usage: python malicious_researcher.py RESEARCHER TAG CONFIG PATIENTS SCORINGS
PATIENTS: tag of a store of 32 px whose labels are asked for.
SCORINGS: how many requests to score weights are made, each in an experiment of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.errors import FedFactoryError
from fedfactory.generative import FactoryConfig
from fedfactory.researcher.experiment import (
    descriptions_of,
    factory_experiment,
    request_approval,
    run_round,
    use_researcher,
    wait_for_nodes,
)

APPROVAL_TIMEOUT = 90  # seconds


def disguise(experiment) -> None:
    """The approved text, behind a comment by which Python may read it as another one; the framework drops comments."""
    plan = type(experiment.training_plan())
    source = plan.source
    plan.source = lambda self: "# -*- coding: utf-8 -*-\n" + source(self)


def single_slice(experiment) -> None:
    arguments = experiment.training_args()
    experiment.set_training_args({**arguments, "num_updates": 1, "loader_args": {"batch_size": 1}})


def own_evaluation(experiment) -> None:
    experiment.set_training_args({**experiment.training_args(), "test_ratio": 0.5, "test_on_global_updates": True})


def set_what_stays(experiment) -> None:
    """Weights of the discriminator, which stays at a site, beside those of the generator."""
    plan = type(experiment.training_plan())
    sent = plan.get_model_params

    def with_more(self, *args, **kw):
        own = self.model().state_dict()
        name = next(n for n, t in own.items() if n.startswith("discriminator.") and t.is_floating_point())
        return {**sent(self, *args, **kw), name: own[name] + 1}

    plan.get_model_params = with_more


def huge_network(experiment) -> None:
    arguments = experiment.model_args()
    factory = {**arguments["factory"], "latent_dim": 2**17}
    experiment._model_args = {**arguments, "factory": factory}  # the framework would build the network here first


def asked_quality(settings: FactoryConfig, tag: str) -> dict[str, list[str]]:
    """Names of the quality numbers that come for a generator that is nothing like the one that the sites sent last."""
    experiment = factory_experiment(settings, tag=tag, rounds=2, updates_per_round=3)
    run_round(experiment, 60)  # the usual next generator would be its average
    plan = type(experiment.training_plan())
    sent = plan.get_model_params
    plan.get_model_params = lambda self, *args, **kw: {
        name: 5 * tensor if tensor.is_floating_point() else tensor for name, tensor in sent(self, *args, **kw).items()
    }
    try:
        replies = run_round(experiment, 60)
    finally:
        plan.get_model_params = sent
    return {node: sorted(name for name in reply.to_dict() if "quality" in name) for node, reply in replies.items()}


def asked_scores(tag: str, times: int) -> list[str]:
    """What came of requests to score weights without training, in new experiments that continue no other."""
    from fedfactory.researcher.segmentation import agreed_facts, method_experiment

    facts, found = agreed_facts(descriptions_of(tag)), []
    config = MethodConfig(method="fedavg", classes=3, size=32, sites=len(facts), rounds=1, updates=2, width=4)
    for _ in range(times):
        experiment = method_experiment(make_method(config), tag=tag, facts=facts)
        experiment.set_model_args({"config": config.to_dict(), "train": False}, keep_weights=True)
        request_approval(experiment, APPROVAL_TIMEOUT)
        try:
            replies = run_round(experiment, 60)
            found.append("scored" if all("global_dice" in reply.to_dict() for reply in replies.values()) else "nothing")
        except FedFactoryError as error:
            found.append(str(error))
    return found


def main(researcher: str, tag: str, config: str, patients: str, scorings: str) -> None:
    use_researcher(researcher)
    wait_for_nodes(3, 60, tag)
    settings = FactoryConfig.from_dict(json.loads(Path(config).read_text()))
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    honest = FactoryPlan.source, FactoryPlan.get_model_params
    found = {}
    for attack in (single_slice, own_evaluation, huge_network, set_what_stays, disguise):
        experiment = factory_experiment(settings, tag=tag, rounds=1, updates_per_round=3)
        attack(experiment)
        try:
            run_round(experiment, 60)
            found[attack.__name__] = "it ran"
        except FedFactoryError as error:
            found[attack.__name__] = str(error)
        FactoryPlan.source, FactoryPlan.get_model_params = honest
    asked = {"quality": asked_quality(settings, tag), "scores": asked_scores(patients, int(scorings))}
    print("FOUND " + json.dumps({"refused": found, **asked}))


if __name__ == "__main__":
    main(*sys.argv[1:])
