"""A store's quality page: what a person should see before the slices are used. It stays at the site."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.html_pages import new_figure, picture, pixels, plain, table, write_page
from ...errors import StoreError
from ...imaging.images import HISTOGRAM_BINS, histogram
from ...imaging.overlays import COLOURS, coloured, shown_slice
from ...imaging.slice_choices import UNLABELLED
from .derived.pseudo_labels import pseudo_label_facts, pseudo_labels
from .slice_store import Case, SliceStore
from .store_warnings import patients_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY_PAGE = "quality.html"
COLUMNS, MONTAGE_CASES = 8, 6
PSEUDO_ROWS = 3  # of slices with pseudo-labels
SHOWN_SIZE = 128
LISTED = 500  # cases in the table
NAMED_ENTRIES = 20  # of a group of files
CURVES = 100  # cases whose intensities are drawn
SAMPLED = 64  # slices behind the histogram of prepared intensities
CHANNEL_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:grey")
NOTE = (
    "<b>This page shows patients and stays at this site.</b> It names cases and holds images. Of the store, only "
    "<code>format.json</code> may be handed to others: it has slice format and domain, nothing of any patient."
)


def import_drawing() -> None:
    """Import what draws the page's figure, which takes longer than drawing it."""
    importlib.import_module("matplotlib.collections")
    importlib.import_module("matplotlib.backends.backend_agg")


def write_quality_page(store: SliceStore, path: Path) -> None:
    """Montage, histograms, warnings and a table of cases as one HTML file."""
    labelled = sum(case.labelled for case in store.cases)
    body = [
        f"<h1>Slice store of domain {plain(store.domain)}</h1>",
        f'<p class="note">{NOTE}</p>',
        f"<p>{plain(patients_line(store.cases))}.</p>",
        f"<p>{labelled} cases with {plain(store.label_kind)} labels; {_format(store)}</p>",
        "<h2>Warnings</h2>",
        "".join(f"<p>{plain(text)}</p>" for text in store.warnings) or "<p>none</p>",
        *_entries(store),
        "<h2>Slices</h2>",
        _montage(store),
        *_pseudo_labels(store),
        "<h2>Intensities</h2>",
        picture(lambda: _histograms(store), "histograms of intensities before and after preparation", trim=False),
        "<h2>Cases</h2>",
        _cases(store),
    ]
    write_page(path, f"slice store {store.domain}", body)


def _entries(store: SliceStore) -> list[str]:
    """What became of the entries of the source folder."""
    if store.accounting is None:
        return []
    rows = [
        [group.reason, group.fate, str(group.count), ", ".join(group.names[:NAMED_ENTRIES])]
        for group in store.accounting.groups
    ]
    text = f"The last run met {store.accounting.summary()}. All names are in store.json."
    return [
        "<h2>What became of the files</h2>",
        f"<p>{plain(text)}</p>",
        table(["entries", "became", "number", f"the first {NAMED_ENTRIES}"], rows),
    ]


def _format(store: SliceStore) -> str:
    """Size, place and intensities of the slices, and the names of the classes, in sentences."""
    fmt = store.format
    between = "as acquired" if fmt.slice_spacing is None else f"every {fmt.slice_spacing:.3g} mm"
    if fmt.pictures:
        text = f"{len(store)} pictures, brought to {fmt.size} x {fmt.size} px"
    else:
        text = (
            f"{len(store)} slices of {fmt.size} x {fmt.size} px at {fmt.spacing:.3g} mm, {between}, {fmt.plane} plane, "
            f"{fmt.z_bins} height bins"
        )
    if fmt.colour:
        text += ", in colour."
    else:
        named = store.site.channels or tuple(str(channel) for channel in range(fmt.channels))
        windows = [f"{low:.2f} to {high:.2f}" for low, high in fmt.window]
        which = [f" of {plain(name)}" if fmt.channels > 1 else "" for name in named]
        ends = "; ".join(f"{window}{name}" for window, name in zip(windows, which, strict=True))
        text += f". Standardised intensities {ends} became -1 to 1."
    names = ", ".join(f"{value} {plain(name)}" for value, name in store.class_names.items())
    return text + (f" Classes: {names}." if names else "")


