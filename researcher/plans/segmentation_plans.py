"""Training plans of federated segmentation, one per method; a site's administrator reads and approves their text."""

import fedfactory
from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan


class LocalPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method local: every site trains alone.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. No weight
    leaves the site. What leaves: the domain's name, counts of slices by kind of label, losses, seconds, and, if the
    site has labelled test cases, Dice and HD95. Images and labels stay at the site. A copy of the segmenter is written
    beside the site's slice store, in a folder with the store's name and the ending `.segmenters`.
    """

    method_name = "local"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedAvgPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedavg: federated averaging.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter leave the site. The domain's name, counts of slices by kind of label, losses, seconds, and, if the
    site has labelled test cases, Dice and HD95 leave the site too. Images and labels stay at the site. A copy of the
    segmenter is written beside the site's slice store, in a folder with the store's name and the ending `.segmenters`.
    With differential privacy, neither losses nor scores leave, but epsilon, delta and the number of training patients.
    """

    method_name = "fedavg"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedProxPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedprox: federated averaging with a proximal term.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter leave the site. The domain's name, counts of slices by kind of label, losses, seconds, and, if the
    site has labelled test cases, Dice and HD95 leave the site too. Images and labels stay at the site. A copy of the
    segmenter is written beside the site's slice store, in a folder with the store's name and the ending `.segmenters`.
    With differential privacy, neither losses nor scores leave, but epsilon, delta and the number of training patients.
    """

    method_name = "fedprox"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedBNPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedbn: federated averaging with local normalisation layers.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter except those of normalisation layers leave the site. The domain's name, counts of slices by kind of
    label, losses, seconds, and, if the site has labelled test cases, Dice and HD95 leave the site too. Images and
    labels stay at the site. A copy of the segmenter is written beside the site's slice store, in a folder with the
    store's name and the ending `.segmenters`.
    With differential privacy, neither losses nor scores leave, but epsilon, delta and the number of training patients.
    """

    method_name = "fedbn"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedICRAPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedicra: weak labels, a personalised model at every site.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter leave the site; the weights by which the site mixes them with its own stay. The domain's name,
    counts of slices by kind of label, losses, seconds, and, if the site has labelled test cases, Dice and HD95 leave
    the site too. Images and labels stay at the site. A copy of the segmenter is written beside the site's slice store,
    in a folder with the store's name and the ending `.segmenters`.
    """

    method_name = "fedicra"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedMixPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedmix: dense, box, image-level or no labels.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of two networks leave the site, and the number of slices whose pseudo-labels it accepted. The domain's name, counts
    of slices by kind of label, losses, seconds, and, if the site has labelled test cases, Dice and HD95 leave the site
    too. Images and labels stay at the site. A copy of the segmenter is written beside the site's slice store, in a
    folder with the store's name and the ending `.segmenters`.
    """

    method_name = "fedmix"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class GazePlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method gaze: supervision by eye fixations or by masks.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of two networks leave the site. The domain's name, counts of slices by kind of label, losses, seconds, and, if the
    site has labelled test cases, Dice and HD95 leave the site too. Images, labels and fixations stay at the site. A
    copy of the segmenter is written beside the site's slice store, in a folder with the store's name and the ending
    `.segmenters`.
    """

    method_name = "gaze"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class HSSFPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method hssf: every site has a network architecture of its own.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. The site's
    network predicts the labels of public slices, which the researcher and all sites have. These predictions leave the
    site in half precision; no weights do. The predictions of a network that was trained on the site's images may reveal
    something about them. The domain's name, the name of the site's network, counts of slices by kind of label, losses,
    seconds, and, if the site has labelled test cases, Dice and HD95 leave the site too. Images and labels stay at the
    site. The segmenter is written beside the site's slice store, in a folder with the store's name and the ending
    `.segmenters`.
    """

    method_name = "hssf"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class LSSLPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method lssl: labels on public slices only, the same network everywhere.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter leave the site. The domain's name, counts of slices by kind of label, losses, seconds, and, if the
    site has labelled test cases, Dice and HD95 leave the site too. Images and labels stay at the site. A copy of the
    segmenter is written beside the site's slice store, in a folder with the store's name and the ending `.segmenters`.
    """

    method_name = "lssl"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class CMCPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method cmc: two modalities, few labels.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All weights
    of the segmenter leave the site. The domain's name, the names of the site's modalities, counts of slices by modality
    and by kind of label, losses, seconds, and, if the site has labelled test cases, Dice and HD95 leave the site too.
    Images and labels stay at the site. A copy of the segmenter is written beside the site's slice store, in a folder
    with the store's name and the ending `.segmenters`.
    """

    method_name = "cmc"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


PLANS = {
    plan.method_name: plan
    for plan in (
        LocalPlan,
        FedAvgPlan,
        FedProxPlan,
        FedBNPlan,
        FedICRAPlan,
        FedMixPlan,
        GazePlan,
        HSSFPlan,
        LSSLPlan,
        CMCPlan,
    )
}
