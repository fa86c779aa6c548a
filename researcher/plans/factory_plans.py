"""Training plans of both phases; their source text is what a site's administrator reads and approves."""

import fedfactory
from fedfactory.node.plans.adaptation_plan import AdaptationTrainingPlan
from fedfactory.node.plans.factory_plan import FactoryTrainingPlan


class FactoryPlan(FactoryTrainingPlan):
    """Phase one of fedfactory: the site takes part in training the generator of the data factory.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    The weights of the generator leave the site, with the domain's name, the pixel spacing, the organ's height, the
    mean losses of a round, the augmentation strength, the speed, and three numbers that compare synthetic with real
    slices. The discriminator and all images stay.
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
    The weights of both networks leave the site. A discriminator is trained on the site's images and so remembers more
    of them than a generator, which never receives an image. The domain's name, the pixel spacing, the organ's height,
    the mean losses of a round, the augmentation strength, the speed, and three numbers that compare synthetic with
    real slices leave the site too. All images stay.
    """

    discriminator_leaves = True

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.factory_plan import FactoryTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class LabelledFactoryPlan(FactoryTrainingPlan):
    """Phase one of fedfactory, with labels: the generator learns to draw images AND their label maps.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    The weights of the generator leave the site. At a site with labels it is trained on images and labels together, so
    these weights hold what label maps of its patients look like in general, as they hold it of images. The domain's
    name, the pixel spacing, the organ's height, the mean losses of a round, the augmentation strength, the speed, and
    three numbers that compare synthetic with real slices leave the site too. The discriminator, which sees images with
    their labels, stays; so do all images and labels. A site without labels takes part with its images, and if it made
    pseudo-labels of them and the researcher asks for it, with these.
    """

    learns_labels = True

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.factory_plan import FactoryTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class AdaptationPlan(AdaptationTrainingPlan):
    """Phase two of fedfactory: the site trains a segmenter for its own images, which stays at the site.

    The code that runs is that of the fedfactory package installed at the node, in the version named above.
    The researcher sends a labelled factory. No weight and no image leaves the site. What leaves: the domain's name,
    counts of slices and alarms, seconds, five numbers that compare classes and synthetic slices with the site's
    images, and, if the site has labelled test cases, their number and mean Dice. The segmenter is written beside the
    site's slice store, in a folder with the store's name and the ending `.segmenters`.
    """

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.adaptation_plan import AdaptationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]
