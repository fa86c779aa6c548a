"""Requests of a malicious researcher to real nodes, one Fed-BioMed experiment each; prints what came of each as JSON.

Usage: python malicious_researcher.py RESEARCHER TAG CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedfactory.errors import FedFactoryError
from fedfactory.generative import FactoryConfig
from fedfactory.researcher.experiment import factory_experiment, run_round, use_researcher, wait_for_nodes


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


def main(researcher: str, tag: str, config: str) -> None:
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
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