def _montage(store: SliceStore) -> str:
    """One row per case, from the lowest to the highest slice; pictures in one row."""
    rows = []
    if store.format.pictures:
        shown = [store.cases[n] for n in _spread(len(store.cases), COLUMNS)]
        strip = np.concatenate([_coloured(store, case, case.first) for case in shown], axis=1)
        names = plain(", ".join(case.name for case in shown))
        return f"<p>{names}<br>{pixels(strip, 'pictures of the store')}</p>"
    for case in (store.cases[n] for n in _spread(len(store.cases), MONTAGE_CASES)):
        places = np.linspace(case.first, case.first + case.count - 1, COLUMNS).round().astype(int)
        strip = np.concatenate([_coloured(store, case, place) for place in places], axis=1)
        rows.append(f"<p>{plain(case.name)}<br>{pixels(strip, f'slices of {case.name}')}</p>")
    return "".join(rows)


def _pseudo_labels(store: SliceStore) -> list[str]:
    """What is known of the store's pseudo-labels, with some of them; nothing without any."""
    try:
        facts, labels = pseudo_label_facts(store), pseudo_labels(store)
    except StoreError as error:
        return ["<h2>Pseudo-labels</h2>", f"<p>{plain(str(error))}</p>"]
    if facts is None:
        return []
    text = (
        "These are no annotations: a segmenter gave them, and only the training of a factory that draws labels may use "
        "them. Dark pixels have none."
    )
    rows = [[name, value] for name, value in facts.rows().items()]
    body = ["<h2>Pseudo-labels</h2>", f'<p class="note">{text}</p>', table(["", ""], rows)]
    body += [f"<p>warning: {plain(doubt)}</p>" for doubt in facts.doubts]
    chosen = np.flatnonzero(((labels > 0) & (labels != UNLABELLED)).any(axis=(1, 2)))
    for part in np.array_split(chosen[_spread(len(chosen), COLUMNS * PSEUDO_ROWS)], PSEUDO_ROWS):
        if len(part):
            strip = np.concatenate([_with_pseudo_labels(store, labels, number) for number in part], axis=1)
            body.append(f"<p>{pixels(strip, 'slices with pseudo-labels')}</p>")
    return body


