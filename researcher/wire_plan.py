"""The text that travels: what a site's administrator reads and approves."""

import fedfactory
from fedfactory.node.plans import FactoryTrainingPlan


class FactoryPlan(FactoryTrainingPlan):
    """Phase one of fedfactory: the site's share in training the generator of the data factory.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    Weights of the generator leave the site, with the domain's name, the pixel spacing, the organ's height and the
    mean losses of a round. The discriminator and all images stay.
    """

    def init_dependencies(self):
        return [
            "import fedfactory",
            "from fedfactory.node.plans import FactoryTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]
