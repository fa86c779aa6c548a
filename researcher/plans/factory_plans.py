"""The text that travels: what a site's administrator reads and approves."""

import fedfactory
from fedfactory.node.plans.adaptation_plan import AdaptationTrainingPlan
from fedfactory.node.plans.factory_plan import FactoryTrainingPlan


class FactoryPlan(FactoryTrainingPlan):
    """Phase one of fedfactory: the site's share in training the generator of the data factory.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    Weights of the generator leave the site, with the domain's name, the pixel spacing, the organ's height, the mean
    losses of a round, and three numbers that compare synthetic with real slices. The discriminator and all images stay.
    """

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.factory_plan import FactoryTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class SharedDiscriminatorPlan(FactoryTrainingPlan):
    """Phase one of fedfactory, as published: generator AND discriminator are averaged over the sites.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    Weights of both networks leave the site. A discriminator has seen the site's images and remembers more of them than
    a generator, which has not. With them go the domain's name, the pixel spacing, the organ's height, the mean losses
    of a round, and three numbers that compare synthetic with real slices. All images stay.
    """

    discriminator_leaves = True

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.factory_plan import FactoryTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class AdaptationPlan(AdaptationTrainingPlan):
    """Phase two of fedfactory: the site trains a segmenter for its own images, and keeps it.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    A labelled factory comes from the researcher. No weight and no image leaves the site; what leaves are the domain's
    name, counts of slices and alarms, seconds, five numbers that compare classes and synthetic slices with the site's
    images, and, where the site has labelled test cases, their number and mean Dice. The segmenter lies beside the
    site's store, in a folder named like it with `.segmenters` behind.
    """

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.adaptation_plan import AdaptationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]
