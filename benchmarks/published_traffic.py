"""A training plan that sends as much as the published program: generator, discriminator and moving average."""

from __future__ import annotations

import copy

from fedfactory.generative.factory import Factory
from fedfactory.node.plans.factory_plan import FactoryTrainingPlan


class EverythingTravels(FactoryTrainingPlan):
    """No parameter is local; the moving average is a third network of the model, which is not trained."""

    def init_dependencies(self):
        return [
            "import copy",
            "from published_traffic import EverythingTravels",
            "from fedfactory.generative.factory import Factory",
            "from fedfactory.node.plans.factory_plan import FactoryTrainingPlan",
        ]

    def init_model(self, model_args) -> Factory:
        factory = super().init_model(model_args)
        factory.average = copy.deepcopy(factory.generator).requires_grad_(False)
        return factory

    def tag_parameters(self, name):
        return set()
