"""Options that several commands share, each described once; their values are checked before PyTorch is loaded."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from ..adaptation.choices import ENGINES, NETWORK_SIZES, PRECISIONS
from ..adaptation.network_names import NETWORKS
from ..common.files import require_weights
from ..errors import ConfigError, UsageError

if TYPE_CHECKING:
    from ..imaging.centre_table import CentreSource
    from ..imaging.formats.label_values import LabelValues

MISSING_CHANNELS = ("refuse", "fill")
DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(?::(\d{1,3}))?", re.ASCII)


def listed(choices: Collection[str]) -> str:
    """The choices as "a, b or c"."""
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last


def one_of(choices: Collection[str]) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A callback of an option that accepts these names alone; an option that was left out stays as it is."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise ConfigError(f"{param.name} is '{value}'; choose {listed([name for name in choices if name])}")
        return value

    return check


def more_than(lowest: float) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """A callback of an option whose number must be above `lowest`."""

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not value > lowest:
            raise ConfigError(f"{param.name} is {value}; choose a number above {lowest:g}")
        return value

    return check


def _check_device(value: str) -> str:
    """A device that PyTorch has on this machine, with the number as PyTorch writes it."""
    found = DEVICE.fullmatch(value)
    if not found:
        raise ConfigError(f"device is '{value}'; choose cpu, cuda, or cuda:N for the GPU with number N")
    if value == "cpu":
        return value
    import torch  # only now: the check of any other device needs it, and --help does not

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old for this PyTorch
        try:
            count = _number_of_devices(torch, found[1] or value)
        except Exception:  # half-installed drivers raise whatever they like
            count = 0
    if not count:
        raise ConfigError(f"device is '{value}'; PyTorch finds no such device on this machine, choose cpu")
    if found[2] is None:
        return value
    if (number := int(found[2])) >= count:
        raise ConfigError(f"device is '{value}'; this machine has {count}, with numbers from 0 to {count - 1}")
    return f"{found[1]}:{number}"


def _number_of_devices(torch: ModuleType, kind: str) -> int:
    """How many devices of a kind, "cuda", "xpu" or "mps", PyTorch can use."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    backend = getattr(torch, kind)
    return backend.device_count() if backend.is_available() else 0


# What every kind of command has.
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random draws; the same seed repeats a run.")]
Device = Annotated[str, typer.Option(callback=_check_device, help="Device that computes: cpu, cuda, or cuda:N.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of cases that are processed at once; default: one per core.")
]

# The slice store of a site.
Store = Annotated[Path, typer.Option(help="The site's slice store, made by `fedfactory prepare`.")]
NewStore = Annotated[Path, typer.Option(help="Slice store: a new folder, or a store that is extended.")]
DomainOfStore = Annotated[str, typer.Option(help="Name of the site's domain: its scanner, modality or organ.")]
ZBins = Annotated[int, typer.Option(min=1, help="Number of height bins; the same as that of the factory.")]
PatientPattern = Annotated[
    str | None, typer.Option(help="Regular expression that finds the patient's identifier in the name of a case.")
]
ImageKey = Annotated[
    str,
    typer.Option(
        help="Modality folder of the images, or channel number of an nnU-Net data set; several, separated by commas, "
        "make images of several channels. Of an nnU-Net data set, image takes all channels."
    ),
]
MissingChannels = Annotated[
    str,
    typer.Option(
        callback=one_of(MISSING_CHANNELS),
        help="What becomes of an image that lacks some of several channels: refuse names it and does not use it, fill "
        "makes the channel background.",
    ),
]
Series = Annotated[
    str | None,
    typer.Option(
        help="Which of several DICOM series in a folder is the image: largest, or the description or UID of a series; "
        "* stands for other signs."
    ),
]
Frames = Annotated[
    str | None,
    typer.Option(
        help="Of files that hold several volumes, such as a cine: each makes every frame a case of its patient, first "
        "or a number (from 1) takes one frame. Default: such files are refused."
    ),
]
Nan = Annotated[
    str | None,
    typer.Option(
        help="NaN and infinite voxels: background gives them the lowest finite value of their image, refuse names the "
        "case and does not use it. Default: as the store or model has it, or refuse."
    ),
]
LabelValuesOption = Annotated[
    str | None,
    typer.Option(
        "--label-values",
        help="Class of each value in label maps, such as 205=1,420=2 or 255=1, or a JSON file; *=0 makes all other "
        "values background. Default: values are class numbers.",
    ),
]
LabelKey = Annotated[str, typer.Option(help="Modality folder of the label maps or tables.")]
MaskColours = Annotated[
    Path | None,
    typer.Option(
        help="Table of the labels of pictures' masks by colour or grey level: columns R,G,B,CLASS or VALUE,CLASS, and "
        "NAME if the classes have names."
    ),
]

