"""The settings of a site's preparation, and how another site's slice format is adopted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ...common.json_text import read_json
from ...common.names import check_name
from ...errors import ConfigError, StoreError, UsageError
from ...imaging.case_files import NAN, check_reading
from ...imaging.centre_table import CentreSource
from ...imaging.class_names import check_names
from ...imaging.formats.label_values import LabelValues, parse_label_values
from ...imaging.patients import check_pattern
from ...imaging.slice_choices import COMPATIBILITY, CROPS, PLANES
from ...imaging.slice_format import SliceFormat
from .patient_split import SPLITS

LABEL_KINDS = ("dense", "scribble", "point", "box", "block", "image", "gaze", "none")
NEEDS_UNLABELLED = ("scribble", "point", "block")
FORMAT_FILE = "format.json"
# Stores may be mixed or extended only where these agree.
AGREED = ("size", "z_bins", "plane", "crop", "compatibility", "content")
COLOURS = ("grey", "colour")
# What only volumes have, with the values that mean that nobody asked for it.
OF_VOLUMES: dict[str, object] = {
    "spacing": None,
    "field_of_view": None,
    "slice_spacing": None,
    "centres": None,
    "mask_key": None,
    "compatibility": "none",
    "label_values": None,
    "frames": None,
    "nan": None,
}


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """Settings of a store beside its slice format; the kind of labels is not among them, for runs may differ in it.

    Attributes:
        domain: name of the site's scanner, modality or organ.
        mask_key: modality folder of the masks; None without masks.
        mask_as_class: whether label 1 is the mask.
        channels: modality folders or numbers of the channels, in their order; empty for one channel.
        label_values: class of each value in label maps, see `LabelValues.text`; empty where values are class numbers.
    """

    domain: str
    mask_key: str | None
    mask_as_class: bool
    channels: tuple[str, ...] = ()
    label_values: str = ""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How one site's images become slices. Raises: ConfigError or UsageError if a value makes no sense.

    Attributes:
        domain: name of the site's scanner, modality or organ, as in the factory's configuration.
        size: pixels per side of the slices.
        z_bins: number of height bins.
        spacing: millimetres per pixel; default: the site's median, or as much as the widest volume needs to fit.
        field_of_view: millimetres per side of the slices, instead of `spacing`, which is then field_of_view / size.
        centres: the place of each case that is in the middle of its slices, from a table or a localiser; default: the
            middle of what `crop` leaves.
        slice_spacing: millimetres from slice to slice; default: as acquired.
        plane: what a slice shows, see `fedfactory.imaging.volumes.orientation`.
        crop: "air" or "none".
        window: standardised intensities shown as -1 and 1, of all channels or a pair for each; default: 0.1 % and
            99.9 % of the site's voxels.
        compatibility: "published" prepares as the published program did, its errors included.
        image_key: modality folder of the images; a channel number for an nnU-Net data set. Several, separated by
            commas, make images of several channels; "image" takes all channels of an nnU-Net data set.
        fill_missing: whether a channel that a case lacks is filled with background; otherwise the case is left out.
        series: of several DICOM series in a folder, the one to use, see `fedfactory.imaging.cases.find_cases`. As
            `fill_missing`, it is none of the store's settings: runs may differ in it.
        label_key: modality folder of the labels.
        mask_key: modality folder of the masks.
        mask_as_class: label 1 is the mask, structures follow from 2 (the published order).
        label_kind: one of LABEL_KINDS; "none" does not read labels.
        unlabelled_value: value of the voxels that nobody annotated, in sparse label maps; a value of the file, which
            `label_values` need not name.
        label_values: class of each value in label maps of volumes; default: values are class numbers.
        frames: "each", "first" or the number of a frame, of files that hold several volumes, see `choose_reading`;
            default: such files are refused.
        nan: "background" gives NaN and infinite voxels the lowest finite value, "refuse" makes them errors; default:
            as the store, or refuse.
        classes: label values including background; higher ones are refused. Default: up to 254.
        class_names: name of each label value. Labels in DICOM are matched by these names.
        mask_colours: label of each colour or grey level of the masks of pictures, see
            `fedfactory.imaging.pictures.colour_table`.
        colour: "colour" gives pictures three channels, "grey" one; default: three if a picture of
            the site has colours.
        max_pixels: of a picture that is read; default: 100 million.
        content: "volumes" or "pictures", see `for_pictures`.
        patients: patient of each case by name; default: by `patient_pattern`.
        patient_pattern: regular expression that finds the patient in a case's name; default: its beginning up to the
            first digits, or the DICOM headers.
        validation_share: share of the patients held out for validation, in [0, 1).
        test_share: share of the patients held out for testing, in [0, 1); the other patients are for training.
        exclude: names of cases to leave out.
        split: part of the split that all patients of this run belong to; default: drawn by the shares.
        seed: of the split.
    """

    domain: str
    size: int = 256
    z_bins: int = 29
    spacing: float | None = None
    field_of_view: float | None = None
    centres: CentreSource | None = None
    slice_spacing: float | None = None
    plane: str = "axial"
    crop: str = "air"
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    compatibility: str = "none"
    image_key: str = "image"
    fill_missing: bool = False
    series: str | None = None
    label_key: str = "label"
    mask_key: str | None = None
    mask_as_class: bool = False
    label_kind: str = "dense"
    unlabelled_value: int | None = None
    label_values: LabelValues | None = None
    frames: str | None = None
    nan: str | None = None
    classes: int | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    mask_colours: Mapping[int | tuple[int, int, int], int] | None = None
    colour: str | None = None
    max_pixels: int | None = None
    content: str = "volumes"
    patients: Mapping[str, str] | None = None
    patient_pattern: str | None = None
    validation_share: float = 0.15
    test_share: float = 0.15
    exclude: tuple[str, ...] = ()
    split: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("domain", self.domain)
        for name, choices in (
            ("label_kind", LABEL_KINDS),
            ("plane", PLANES),
            ("crop", CROPS),
            ("compatibility", COMPATIBILITY),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(filter(None, choices))}")
        if self.split not in (None, *SPLITS):
            raise UsageError(f"split is '{self.split}'; choose one of {', '.join(SPLITS)}, or none to draw it")
        self._check_numbers()
        self._check_labels()
        check_names(self.class_names)
        check_reading(self.frames, self.nan)
        check_pattern(self.patient_pattern)
        if self.patients is not None and self.patient_pattern is not None:
            raise UsageError(f"patient_pattern is '{self.patient_pattern}', but there is a table of patients; give one")

    def _check_numbers(self) -> None:
        for name in ("size", "z_bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("spacing", "field_of_view", "slice_spacing"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 mm")
        if self.spacing is not None and self.field_of_view is not None:
            raise UsageError(
                f"spacing is {self.spacing:g} and field_of_view is {self.field_of_view:g} mm; give one of them, for "
                "pixels are field_of_view / size millimetres"
            )
        for name in ("validation_share", "test_share"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.validation_share + self.test_share >= 1:
            raise ConfigError(
                f"validation_share is {self.validation_share} and test_share {self.test_share}; choose them so that "
                "patients remain for training"
            )
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigError(f"max_pixels is {self.max_pixels}; it must be at least 1")
        if self.classes is not None and not 2 <= self.classes <= 255:
            raise ConfigError(f"classes is {self.classes}; choose 2 to 255, background included")

    def _check_labels(self) -> None:
        if self.label_kind in NEEDS_UNLABELLED and self.unlabelled_value is None:
            raise UsageError(
                f"label_kind is '{self.label_kind}'; give unlabelled_value, the value of pixels that nobody annotated"
            )
        if self.unlabelled_value is not None and not self.sparse:
            raise UsageError(
                f"unlabelled_value is {self.unlabelled_value}, but label_kind is '{self.label_kind}', which has no "
                "unlabelled value; leave it out"
            )
        if self.mask_as_class and self.mask_key is None:
            raise UsageError("mask_as_class is True, but there is no mask; give mask_key too")
        if self.mask_as_class and self.label_kind != "dense":
            raise UsageError(f"mask_as_class is True, but label_kind is '{self.label_kind}'; it must be dense")
        if self.mask_as_class and self.label_values is not None:
            raise UsageError("mask_as_class is True, which numbers the classes anew; leave label_values out")

    @property
    def sparse(self) -> bool:
        """Whether label maps have voxels that nobody annotated. A box without such a value annotates every voxel."""
        return self.label_kind in NEEDS_UNLABELLED or (self.label_kind == "box" and self.unlabelled_value is not None)

    @property
    def label_rule(self) -> str:
        """How values or colours in label files are read: equal for settings that read them alike, and "" by default."""
        given: tuple[object, ...] = self.unlabelled_value, sorted(map(str, (self.mask_colours or {}).items()))
        given += () if self.label_values is None else (self.label_values.text,)
        return (
            hashlib.sha256(str(given).encode()).hexdigest()[:16]
            if any(part not in (None, []) for part in given)
            else ""
        )

    @property
    def pixel(self) -> float | None:
        """Millimetres per pixel that were asked for, as `spacing` or by `field_of_view`; None leaves it to the site."""
        return self.spacing if self.field_of_view is None else self.field_of_view / self.size

    def for_pictures(self) -> PrepareConfig:
        """These settings for a folder of pictures, each of which is a case of one slice in one height bin.

        Raises: UsageError if something is asked for that only volumes have.
        """
        for name, unasked in OF_VOLUMES.items():
            if getattr(self, name) != unasked:
                raise UsageError(f"{name} is '{getattr(self, name)}', but the folder holds pictures; leave it out")
        return replace(self, content="pictures", z_bins=1, plane="stored", crop="none")

    def windows(self, channels: int) -> tuple[tuple[float, float], ...] | None:
        """The intensity window of each channel that was asked for; None leaves it to the site."""
        if not self.window:
            return None
        return tuple(self.window) if isinstance(self.window[0], tuple) else (self.window,) * channels

    def like(self, path: str | Path) -> PrepareConfig:
        """These settings with another site's slice format; of the same domain also with its intensity window.

        Args:
            path: `format.json` of a store, which holds nothing of any patient, or the store.

        Raises: UsageError or StoreError if there is no such file, it is damaged, or has another field of view than
            these settings ask for.
        """
        path = Path(path)
        path = path / FORMAT_FILE if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"{path}: no such file; every store made by `fedfactory prepare` holds a {FORMAT_FILE}")
        try:
            content = read_json(path)
            fmt, domain = SliceFormat.from_dict(content["format"]), content["domain"]
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise StoreError(f"{path}: not a slice format ({error}); give the {FORMAT_FILE} of a store") from None
        if self.field_of_view is not None and not math.isclose(self.field_of_view, fmt.field_of_view, rel_tol=1e-6):
            raise UsageError(
                f"field_of_view is {self.field_of_view:g} mm, but the slices of {path} show {fmt.field_of_view:g} mm; "
                "leave field_of_view out, it is taken over"
            )
        agreed: dict[str, object] = {name: getattr(fmt, name) for name in AGREED}
        if fmt.pictures:
            agreed["colour"] = "colour" if fmt.colour else "grey"
        else:
            agreed |= {"spacing": fmt.spacing, "slice_spacing": fmt.slice_spacing, "field_of_view": None}
        own = domain == self.domain and not fmt.colour  # colours have the same window everywhere
        return replace(self, **agreed, window=fmt.window if own else self.window)

    @property
    def site(self) -> SiteSettings:
        """What a store records besides the slice format."""
        keys = tuple(key.strip() for key in self.image_key.split(","))
        return SiteSettings(
            domain=self.domain,
            mask_key=self.mask_key,
            mask_as_class=self.mask_as_class,
            channels=keys if len(keys) > 1 else (),
            label_values="" if self.label_values is None else self.label_values.text,
        )

    def adopting(self, fmt: SliceFormat, site: SiteSettings) -> PrepareConfig:
        """These settings, where they leave something out, with what a store has."""
        there = parse_label_values(site.label_values) if site.label_values else None
        return replace(self, label_values=self.label_values or there, nan=self.nan or fmt.nan)

    def refuse_other(self, fmt: SliceFormat, site: SiteSettings, where: Path) -> None:
        """Raises: UsageError if a store made with `fmt` and `site` cannot be extended with these settings."""
        pairs = [(name, getattr(self, name), getattr(fmt, name)) for name in AGREED]
        # Other label values make the labels anew, see `prepare`.
        pairs += [(name, v, getattr(site, name)) for name, v in asdict(self.site).items() if name != "label_values"]
        if fmt.nan != NAN[0]:  # the other way round, the store's cases have no such voxels
            pairs.append(("nan", self.nan, fmt.nan))
        chosen: dict[str, object] = {
            "spacing": self.pixel,
            "slice_spacing": self.slice_spacing,
            "window": self.windows(fmt.channels),
        }
        pairs += [(name, wanted, getattr(fmt, name)) for name, wanted in chosen.items() if wanted is not None]
        if self.colour is not None:
            pairs.append(("colour", self.colour == "colour", fmt.colour))
        other = [f"{name} is {there}, not {wanted}" for name, wanted, there in pairs if wanted != there]
        if other:
            raise UsageError(f"{where}: was prepared otherwise ({'; '.join(other)}); choose another folder")
