"""The demonstration's report: one HTML file without references to other files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..adaptation.evaluation.label_files import find_labels
from ..adaptation.evaluation.scores import Score
from ..adaptation.evaluation.summary import Summary, class_means, mean_over_classes, summarise
from ..common.html_pages import new_figure, picture, pixels, plain, write_page
from ..generative.factory_file import TrainedFactory
from ..imaging.overlays import CLASS_COLOURS
from ..imaging.pictures.contours import volume_thumbnails
from ..imaging.pictures.decoding import read_picture
from ..imaging.volume_files import read_volume
from ..imaging.volumes import Volume
from .demo_result import DemoResult
from .simulated_subjects import CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..generative.metrics.fidelity import Estimate
    from ..node.audit_result import AuditResult

COLOURS = ["#000000", *CLASS_COLOURS[:3]]  # background, then the classes as in all pictures of this package
SIDE = 240  # pixels of a held-out slice
BARS = {"no_adaptation": "#999999", "augmentation_only": "#e69f00", "adapted": "#0072b2", "oracle": "#009e73"}
HATCHES = ("", "//", "", "..")  # so that neighbours differ without colours too
ROW_NAMES = {
    "no_adaptation": "no adaptation: trained on the labelled site and applied without a change",
    "augmentation_only": "first guess: trained on the labelled site under random contrast, which needs no factory",
    "adapted": "adapted: trained on synthetic volumes of the domain, and the site's images if the first guess agrees",
    "oracle": "oracle: trained on labels of the site's own images (not available in practice)",
}


def write_report(
    result: DemoResult,
    factory: TrainedFactory,
    audited: AuditResult,
    *,
    labelled_file: Path,
    tests: dict[str, Path],
    predictions: Path,
    synthetic: Path,
    pairs: Path,
) -> None:
    """Write the report to `result.files["report"]`.

    Args:
        result: measurements of the demonstration.
        factory: the factory that was trained.
        audited: audit of the last site.
        labelled_file: file of the labelled factory.
        tests: site to the folder of its held-out subjects.
        predictions: folder with SITE/METHOD, label maps of the held-out subjects.
        synthetic: folder with a folder of synthetic volumes for every site.
        pairs: picture of slices that the factory draws, with the contours of the labels that it draws with them.
    """
    sites = list(result.dice)
    other = sites[-1]
    body = [
        "<h1>fedfactory demonstration</h1>",
        '<p class="note"><b>The subjects are simulated</b> from a real template: the MNI152 brain with its grey- and '
        "white-matter maps, randomly deformed and drawn in one contrast per site. Real patients differ more from each "
        "other. The federation and the training are real, and this run measured every number below.</p>",
        f"<p>{len(sites)} sites trained a generator together over {factory.facts.rounds} rounds; they exchanged only "
        f"weights of the generator. Site <b>{sites[0]}</b> has labels, the other sites have none. Seed {result.seed}, "
        f"{result.seconds:.0f} seconds.</p>",
        "<h2>Held-out subjects of the unlabelled sites</h2>",
        f"<p>Contours: {_legend()}. Shown are, for each site, the subjects with the best and the worst Dice after "
        "adaptation, in the slice with most tissue, with the mean Dice of their classes.</p>",
        picture(lambda: _held_out(result, tests, predictions), "held-out slices with contours, best and worst case"),
        "<h2>Dice on held-out subjects</h2>",
        picture(lambda: _bars(result), "mean foreground Dice by site and method, with intervals"),
        _dice_table(result),
        f"<p>{_differences(result)}</p>",
        "<h2>Dice per class</h2>",
        _class_table(result),
        "<h2>Real and synthetic slices</h2>",
        "<p>Upper row of each pair: real slices of held-out subjects. Lower row: synthetic slices, drawn from the same "
        "latents in every domain.</p>",
        picture(lambda: _real_and_synthetic(tests, synthetic), "real and synthetic slices per domain"),
        "<h2>Slices and labels, drawn together</h2>",
        f"<p>Contours: {_legend()}. Two rows for each domain, {plain(', '.join(factory.config.domains))}: the slices "
        "that the factory draws, and the same with the contours of the labels that it draws with them. A column is one "
        f"latent at one height. Only {plain(sites[0])} has shown it labels.</p>",
        pixels(read_picture(pairs), "synthetic slices of every domain, without and with contours of their labels"),
        "<h2>Do labels carry over between domains?</h2>",
        _label_transfer(factory),
        f"<h2>A synthetic volume of {plain(other)} with its labels</h2>",
        f"<p>{_legend()}</p>",
        picture(lambda: _three_planes(synthetic / other), "a synthetic volume and its labels in three planes"),
        f"<h2>Do synthetic slices of {plain(other)} reveal who was in the training set?</h2>",
        _audit(audited),
        "<h2>Training curves</h2>",
        picture(lambda: _curves(factory), "generator and discriminator loss per round and site"),
        "<h2>Made with</h2>",
        "<p><small>" + plain(", ".join(f"{k} {v}" for k, v in result.versions.items())) + "</small></p>",
        f"<p><small>labelled factory: {plain(labelled_file.name)}; seed {result.seed}; configuration "
        f"{plain(str(factory.config.to_dict()))}</small></p>",
    ]
    write_page(result.files["report"], "fedfactory demonstration", body)


def _dice_table(result: DemoResult) -> str:
    """Mean foreground Dice by method and site."""
    sites = list(result.dice)
    head = "".join(f"<th>{plain(s)}{' (labelled)' if s == sites[0] else ''}</th>" for s in sites)
    rows = ""
    for method, name in ROW_NAMES.items():
        cells = ""
        for site in sites:
            row = _mean_dice(result, site, method)
            cells += f"<td>{row.mean:.3f} <small>({row.low:.3f} to {row.high:.3f})</small></td>"
        rows += f"<tr><td>{name}</td>{cells}</tr>"
    return (
        f"<table><tr><th>mean foreground Dice</th>{head}</tr>{rows}</table>"
        "<p><small>Mean over subjects for each class, then over classes; in brackets the 95 % interval over held-out "
        "subjects (bootstrap); one training run each, all of as many updates.</small></p>"
    )


def _class_table(result: DemoResult) -> str:
    """Mean Dice by site, method and class."""
    head = "".join(f"<th>{name}</th>" for name in CLASSES.values())
    rows = ""
    for site, methods in result.scores.items():
        for method, scores in methods.items():
            means = class_means(scores, "dice")
            cells = "".join(f"<td>{means.get(label, np.nan):.3f}</td>" for label in CLASSES)
            rows += f"<tr><td>{plain(site)}, {method.replace('_', ' ')}</td>{cells}</tr>"
    return f"<table><tr><th>mean Dice</th>{head}</tr>{rows}</table>"


def _differences(result: DemoResult) -> str:
    """How the adapted segmenter compares with the others at every unlabelled site, as sentences."""
    parts = []
    for site in list(result.dice)[1:]:
        row = result.dice[site]
        parts.append(
            f"At unlabelled site {plain(site)}, adaptation changes Dice by "
            f"{row['adapted'] - row['no_adaptation']:+.3f} against no adaptation, "
            f"{row['adapted'] - row['augmentation_only']:+.3f} against the first guess, and "
            f"{row['adapted'] - row['oracle']:+.3f} against the oracle."
        )
    return " ".join(parts)


def _label_transfer(factory: TrainedFactory) -> str:
    """The measurements that need no labels: shared anatomy of pairs of domains, and quality of synthetic slices."""
    facts = factory.facts
    pairs = "".join(
        f"<tr><td>{plain(pair)}</td><td>{score:.2f}</td></tr>" for pair, score in facts.shared_anatomy.pairs.items()
    )
    sites = "".join(
        f"<tr><td>{plain(domain)}</td><td>{quality['distance']:.2g}</td><td>{quality['layout']:.2f}</td>"
        f"<td>{quality['contrast']:.2f}</td></tr>"
        for domain, quality in facts.quality.items()
    )
    alarms = "".join(f"<p><b>alarm: {plain(text)}</b></p>" for text in facts.alarms) or "<p>No alarm.</p>"
    return (
        "<p>A latent should give the same anatomy in all domains. This is measured without labels; 0 is chance, 1 "
        "means that all anatomy is shared.</p>"
        f"<table><tr><th>domains</th><th>shared anatomy</th></tr>{pairs}</table>"
        "<p>Synthetic slices compared with the real slices of each site, measured there without labels:</p>"
        "<table><tr><th>domain</th><th>kernel distance (0 is best)</th><th>layout (1 is best)</th>"
        "<th>contrast (1 is best)</th></tr>"
        f"{sites}</table>{alarms}"
    )


def _audit(audited: AuditResult) -> str:
    """The summary of an audit; the audit's own page, with the closest pairs of slices, stays at the site."""

    def cell(estimate: Estimate) -> str:
        return f"<td>{estimate.value:.2f} <small>({estimate.low:.2f} to {estimate.high:.2f})</small></td>"

    rows = "".join(
        f"<tr><td>{space}</td>{cell(found.copying_ratio)}{cell(found.attack_auc)}</tr>"
        for space, found in audited.privacy.items()
    )
    fidelity, patients = audited.fidelity, audited.patients
    findings = "".join(f"<li>{plain(text)}</li>" for text in audited.findings)
    return (
        "<p>Copying ratio: distance of synthetic slices to training subjects, divided by their distance to held-out "
        "subjects; 1 means that nothing is copied, values near 0 mean copies. Attack: area under the ROC curve of an "
        "attacker who guesses which subjects were in the training set; 0.5 is chance. With 95 % intervals.</p>"
        f"<table><tr><th>measured on</th><th>copying ratio</th><th>area under the curve</th></tr>{rows}</table>"
        f"<p>Precision {fidelity.precision:.2f}, recall {fidelity.recall:.2f}, kernel distance "
        f"{fidelity.kernel_distance:.3g}; {patients['trained']} training subjects, {patients['held_out']} held-out "
        "subjects. With so few subjects, only gross leaks would be detected.</p>"
        + (f"<ul>{findings}</ul>" if findings else "<p>No finding.</p>")
    )