def _with_pseudo_labels(store: SliceStore, labels: np.ndarray, number: int) -> np.ndarray:
    """(S + 2, S + 2, 3) uint8: a slice with its pseudo-labels in colour, dark where it has none."""
    shown, step = _small(store, number)
    label = np.asarray(labels[number, ::step, ::step])
    shown = coloured(shown, np.where(label == UNLABELLED, 0, label))
    return _framed(store, np.where((label == UNLABELLED)[..., None], shown // 2, shown))


def _small(store: SliceStore, number: int) -> tuple[np.ndarray, int]:
    """A slice as a picture (S, S, 3) uint8, S at most about 128, and how many pixels became one along an axis."""
    step = max(1, store.format.size // SHOWN_SIZE)
    image = np.asarray(store.images[number, :, ::step, ::step], dtype=np.float32)
    # Not turned yet: labels and fixations are drawn in rows and columns.
    return shown_slice(image if store.format.colour else image[:1], picture=True), step


def _framed(store: SliceStore, shown: np.ndarray) -> np.ndarray:
    """A picture (S, S, 3) as the page shows it, (S + 2, S + 2, 3)."""
    # Rows of a volume's slice go from left to right; on paper the front of the body is up.
    return np.pad(shown if store.format.pictures else np.rot90(shown), ((1, 1), (1, 1), (0, 0)))


def _coloured(store: SliceStore, case: Case, number: int) -> np.ndarray:
    """(S + 2, S + 2, 3) uint8, S at most about 128: a slice as a picture with its labels in colour."""
    shown, step = _small(store, number)
    label = np.zeros(shown.shape[:2], np.uint8)
    if store.labels is not None and case.labelled:
        label = np.asarray(store.labels[number, ::step, ::step])
    shown = coloured(shown, np.where(label == UNLABELLED, 0, label))
    if store.gaze is not None and case.labelled:
        rows = store.gaze[store.gaze[:, 0] == number]
        places = (rows[:, 1:3] / step).round().astype(int).clip(0, len(shown) - 1)
        shown[places[:, 0], places[:, 1]] = COLOURS[0] * 255
    return _framed(store, shown)


def _histograms(store: SliceStore) -> Figure:
    from matplotlib.collections import LineCollection

    figure, ((before, after),) = new_figure(1, 2, size=(10, 3))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.17, top=0.9)
    colours = ("tab:red", "tab:green", "tab:blue") if store.format.colour else CHANNEL_COLOURS
    sample = np.asarray(store.images[_spread(len(store), SAMPLED)], dtype=np.float32)
    for channel, colour in zip(range(store.format.channels), colours, strict=False):
        found = [store.cases[n].intensities[channel] for n in _spread(len(store.cases), CURVES)]
        curves = [np.stack([_edges(one.low, one.high), _shares(np.array(one.counts))], axis=1) for one in found]
        before.add_collection(LineCollection(curves, color=colour, alpha=0.3, linewidth=0.8))
        counts = np.array(histogram(sample[:, channel], -1, 1))
        after.plot(_edges(-1, 1), _shares(counts), color=colour)
    before.set(
        title=f"as acquired, one line for each of {min(CURVES, len(store.cases))} cases",
        xlabel="intensity",
        ylabel="share of voxels",
        yscale="log",
    )
    after.set(title="in the store, padding included", xlabel="intensity", yscale="log")
    for axis in (before, after):
        axis.autoscale_view()
        axis.minorticks_off()  # half of the drawing's time
        axis.yaxis.set_major_formatter("{x:g}")  # powers of ten would be set as formulas, the other half
    return figure


def _edges(low: float, high: float) -> np.ndarray:
    """(64,) lower ends of the bins of a histogram."""
    return np.linspace(low, high, HISTOGRAM_BINS + 1)[:-1]


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum."""
    return counts / max(1, counts.sum())


def _cases(store: SliceStore) -> str:
    values = sorted({int(v) for case in store.cases for v in case.facts.label_volumes})[:12]
    pictures = store.format.pictures
    named = [store.class_names.get(value, f"label {value}") for value in values]
    head = ["case", "patient", "split", "shape", *([] if pictures else ["voxel in mm", "slices"]), "clipped"]
    head += [f"{name} in {'% of the picture' if pictures else 'ml'}" for name in named]
    rows = [_row(case, values, pictures=pictures) for case in store.cases[:LISTED]]
    rest = len(store.cases) - LISTED
    return table(head, rows) + (f"<p>and {rest} more</p>" if rest > 0 else "")


def _row(case: Case, values: list[int], *, pictures: bool) -> list[str]:
    shares = case.facts.label_volumes
    if pictures:  # millilitres of what stands for its size
        whole = math.prod(case.shape) * abs(float(np.linalg.det(np.array(case.affine)[:3, :3]))) / 1000
        shares = {value: 100 * volume / whole for value, volume in shares.items()}
    size = [" x ".join(f"{mm:.3g}" for mm in case.facts.spacing), str(case.count)]
    return [
        case.name,
        case.patient,
        case.split,
        " x ".join(str(n) for n in (case.shape[:2] if pictures else case.shape)),
        *([] if pictures else size),
        f"{case.facts.clipped:.1%}",
        *(f"{shares[str(v)]:.3g}" if str(v) in shares else ("" if case.labelled else "-") for v in values),
    ]


def _spread(total: int, wanted: int) -> np.ndarray:
    """(n,) indices from first to last, at most `wanted`."""
    return np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(int))
