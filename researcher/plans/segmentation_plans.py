"""The texts that travel for federated segmentation, one per method: what a site's administrator reads and approves."""

import fedfactory
from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan


class LocalPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method local: every site for itself.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. No
    weight leaves the site. With it go the domain's name, counts of slices by kind of label, losses, seconds, and
    Dice and HD95 where the site has labelled test cases. Images and labels stay, and so does a copy of the
    segmenter, in a folder named like the site's store with `.segmenters` behind.
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

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site. With it go the domain's name, counts of slices by kind of label,
    losses, seconds, and Dice and HD95 where the site has labelled test cases. Images and labels stay, and so does a
    copy of the segmenter, in a folder named like the site's store with `.segmenters` behind.
    """

    method_name = "fedavg"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedProxPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedprox: federated averaging, sites held near the average.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site. With it go the domain's name, counts of slices by kind of label,
    losses, seconds, and Dice and HD95 where the site has labelled test cases. Images and labels stay, and so does a
    copy of the segmenter, in a folder named like the site's store with `.segmenters` behind.
    """

    method_name = "fedprox"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedBNPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedbn: federated averaging, normalisation stays.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site but those of normalisation layers. With it go the domain's name, counts
    of slices by kind of label, losses, seconds, and Dice and HD95 where the site has labelled test cases. Images
    and labels stay, and so does a copy of the segmenter, in a folder named like the site's store with `.segmenters`
    behind.
    """

    method_name = "fedbn"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedICRAPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedicra: weak labels, a personalised model per site.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site; how it mixes them with its own stays. With it go the domain's name,
    counts of slices by kind of label, losses, seconds, and Dice and HD95 where the site has labelled test cases.
    Images and labels stay, and so does a copy of the segmenter, in a folder named like the site's store with
    `.segmenters` behind.
    """

    method_name = "fedicra"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class FedMixPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method fedmix: pixel, box and image labels or none.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of two networks leave the site, and how many slices it accepted labels of its own making for. With it go
    the domain's name, counts of slices by kind of label, losses, seconds, and Dice and HD95 where the site has
    labelled test cases. Images and labels stay, and so does a copy of the segmenter, in a folder named like the
    site's store with `.segmenters` behind.
    """

    method_name = "fedmix"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class GazePlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method gaze: fixations of the eye, or masks.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of two networks leave the site. With it go the domain's name, counts of slices by kind of label, losses,
    seconds, and Dice and HD95 where the site has labelled test cases. Images, labels and fixations stay, and so
    does a copy of the segmenter, in a folder named like the site's store with `.segmenters` behind.
    """

    method_name = "gaze"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class HSSFPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method hssf: networks of each site's own.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. The
    site's network predicts the labels of public slices, which researcher and all sites have; these predictions leave
    the site, in half precision, and no weights. A network that was trained on the site's images may say something of
    them by what it predicts. With them go the domain's name, the name of the site's network, counts of slices by kind
    of label, losses, seconds, and Dice and HD95 where the site has labelled test cases. Images and labels stay, and
    so does the segmenter, in a folder named like the site's store with `.segmenters` behind.
    """

    method_name = "hssf"

    def init_dependencies(self) -> list[str]:
        return [
            "import fedfactory",
            "from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan",
            f"assert fedfactory.__version__ == {fedfactory.__version__!r}, 'the site has another fedfactory version'",
        ]


class LSSLPlan(SegmentationTrainingPlan):
    """Federated segmentation by fedfactory, method lssl: no labels but on public slices, equal networks.

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site. With it go the domain's name, counts of slices by kind of label, losses,
    seconds, and Dice and HD95 where the site has labelled test cases. Images and labels stay, and so does a copy of
    the segmenter, in a folder named like the site's store with `.segmenters` behind.
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

    The code that runs is that of the fedfactory package installed at the node, in the version named above. All
    weights of the segmenter leave the site. With it go the domain's name, the names of the site's modalities, counts
    of slices by modality and by kind of label, losses, seconds, and Dice and HD95 where the site has labelled test
    cases. Images and labels stay, and so does a copy of the segmenter, in a folder named like the site's store with
    `.segmenters` behind.
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
