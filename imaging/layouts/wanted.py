"""What is asked of a layout, and the checks that layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ..case_files import CaseFiles, Found, ImageFile, LabelFile, Unusable, printable

ANY_IMAGE, ANY_LABEL = "image", "label"  # the default keys, which choose nothing
UNLABELLED_CASE = "has no label map, so it counts as unlabelled"
LABEL_WITHOUT_IMAGE = "looks like a label map, and no image has its name"
LABEL_UNWANTED = "looks like a label map"


@dataclass(frozen=True)
class Wanted:
    """Which files of a data set are wanted.

    Attributes:
        keys: of the images, one for each channel; ("image",) leaves the choice to the layout.
        label_key: of the label maps; "label" leaves the choice to the layout, None wants none.
        fill_missing: whether a case that lacks some of several channels is a case all the same.
    """

    keys: tuple[str, ...] = (ANY_IMAGE,)
    label_key: str | None = ANY_LABEL
    fill_missing: bool = False

    @property
    def any_image(self) -> bool:
        """Whether no image was chosen."""
        return self.keys == (ANY_IMAGE,)

    @property
    def chosen_label(self) -> str | None:
        """The key of the label maps that was chosen, or None."""
        return None if self.label_key == ANY_LABEL else self.label_key

    def over(self) -> str:
        """Why a file that looks like a label map is no label of a case."""
        return LABEL_UNWANTED if self.label_key is None else LABEL_WITHOUT_IMAGE


def refuse_missing(where: Path, channels: Mapping[str, ImageFile | None], *, fill_missing: bool) -> None:
    """Raises: Unusable if a case lacks some of its channels and they are not to be filled."""
    missing = [key for key, image in channels.items() if image is None]
    if missing and not fill_missing:
        raise Unusable(
            f"{where}: has no channel {', '.join(missing)}; add the files, or fill them with background "
            "(--missing-channels fill)"
        )


def add_case(found: Found, name: str, channels: Mapping[str, ImageFile | None], labels: tuple[LabelFile, ...]) -> None:
    """Add a case, or its name to those without an image."""
    if any(channels.values()):
        found.cases.append(CaseFiles(printable(name), tuple(channels.values()), labels))
    else:
        found.without_image.append(printable(name))
        found.passed_over.update({label.path: LABEL_WITHOUT_IMAGE for label in labels})


def set_shared_labels_apart(found: Found) -> None:
    """Make cases that would share a label map problems: it can be of one of them only."""
    users: dict[Path, list[CaseFiles]] = {}
    for case in found.cases:
        for label in case.labels:
            users.setdefault(label.path, []).append(case)
    for path, cases in users.items():
        if len(cases) > 1:
            names = " and ".join(case.name for case in cases[:2])
            text = f"{path}: may be the label map of {names}; give it the name of one"
            found.problems.update({case.name: text for case in cases})
    found.cases = [case for case in found.cases if case.name not in found.problems]


def remark_unlabelled(found: Found) -> None:
    """Name the cases without a label map, if others have one."""
    if any(case.labels for case in found.cases):
        found.remarks.update({case.name: UNLABELLED_CASE for case in found.cases if not case.labels})


def ask_for_image(source: Path, what: str, keys: list[str]) -> UsageError:
    """The question which of several images of each case is meant."""
    return UsageError(
        f"{source}: {what} has several images of a case: {', '.join(keys)}; choose by image_key, such as {keys[0]}, or "
        f"several, such as {','.join(keys[:2])}, for images of several channels"
    )
