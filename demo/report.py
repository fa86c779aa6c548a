"""The demonstration's report: one HTML file without references to other files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..adaptation.evaluation.summary import class_means, summarise
from ..common.html_pages import new_figure, picture, plain, write_page
from ..generative.factory_file import TrainedFactory
from ..imaging.overlays import CLASS_COLOURS
from ..imaging.volume_files import read_volume
from ..imaging.volumes import Volume
from .demo_result import DemoResult
from .simulated_subjects import CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..generative.metrics.fidelity import Estimate
    from ..node.audit_result import AuditResult

COLOURS = ["#000000", *(CLASS_COLOURS[k] for k in (1, 2, 0))]  # background, then fluid in blue, grey and white matter
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
    synthetic: Path,
) -> None:
    """Write the report to `result.files["report"]`.

    Args:
        result: measurements of the demonstration.
        factory: the factory that was trained.
        audited: audit of the last site.
        labelled_file: file of the labelled factory.
        tests: site to the folder of its held-out subjects.
        synthetic: folder with a folder of synthetic volumes for every site.
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
        "<h2>Dice on held-out subjects</h2>",
        _dice_table(result),
        f"<p>{_differences(result)}</p>",
        "<h2>Dice per class</h2>",
        _class_table(result),
        "<h2>Real and synthetic slices</h2>",
        "<p>Upper row of each pair: real slices of held-out subjects. Lower row: synthetic slices, drawn from the same "
        "latents in every domain.</p>",
        picture(lambda: _real_and_synthetic(tests, synthetic), "real and synthetic slices per domain"),
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
            row = next(row for row in summarise(result.scores[site][method]) if (row.measure, row.label) == ("dice", 0))
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