def _legend() -> str:
    return ", ".join(f'<span style="color:{COLOURS[k]}">&#9632;</span> {name}' for k, name in CLASSES.items())


def _held_out(result: DemoResult, tests: dict[str, Path], predictions: Path) -> Figure:
    """Two rows for each unlabelled site, its best and its worst subject: image, reference, not adapted, adapted."""
    sites = list(result.dice)[1:]
    shown = ("no_adaptation", "adapted")
    figure, axes = new_figure(2 * len(sites), 4, size=(10.5, 5.4 * len(sites)))
    for axis, title in zip(axes[0], ("image", "reference", *(name.replace("_", " ") for name in shown)), strict=True):
        axis.set_title(title)
    for number, site in enumerate(sites):
        dice = {method: _case_dice(result.scores[site][method]) for method in shown}
        reference = find_labels(tests[site])
        found = {method: find_labels(predictions / site / method) for method in shown}
        ranked = sorted(dice["adapted"], key=dice["adapted"].__getitem__)
        for row, (which, case) in enumerate((("best", ranked[-1]), ("worst", ranked[0])), start=2 * number):
            image = read_volume(next((reference[case].parents[1] / "image").glob("*.nii.gz")))
            theirs = read_volume(reference[case], integer=True)
            nothing = replace(theirs, data=np.zeros_like(theirs.data))
            ours = [read_volume(found[method][case], integer=True) for method in shown]
            with_reference = volume_thumbnails(image, theirs, nothing, *ours, plane="axial", side=SIDE, width=2)
            order = (with_reference[1], with_reference[0], *with_reference[2:])
            captions = ("", "", *(f"Dice {dice[method][case]:.3f}" for method in shown))
            for axis, picture_, caption in zip(axes[row], order, captions, strict=True):
                axis.imshow(picture_)
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(caption)
            axes[row, 0].set_ylabel(f"{site}, {which} case")
    return figure


