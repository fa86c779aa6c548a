"""Whether the slices of a series make one volume, from their headers; if not, the true reason in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import VolumeError
from .headers import Header
from .optional_packages import plain_text
from .slices import Slice, slices_of, stacks_of

MAX_UNEVENNESS = 0.05  # of the gaps between slices, as a share of the spacing
SAME_PLACE = 0.01  # distance of slices that lie at one place, as a share of the usual gap
LEAST_DISTANCE = 1e-3  # millimetres; what is less is rounding
GREY = ("MONOCHROME1", "MONOCHROME2", "")  # how the numbers of pixels are to be shown; some files do not say
SHOWN = 4  # values of an element that a message names
# What slices at one place may differ in, in the order in which it is asked: the element, and what there are several of.
DIFFERENCES = (
    ("StudyInstanceUID", "studies"),
    ("StackID", "stacks"),
    ("EchoNumbers", "echoes"),
    ("EchoTime", "echoes"),
    ("DiffusionBValue", "b-values"),
    ("SiemensBValue", "b-values"),
    ("GEBValue", "b-values"),
    ("InversionTime", "inversion times"),
    ("FlipAngle", "flip angles"),
    ("TriggerTime", "time points (cine phases)"),
    ("TemporalPositionIdentifier", "time points (cine phases)"),
    ("TemporalPositionIndex", "time points (cine phases)"),
    ("AcquisitionNumber", "acquisitions"),
    ("ImageType", "kinds of image"),
    ("ConvolutionKernel", "reconstructions"),
    ("SliceThickness", "reconstructions"),
    ("AcquisitionTime", "acquisitions"),
)


def refuse_unusable(headers: Sequence[Header]) -> list[Slice]:
    """The slices of a series in their order, if they make one volume.

    Args:
        headers: of all files of the series.

    Raises: VolumeError with the true reason: a damaged file, no geometry, several patients, sizes or directions,
        several slices at one place and what they differ in, gaps that vary, or slices that are missing.
    """
    where = headers[0].path.parent
    for header in headers:
        if header.fault:
            raise VolumeError(f"{where}: {header.path.name} {header.fault}; copy or export it again")
    if any(map(_is_colour, headers)):  # GDCM ends the whole process at a palette that is missing
        raise VolumeError(f"{where}: colour images, expected one grey value per pixel")
    _refuse_odd_scale(where, headers)
    if several := _several_patients(headers):
        raise VolumeError(f"{where}: {several}")
    slices = slices_of(headers)
    _refuse_frames(where, headers, slices)
    mosaics = [header.path.name for header in headers if "MOSAIC" in header.values.get("ImageType", "").upper()]
    if mosaics:
        raise VolumeError(
            f"{where}: {mosaics[0]} holds all slices as tiles of one image (mosaic); convert the series to NIfTI"
        )
    _refuse_without_geometry(where, slices)
    stacks = stacks_of(slices)
    if len(stacks) > 1:
        raise VolumeError(f"{where}: {different_stacks(stacks)}")
    ordered = stacks[0]
    _refuse_other_sizes(where, ordered)
    if len(ordered) > 1:
        _refuse_shared_places(where, ordered)
        _refuse_gaps(where, ordered)
    return ordered


def places_of(ordered: Sequence[Slice]) -> list[list[Slice]]:
    """Slices in their order by the place where they lie; several where slices share one."""
    places = np.array([piece.place for piece in ordered])
    gaps = np.diff(places)
    usual = float(np.median(gaps[gaps > LEAST_DISTANCE])) if (gaps > LEAST_DISTANCE).any() else 0.0
    apart = max(LEAST_DISTANCE, SAME_PLACE * usual)
    groups = [[ordered[0]]]
    for piece, gap in zip(ordered[1:], gaps, strict=True):
        if gap > apart:
            groups.append([piece])
        else:
            groups[-1].append(piece)
    return groups


def different_stacks(stacks: Sequence[Sequence[Slice]]) -> str:
    """What is wrong with a series whose images have several sizes or directions, and what to do."""
    slices = [piece for stack in stacks for piece in stack]
    if several := _several_patients([piece.header for piece in slices]):
        return several
    without = [piece for piece in slices if piece.directions is None]
    if without:
        return f"{_share(without, slices)} no ImageOrientationPatient; export the original images, or leave these out"
    count = len(slices)
    kinds = ", ".join(f"{len(stack)} of {stack[0].size[0]} x {stack[0].size[1]}" for stack in stacks[:SHOWN])
    if len({stack[0].size for stack in stacks}) == 1:
        text = f"the {count} images of the series lie in {len(stacks)} directions ({kinds} pixels), as of a scout"
    else:
        odd = stacks[-1][0].header.path.name
        text = f"the {count} images of the series have different sizes ({kinds} pixels), such as {odd}"
    return f"{text}; give the images of one volume, or choose with --series largest"


def _is_colour(header: Header) -> bool:
    """Whether a header is that of a colour image, or of one whose numbers stand for colours."""
    kind = header.values.get("PhotometricInterpretation", "")
    return header.number("SamplesPerPixel", 1) != 1 or kind not in GREY


def _refuse_odd_scale(where: Path, headers: Sequence[Header]) -> None:
    """Raises: VolumeError for a scale that is no number or a slope of 0: ITK would read such pixels unscaled."""
    for header in headers:
        for name, wanted in (("RescaleSlope", "a number other than 0"), ("RescaleIntercept", "a number")):
            text = header.values.get(name, "")
            try:
                value = float(text or 1)
            except ValueError:
                value = math.nan
            if not math.isfinite(value) or (name == "RescaleSlope" and value == 0):
                raise VolumeError(
                    f"{where}: {name} of {header.path.name} is '{plain_text(text)[:20]}'; it must be {wanted}, export "
                    "the original images"
                )


def _several_patients(headers: Sequence[Header]) -> str:
    """What is wrong with images of several patients in one series; empty if they are of one, or name none."""
    count = max(
        len({header.values.get(keyword, "") for header in headers} - {""}) for keyword in ("PatientID", "PatientName")
    )
    if count < 2:
        return ""
    return f"images of {count} patients have one series identifier (SeriesInstanceUID); give each patient a folder"


def _refuse_frames(where: Path, headers: Sequence[Header], slices: Sequence[Slice]) -> None:
    """Refuse files of several frames that are no volume."""
    several = [header for header in headers if max(len(header.frames), header.number("NumberOfFrames", 1)) > 1]
    if not several:
        return
    name = several[0].path.name
    frames = several[0].number("NumberOfFrames", 1)
    if len(headers) > 1:
        raise VolumeError(
            f"{where}: {len(several)} of the {len(headers)} files of the series have several frames each, such as "
            f"{name}; give one of them, or a series of one file per slice"
        )
    if len(several[0].frames) != frames:
        if several[0].frames:
            raise VolumeError(
                f"{where}: {name} has {frames} frames and describes {len(several[0].frames)}; export it again"
            )
        raise VolumeError(
            f"{where}: {name} has {frames} frames whose places it does not tell, such as a film; it is read as no "
            "volume, export a series of slices or a NIfTI file"
        )
    scales = {(piece.values.get("RescaleSlope"), piece.values.get("RescaleIntercept")) for piece in slices}
    if len(scales) > 1:
        raise VolumeError(
            f"{where}: the frames of {name} have scales of their own (RescaleSlope); export them as one file per slice"
        )


def _refuse_without_geometry(where: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices whose place or size in millimetres nobody can know."""
    unknown = [piece for piece in slices if piece.spacing is None]
    if unknown:
        detector = unknown[0].values.get("ImagerPixelSpacing")
        told = ", only an ImagerPixelSpacing, which is that of the detector" if detector else ""
        raise VolumeError(
            f"{where}: {_share(unknown, slices)} no PixelSpacing above 0{told}; the size of a pixel is not known, "
            "export the original images, or NIfTI with the true size"
        )
    unknown = [piece for piece in slices if piece.position is None or piece.directions is None]
    if unknown:
        lacking = "ImagePositionPatient" if unknown[0].position is None else "ImageOrientationPatient"
        raise VolumeError(
            f"{where}: {_share(unknown, slices)} no {lacking}, as screenshots and radiographs; order and distance of "
            "the slices are not known, export the original images"
        )