# Where the slices of small organs are cut.
Centres = Annotated[
    Path | None,
    typer.Option(
        help="Table of places to cut around, instead of the body's centre: columns case,x,y,z (scanner millimetres) or "
        "case,i,j,k (voxels)."
    ),
]
LocaliserFile = Annotated[
    Path | None,
    typer.Option("--localiser", help="Localiser or labelled factory with one: finds the places, instead of a table."),
]


def radians(degrees: float | None) -> float | None:
    """An angle that a user gave in degrees, if any."""
    return None if degrees is None else math.radians(degrees)


def label_values_of(text: str | None) -> LabelValues | None:
    """The classes of label values that an option gives, if any. Raises: UsageError if it has another form."""
    if text is None:
        return None
    from ..imaging.formats.label_values import parse_label_values

    return parse_label_values(text)


def centre_source(centres: Path | None, localiser: Path | None) -> CentreSource | None:
    """What gives the places around which slices are cut: a table or a localiser; None for neither.

    Raises: UsageError if both are given, or a file cannot be used.
    """
    if centres is not None and localiser is not None:
        raise UsageError(f"centres is {centres} and `localiser` is {localiser}; give one of them")
    if centres is not None:
        from ..imaging.centre_table import read_centre_table

        return read_centre_table(centres)
    if localiser is not None:
        require_weights(localiser, "labelled factory", "segmenter")
        from ..adaptation.localiser import load_localiser  # imports PyTorch, which no table needs

        return load_localiser(localiser)
    return None


# The nodes of a federation.
Researcher = Annotated[Path, typer.Option(help="Folder of the Fed-BioMed researcher component.")]
NodeFolder = Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed node.")]
ProbeTimeout = Annotated[
    float, typer.Option(callback=more_than(0), help="Seconds to wait for each step of a connection.")
]
Tag = Annotated[str, typer.Option(help="Tag under which the sites registered their data.")]
MinNodes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of nodes to wait for, and of answers that a round needs. "
        "Default of `train`: one node per domain, and two answers; of `train-segmenter`: one. With --resume: for the "
        "rounds that are left.",
    ),
]
NodeTimeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for the sites' nodes to connect.")]
ApprovalTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for the sites' administrators to approve the training plan.")
]
RoundTimeout = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds after which a round ends without the sites that have not answered."),
]
Rounds = Annotated[int, typer.Option(min=1, help="Number of rounds: how often the sites' weights are averaged.")]
UpdatesPerRound = Annotated[int, typer.Option(min=1, help="Optimizer steps of a site in each round.")]

# The factory.
FactoryOut = Annotated[Path, typer.Option(help="Factory file to write, .safetensors.")]
LabelledFactoryFile = Annotated[Path, typer.Option("--factory", help="Labelled factory, made by `fedfactory label`.")]
Classes = Annotated[int | None, typer.Option(help="Number of label values, background included; only checked.")]
Encoder = Annotated[
    str, typer.Option(help="Image encoder: the name of an open_clip architecture, local-dir:FOLDER, or timm:NAME.")
]

# The adaptation of a segmenter.
Engine = Annotated[
    str,
    typer.Option(
        callback=one_of(ENGINES), help="What is trained: a segmenter, or a translator (published; needs the factory)."
    ),
]
Network = Annotated[
    str,
    typer.Option(
        callback=one_of(NETWORKS), help=f"Network of the segmenter: {listed(NETWORKS)}; those with 3d read volumes."
    ),
]
Updates = Annotated[int | None, typer.Option(min=1, help="Number of optimizer steps; default: as the engine needs.")]
# The plan of a segmenter: what is left out follows from the data.
NetworkSize = Annotated[
    str,
    typer.Option(
        "--size-of-network",
        callback=one_of(NETWORK_SIZES),
        help=f"{listed(NETWORK_SIZES)}: 16, 24 or 32 channels in the first level.",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(callback=more_than(0), help="Minutes of training on this machine, in place of --updates."),
]
Width = Annotated[int | None, typer.Option(min=4, help="Channels of the network's first level.")]
Depth = Annotated[int | None, typer.Option(min=3, help="Number of the network's resolution levels.")]
LearningRate = Annotated[float | None, typer.Option(callback=more_than(0), help="Largest learning rate.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows per update.")]
Memory = Annotated[float, typer.Option(callback=more_than(0), help="GiB that the training may take.")]
Rotation = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=180,
        help="Largest random angle, degrees; default: small where labels show that patients lie alike.",
    ),
]
Precision = Annotated[
    str, typer.Option(callback=one_of(PRECISIONS), help=f"Precision of the network: {listed(PRECISIONS)}.")
]
Volumes = Annotated[int, typer.Option(min=1, help="Number of synthetic subjects that are drawn from the factory.")]
OneTargetSlice = Annotated[
    bool, typer.Option("--one-target-slice", help="Train also on one labelled slice of each labelled case of the site.")
]