def _case_dice(scores: list[Score]) -> dict[str, float]:
    """Case to the mean Dice of its classes."""
    cases = dict.fromkeys(score.case for score in scores)
    return {case: mean_over_classes([score for score in scores if score.case == case], "dice") for case in cases}


def _bars(result: DemoResult) -> Figure:
    """The table of mean foreground Dice as bars with their intervals, a group for each site."""
    figure, ((axis,),) = new_figure(1, 1, size=(9, 3.6))
    sites, width = list(result.dice), 0.8 / len(BARS)
    for number, ((method, colour), hatch) in enumerate(zip(BARS.items(), HATCHES, strict=True)):
        rows = [_mean_dice(result, site, method) for site in sites]
        places = np.arange(len(sites)) + (number - (len(BARS) - 1) / 2) * width
        means = np.array([row.mean for row in rows])
        # Means lie within their intervals; with a single subject there is none.
        ends = np.nan_to_num(np.abs([[row.low for row in rows], [row.high for row in rows]] - means))
        axis.bar(
            places, means, width * 0.92, yerr=ends, capsize=3, color=colour, hatch=hatch, edgecolor="white",
            ecolor="black", label=ROW_NAMES[method].partition(":")[0],
        )  # fmt: skip
    axis.set(xticks=range(len(sites)), ylim=(0, 1), ylabel="mean foreground Dice")
    axis.set_xticklabels([f"{site}{' (labelled)' if site == sites[0] else ''}" for site in sites])
    axis.legend(ncols=len(BARS), loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure


def _mean_dice(result: DemoResult, site: str, method: str) -> Summary:
    """The mean over classes with its interval."""
    return next(row for row in summarise(result.scores[site][method]) if (row.measure, row.label) == ("dice", 0))


def _real_and_synthetic(tests: dict[str, Path], synthetic: Path) -> Figure:
    """Two rows of slices per site: real, and synthetic."""
    columns = 8
    figure, axes = new_figure(2 * len(tests), columns, size=(columns * 1.3, 2.6 * len(tests)))
    for row, (site, folder) in enumerate(tests.items()):
        real = sorted(folder.glob("*/image/*.nii.gz"))
        made = sorted((synthetic / site).glob("*/image/*.nii.gz"))
        for line, paths in enumerate((real, made)):
            volumes = [read_volume(path).to_canonical().data for path in paths[:2]]
            for column in range(columns):
                axis = axes[2 * row + line, column]
                volume = volumes[column * len(volumes) // columns]
                height = np.linspace(0.15, 0.9, columns // len(volumes))[column % (columns // len(volumes))]
                axis.imshow(volume[:, :, int(height * (volume.shape[2] - 1))].T, cmap="gray", origin="lower")
                axis.set(xticks=[], yticks=[])
            axes[2 * row + line, 0].set_ylabel(f"{site}\n{'real' if line == 0 else 'synthetic'}", fontsize=8)
    return figure


def _three_planes(folder: Path) -> Figure:
    """The first synthetic volume below a folder in three planes, without and with its labels."""
    from matplotlib.colors import ListedColormap

    subject = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    image, label = (next(iter((subject / kind).glob("*.nii.gz"))) for kind in ("image", "label"))
    image, label = read_volume(image).to_canonical(), read_volume(label, integer=True).to_canonical()
    figure, axes = new_figure(2, 3, size=(9, 6))
    for column, axis_number in enumerate((2, 1, 0)):
        for row in range(2):
            axis = axes[row, column]
            grey = _plane(image, axis_number)
            aspect = _aspect(image, axis_number)
            axis.imshow(grey, cmap="gray", origin="lower", aspect=aspect)
            if row == 1:
                mask = np.ma.masked_equal(_plane(label, axis_number), 0)
                colours = ListedColormap(COLOURS)
                axis.imshow(mask, cmap=colours, vmin=0, vmax=3, alpha=0.55, origin="lower", aspect=aspect,
                            interpolation="nearest")  # fmt: skip
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(("axial", "coronal", "sagittal")[column])
    return figure


def _plane(volume: Volume, axis: int) -> np.ndarray:
    """The middle slice across an axis in 0..2, (height, width), in the volume's units."""
    return np.take(volume.data, volume.data.shape[axis] // 2, axis=axis).T


def _aspect(volume: Volume, axis: int) -> float:
    """Height over width of a pixel in a slice across an axis in 0..2."""
    first, second = [a for a in range(3) if a != axis]
    return float(volume.spacing[second] / volume.spacing[first])


def _curves(factory: TrainedFactory) -> Figure:
    """Losses per round, one line per domain."""
    figure, (axes,) = new_figure(1, 2, size=(10, 3.2))
    for axis, name in zip(axes, ("loss_discriminator", "loss_generator"), strict=True):
        for domain, rounds in factory.history.items():
            axis.plot([r["round"] for r in rounds], [r[name] for r in rounds], label=domain)
        axis.set(title=name.replace("_", " of the "), xlabel="round")
    axes[0].legend()
    return figure