def _share(some: Sequence[Slice], of: Sequence[Slice]) -> str:
    """The beginning of a sentence about some of the slices."""
    if len(some) == len(of):
        return "the images have"
    return f"{len(some)} of {len(of)} images, such as {some[0].header.path.name}, have"


def _refuse_other_sizes(where: Path, ordered: Sequence[Slice]) -> None:
    """Refuse slices whose pixels have several sizes in millimetres."""
    sizes = np.array([piece.spacing for piece in ordered])
    spread = sizes.max(axis=0) - sizes.min(axis=0)
    if (spread > SAME_PLACE * sizes.min(axis=0)).any():
        raise VolumeError(
            f"{where}: pixels of the slices go from {sizes.min():g} to {sizes.max():g} mm; give the slices of one scan"
        )


def _refuse_shared_places(where: Path, ordered: Sequence[Slice]) -> None:
    """Refuse several slices at one place; their pixels differ, since equal ones were left out before."""
    places = places_of(ordered)
    shared = [group for group in places if len(group) > 1]
    if not shared:
        return
    share = "each place" if len(shared) == len(places) else f"{len(shared)} of {len(places)} places"
    found = _difference(shared)
    if found is None:
        first, second = (piece.header.path.name for piece in shared[0][:2])
        raise VolumeError(
            f"{where}: {len(ordered)} slices lie at {len(places)} places, such as {first} and {second} at one, whose "
            "contents differ, and the headers do not say why; keep one of each"
        )
    keyword, kind, values = found
    shown = ", ".join(plain_text(value)[:32] for value in values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")
    shown = "" if keyword.endswith("UID") else f" {shown}"  # identifiers tell nobody anything
    raise VolumeError(
        f"{where}: {len(values)} {kind} lie at {share} ({keyword}{shown}); a case is one volume, so export each as a "
        "series of its own"
    )


def _difference(shared: Sequence[Sequence[Slice]]) -> tuple[str, str, list[str]] | None:
    """The element that tells slices at one place apart, what it counts, and its values; None if there is none."""
    partly = None
    for keyword, kind in DIFFERENCES:
        kinds = [[piece.values.get(keyword, "") for piece in group] for group in shared]
        values = sorted({value for group in kinds for value in group}, key=_as_number)
        if len(values) < 2 or any(len(set(group)) < 2 for group in kinds):
            continue
        if all(len(set(group)) == len(group) for group in kinds) and len(values) <= max(map(len, kinds)):
            return keyword, kind, values
        partly = partly or (keyword, kind, values)
    return partly


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return 0.0, text


def _refuse_gaps(where: Path, ordered: Sequence[Slice]) -> None:
    """Refuse slices that do not lie evenly on a line."""
    positions = np.array([piece.position for piece in ordered])
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    spacing = float(np.linalg.norm(positions[-1] - positions[0])) / len(gaps)
    even = np.linspace(positions[0], positions[-1], len(positions))
    if abs(gaps - spacing).max() <= MAX_UNEVENNESS * spacing and np.linalg.norm(positions - even, axis=1).max() <= max(
        0.5 * spacing, LEAST_DISTANCE
    ):
        return
    usual = float(np.median(gaps))
    least = float(gaps.min())
    if _slices_lost(gaps, least, ordered):
        wide = np.nonzero(gaps > 1.5 * least)[0]
        pairs = [f"{ordered[at].header.path.name} and {ordered[at + 1].header.path.name}" for at in wide]
        more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
        lost = int(np.sum(np.round(gaps[wide] / least) - 1))
        raise VolumeError(
            f"{where}: {lost} slices are missing, between {pairs[0]}{more} (slices {wide[0] + 1} and {wide[0] + 2} of "
            f"{len(ordered)} lie {gaps[wide[0]]:.2f} mm apart, others {least:.2f} mm); add them"
        )
    if abs(gaps - spacing).max() <= MAX_UNEVENNESS * spacing:
        raise VolumeError(f"{where}: the slices do not lie on a line; give the slices of one stack")
    at = int(np.argmax(abs(gaps - gaps[0]) > MAX_UNEVENNESS * usual))
    raise VolumeError(
        f"{where}: gaps between slices vary from {least:.2f} to {gaps.max():.2f} mm, first at slice {at + 1} of "
        f"{len(ordered)}; resample the volume to even slices and give it as NIfTI, or give one part of it"
    )


def _slices_lost(gaps: np.ndarray, least: float, ordered: Sequence[Slice]) -> bool:
    """Whether gaps look like lost slices, and not like a protocol whose slices lie closer in one part.

    Lost slices leave gaps that are multiples of the others, and jumps in the numbers of the images where the gaps are.
    Where images are numbered without jumps, a run of wide gaps up to an end is a part of a protocol.
    """
    times = gaps / least
    whole = np.round(times)
    if (abs(times - whole) > MAX_UNEVENNESS * whole).any() or len(gaps) < 2:
        return False
    wide = whole > 1
    numbers = np.array([piece.header.number("InstanceNumber", -1) for piece in ordered])
    steps = abs(np.diff(numbers))
    if len(set(numbers.tolist())) == len(numbers) and numbers.min() >= 0 and (steps[wide] > steps[~wide].max()).all():
        return True
    at = np.nonzero(wide)[0]
    run = at[-1] - at[0] + 1 == len(at) and (at[0] == 0 or at[-1] == len(gaps) - 1)
    return not (run and len(at) > 1) and len(at) <= max(1, len(gaps) // 3)
