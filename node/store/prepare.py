"""Volumes or pictures to a slice store: one orientation, one size, one intensity window per channel and site.

A run has four passes over the cases, each in parallel and with one image in memory per worker: survey (what is there),
cut (slices, kept in a working folder), count (the site's intensity window), write (the store's arrays). The store's
index comes last. The next run uses what a killed run has cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TypeVar

import numpy as np

from ... import __version__
from ...common.fault_log import unforeseen
from ...common.memory import keep_freed_memory, nothing_old_collected
from ...common.progress import track
from ...common.threads import one_thread_each, quick_turns
from ...errors import FedFactoryError, StoreError, UsageError, VolumeError
from ...imaging.accounting.account import Accounting, Wanted, account_for
from ...imaging.archive.pseudonyms import Pseudonyms
from ...imaging.case_files import CaseFiles, Found, printable
from ...imaging.cases import find_cases
from ...imaging.class_names import refuse_other_names, united_names
from ...imaging.formats.frames import choose_reading
from ...imaging.patients import unused_tables
from ...imaging.pictures.picture_image import is_picture_file
from ...imaging.slice_format import (
    WINDOW_BINS,
    SliceFormat,
    count_intensities,
    intensity_window,
    z_bins_of,
)
from .case_slices import CaseSlices, Survey, digest_of
from .case_slices import cut as cut_volume
from .case_slices import survey as survey_volume
from .patient_split import split_patients
from .prepare_config import PrepareConfig
from .quality_page import import_drawing
from .slice_centres import is_centred, rows_without_case
from .slice_store import FORMAT_VERSION, INDEX, Case, SliceStore, StoreIndex, checksum
from .store_format import channel_range, fitting_format
from .store_warnings import store_warnings
from .store_writer import (
    CUT_LAYOUT,
    CutCase,
    StoreArrays,
    commit,
    describe_case,
    made_from_slices,
    tidy,
    update_index,
    working_folder,
)

T = TypeVar("T")
R = TypeVar("R")
Surveyor = Callable[[CaseFiles, PrepareConfig], Survey]
Cutter = Callable[..., CaseSlices]  # see `case_slices.cut`


@dataclass
class Preparation:
    """What a run did.

    Attributes:
        store: the store as it is now.
        failed: name of an unusable case, and the reason in one line.
        remarks: what the folder holds beside its cases, by file or case, each in one line.
        added: number of new cases.
        replaced: number of cases whose files have changed.
        unchanged: number of cases whose files have not changed.
        kept: number of cases of the store that the source does not have.
        accounting: what became of every entry of the source.
        outdated: commands whose results were of the slices before, and were removed.
    """

    store: SliceStore
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    kept: int = 0
    accounting: Accounting = field(default_factory=Accounting)
    outdated: tuple[str, ...] = ()


class NoUsableCase(VolumeError):
    """Not one case of a folder can be used.

    Attributes:
        failed: name of a case, and the reason in one line.
        accounting: what became of every entry of the folder.
    """

    def __init__(self, failed: dict[str, str], accounting: Accounting) -> None:
        first = next(iter(failed.values()), "every case was excluded")
        super().__init__(f"not one of {len(failed)} cases can be used; the first: {first}")
        self.failed, self.accounting = failed, accounting


def prepare(source: str | Path, out: str | Path, config: PrepareConfig, *, workers: int = 1) -> Preparation:
    """Prepare one site's images, or add to a store what is new in their folder.

    Args:
        source: folder of volumes or pictures, see `find_cases`.
        out: store folder. A store that is there is extended with its own slice format and intensity window: cases
            whose files have not changed are skipped, changed ones replaced, others kept.
        config: how slices are made.
        workers: images worked on at once.

    Returns: the store and what became of each case; cases that cannot be used are left out and named.
    Raises:
        UsageError: a wrong request, no case in `source`, `out` holds something else or was prepared otherwise.
        VolumeError: not one case can be used.
        OSError: the disk is full or broken; what was cut so far is used by the next run.
    """
    found = find_cases(
        Path(source),
        image_key=config.image_key,
        label_key=None if config.label_kind == "none" else config.label_key,
        mask_key=config.mask_key,
        fill_missing=config.fill_missing,
        series=config.series,
    )
    if any(is_picture_file(file) for case in found.cases for file in case.channels):
        config = config.for_pictures()
    found.number_classes(config.class_names)
    config = replace(config, class_names={**found.class_names, **config.class_names})
    if config.patients is None and config.patient_pattern is None and os.path.isdir(source):
        subjects = [case.subject or case.name for case in found.cases]
        tables = unused_tables(Path(source), subjects, used=(path for case in found.cases for path in case.files))
        text = "names a patient for each case, but is not used; give it by --patients, if that is what it is"
        found.remarks.update({printable(name): text for name in tables})
    return prepare_cases(found, out, config, workers=workers, source=source)


def prepare_cases(
    found: Found,
    out: str | Path,
    config: PrepareConfig,
    *,
    source: str | Path,
    workers: int = 1,
    survey: Surveyor = survey_volume,
    cut: Cutter = cut_volume,
) -> Preparation:
    """`prepare` for cases that were found already.

    Args:
        source: the folder in which they were found, whose entries are accounted for.
        survey, cut: what a case is, and its slices; default: of volumes and pictures.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; it must be at least 1")
    out = Path(out)
    keep_freed_memory()
    with working_folder(out) as work, one_thread_each(), quick_turns(), nothing_old_collected():
        return _Run(out, work, config, workers=workers, survey=survey, cut=cut).extend(found, Path(source))


class _Run:
    """One run of `prepare` on one store."""

    def __init__(
        self, out: Path, work: Path, config: PrepareConfig, *, workers: int, survey: Surveyor, cut: Cutter
    ) -> None:
        self.out, self.work, self.config, self.workers = out, work, config, workers
        self.survey, self.cut = survey, cut
        self.store = SliceStore(out) if (out / INDEX).exists() else None
        if self.store is None and config.split == "test":
            raise UsageError("split is 'test', but a new store needs training cases first, which set its format")
        if self.store is not None:
            self.config = config.adopting(self.store.format, self.store.site)
            self.config.refuse_other(self.store.format, self.store.site, out)
        self.failed: dict[str, str] = {}

    def extend(self, everything: Found, source: Path) -> Preparation:
        choose_reading(everything, frames=self.config.frames, nan=self.config.nan)
        asked = [case for case in everything.cases if case.name not in self.config.exclude]  # single frames
        found = replace(everything, cases=asked)
        self.failed = {name: _one_line(problem) for name, problem in found.problems.items()}
        stored = self.store.cases if self.store else []
        patients = {case.name: case.patient for case in stored}
        names, own = Pseudonyms(self.out, self.work, patients.values()), (self.config.patients or {}).values()
        self.names = names
        renamed = names.instead_of_digests(patients, own=own, pattern=self.config.patient_pattern)
        old = {case.name: replace(case, patient=renamed.get(case.patient, case.patient)) for case in stored}
        self.failed |= self._rows_without_case(found, old)
        digests = self._each(found.cases, digest_of, "reading") if old else {}
        unchanged = {n for n, case in old.items() if digests.get(n) == case.digest and self._is_as_asked(case)}
        fresh = [c for c in found.cases if c.name not in unchanged and c.name not in self.failed]
        seen = self._each(fresh, lambda case: self.survey(case, self.config), "surveying")
        seen = {
            case: replace(s, patient=names.of(s.header_digest)) if s.header_digest else s for case, s in seen.items()
        }
        split = self._split(seen, old)
        fmt = None
        if seen and self.store:
            fmt = replace(self.store.format, nan=self.config.nan)
        elif seen:
            fmt = fitting_format([s for s in seen.values() if split[s.patient] != "test"], self.config)
        settings = self._settings(fmt) if fmt else {}
        if seen:
            # For the page at the end; threads that cut images leave much of the interpreter's time.
            Thread(target=import_drawing).start()
        parts = self._each(
            [case for case in fresh if case.name in seen],
            lambda case: self._cut(
                case, seen[case.name], fmt, settings, held_out=split[seen[case.name].patient] == "test"
            ),
            f"preparing {self.config.domain}",
        )
        accounting = self._account(source, everything)
        outdated = made_from_slices(self.out) if parts else ()
        if not parts and not old:
            raise NoUsableCase(dict(sorted(self.failed.items())), accounting)
        if parts:
            fmt = self._with_window(fmt, [p for name, p in parts.items() if split[seen[name].patient] != "test"])
            fresh_cases = {name: (seen[name], part) for name, part in parts.items()}
            kept = {name: case for name, case in old.items() if name not in parts}
            store = self._write(fmt, fresh_cases, kept=kept, split=split, found=found, accounting=accounting)
        else:
            if old:
                refuse_other_names(self.store.class_names, self.config.class_names, self.out)
            store = self._unchanged(accounting, renamed)
        tidy(self.out, store)
        return Preparation(
            store,
            dict(sorted(self.failed.items())),
            {name: _one_line(remark) for name, remark in sorted(found.remarks.items())},
            added=len(parts.keys() - old.keys()),
            replaced=len(parts.keys() & old.keys()),
            unchanged=len(unchanged),
            kept=len(old.keys() - unchanged - parts.keys()),
            accounting=accounting,
            outdated=outdated,
        )

    def _account(self, source: Path, everything: Found) -> Accounting:
        """What became of every entry of the source, once it is known which cases cannot be used."""
        config = self.config
        wanted = Wanted(
            image_keys=tuple(key.strip() for key in config.image_key.split(",")),
            label_key=None if config.label_kind == "none" else config.label_key,
            failed=self.failed,
            excluded=config.exclude,
            other={os.path.abspath(self.out): "the slice store that is written"},
        )
        return account_for(source, everything, wanted)

    def _unchanged(self, accounting: Accounting, renamed: Mapping[str, str]) -> SliceStore:
        """The store with the slices that it has, today's accounting of the source, and patients renamed."""
        store = SliceStore(self.out)
        if store.accounting == accounting and not renamed:
            return store
        index = replace(store.read_index().with_patients(renamed), accounting=accounting)
        self.names.commit()
        return update_index(self.out, self.work, index)

    def _rows_without_case(self, found: Found, old: Mapping[str, Case]) -> dict[str, str]:
        """The reason for each row of the table of centres that belongs to no case of the folder or the store."""
        cases = (case.name for case in found.cases)
        return rows_without_case(
            self.config, {*cases, *found.problems, *found.without_image, *self.config.exclude, *old}
        )

    def _is_as_asked(self, case: Case) -> bool:
        """Whether a case of the store, whose files have not changed, is what these settings would make of them."""
        config = self.config
        read_alike = case.label_kind == config.label_kind and case.label_rule == config.label_rule
        return (case.label_kind == "none" or read_alike) and is_centred(case, config)

    def _each(self, cases: list[CaseFiles], work: Callable[[CaseFiles], R], title: str) -> dict[str, R]:
        """Results by name; cases that cannot be used are written down and left out."""

        def guarded(case: CaseFiles) -> R | FedFactoryError:
            try:
                return work(case)
            except FedFactoryError as error:
                return error
            except MemoryError:
                return VolumeError(f"{case.files[0]}: does not fit into memory; use fewer workers")
            except OSError:  # of the store's disk: readers turn theirs into errors of the case
                raise
            except Exception as error:  # a reader's, for which the other cases must not pay
                return VolumeError(unforeseen(error, case.files[0]))

        results: dict[str, R] = {}
        for case, result in self._parallel(cases, guarded, title):
            if isinstance(result, FedFactoryError):
                self.failed[case.name] = _one_line(str(result))
            else:
                results[case.name] = result
        return results

    def _parallel(self, items: list[T], work: Callable[[T], R], title: str) -> Iterator[tuple[T, R]]:
        """Results in the items' order. Threads: reading, unpacking and multiplying all leave the interpreter free."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                results = track(pool.map(work, items), title, total=len(items))
                yield from zip(items, results, strict=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _split(self, seen: Mapping[str, Survey], old: Mapping[str, Case]) -> dict[str, str]:
        known = {case.patient: case.split for case in old.values()}
        if self.config.split is not None:
            return {**{survey.patient: self.config.split for survey in seen.values()}, **known}
        labelled: dict[str, bool] = {}
        for case in (*old.values(), *seen.values()):
            labelled[case.patient] = labelled.get(case.patient, False) or case.labelled
        return split_patients(
            labelled,
            validation_share=self.config.validation_share,
            test_share=self.config.test_share,
            seed=self.config.seed,
            known=known,
            ranks={survey.patient: survey.header_digest or survey.patient for survey in seen.values()},
        )

    def _cut(
        self, case: CaseFiles, seen: Survey, fmt: SliceFormat, settings: Mapping[str, object], *, held_out: bool
    ) -> CutCase:
        """Cut a case into the working folder, unless an earlier run has done so with the same settings."""
        text = json.dumps([__version__, CUT_LAYOUT, seen.digest, settings, seen.centre, held_out])
        part = CutCase(self.work, hashlib.sha256(text.encode()).hexdigest()[:32])
        if not part.complete:
            known = self._window_known(fmt)
            part.write(self.cut(case, seen, fmt, config=self.config, window_known=known, held_out=held_out))
        return part

    def _settings(self, fmt: SliceFormat) -> dict[str, object]:
        """What the slices and labels of a case depend on beside its files, JSON-able."""
        config, window = self.config, fmt.window if self._window_known(fmt) else None
        labels = [config.label_kind, config.label_rule, config.classes, sorted(config.class_names.items())]
        slices = {**fmt.to_dict(), "window": window, "channels": fmt.channels, "z_bins": None}
        return {"slices": slices, "site": asdict(config.site), "labels": labels}

    def _window_known(self, fmt: SliceFormat) -> bool:
        """Whether the intensity window does not follow from the slices."""
        return bool(self.store or self.config.window or fmt.colour)

    def _with_window(self, fmt: SliceFormat, parts: list[CutCase]) -> SliceFormat:
        if self._window_known(fmt):
            return fmt
        windows = [self._window(channel, fmt, parts) for channel in range(fmt.channels)]
        return replace(fmt, window=tuple(windows))

    def _window(self, channel: int, fmt: SliceFormat, parts: list[CutCase]) -> tuple[float, float]:
        """The intensity window of one channel."""
        low, high = channel_range(channel, fmt, [part.facts for part in parts])
        counts = np.zeros(WINDOW_BINS, dtype=np.int64)
        for _, found in self._parallel(
            parts, lambda p: count_intensities(p.standardised().values[:, channel], low, high), "counting"
        ):
            counts += found
        return intensity_window(low, high, counts)

    def _write(
        self,
        fmt: SliceFormat,
        fresh: Mapping[str, tuple[Survey, CutCase]],
        *,
        kept: Mapping[str, Case],
        split: Mapping[str, str],
        found: Found,
        accounting: Accounting,
    ) -> SliceStore:
        self._refuse_other_values(kept.values())
        class_names = self._class_names([part.facts.labels.names for _, part in fresh.values()], stays=bool(kept))
        names = sorted([*fresh, *kept])
        counts = [kept[name].count if name in kept else fresh[name][1].facts.count for name in names]
        firsts = dict(zip(names, np.cumsum([0, *counts])[:-1].tolist(), strict=True))
        known = self.store.classes if self.store else 0
        classes = max([known, *(part.facts.classes for _, part in fresh.values())])
        kinds = {kind for _, part in fresh.values() for kind in part.facts.kinds}
        kinds |= {"images", *(self.store.files if self.store else ())}
        arrays = StoreArrays(self.work, sum(counts), fmt, classes=classes, kinds=kinds)

        def write_one(name: str) -> Case:
            if name in kept:
                case, values = kept[name], self.store.parts(kept[name])
                if checksum(values) != case.checksum:
                    raise StoreError(f"{self.out}: the slices of {name} are damaged; prepare everything anew")
                case = replace(case, first=firsts[name])
            else:
                seen, part = fresh[name]
                values, clipped = part.scaled(fmt)
                kind = self.config.label_kind if seen.labelled else "none"
                digest = checksum(values)
                case = describe_case(
                    name,
                    seen,
                    part.facts,
                    label_kind=kind,
                    label_rule=self.config.label_rule if seen.labelled else "",
                    split=split[seen.patient],
                    first=firsts[name],
                    clipped=clipped,
                    digest=digest,
                )
            arrays.put(case, values)
            return case

        cases = [case for _, case in self._parallel(names, write_one, "writing")]
        index = StoreIndex(
            version=FORMAT_VERSION,
            made_by=f"fedfactory {__version__}",
            domain=self.config.domain,
            classes=classes,
            class_names=class_names,
            height=float(np.median([case.height for case in cases])),
            site=self.config.site,
            format=fmt,
            arrays=arrays.close(cases),
            warnings=tuple(
                store_warnings(cases, fmt, classes=classes, without_image=found.without_image, config=self.config)
            ),
            cases=tuple(cases),
            z_bin=tuple(int(z_bin) for case in cases for z_bin in z_bins_of(case.count, fmt.z_bins)),
            accounting=accounting,
        )
        self.names.commit()
        return commit(self.out, self.work, index)

    def _refuse_other_values(self, kept: Iterable[Case]) -> None:
        """Raises: UsageError if labelled cases stay whose label values had other classes."""
        if self.store is None or self.store.site.label_values == self.config.site.label_values:
            return
        others = [case.name for case in kept if case.labelled and case.label_rule != self.config.label_rule]
        if others:
            raise UsageError(
                f"{self.out}: label_values is '{self.store.site.label_values}' for {len(others)} cases that stay, such "
                f"as {others[0]}, not '{self.config.site.label_values}'; give the same, or choose another folder"
            )

    def _class_names(self, of_cases: Iterable[Mapping[str, str]], *, stays: bool) -> dict[str, str]:
        """Names by label value: those that were asked for, of the store as it was, and of the label files.

        Args:
            of_cases: names that label files tell, by label value.
            stays: whether a case of the store as it was stays in it; otherwise its names may change.

        Raises: UsageError for names that contradict each other.
        """
        names = dict(self.config.class_names)
        if self.store and (stays or not names):
            refuse_other_names(self.store.class_names, names, self.out)
            names = {**self.store.class_names, **names}
        united = united_names(names, ({int(k): name for k, name in given.items()} for given in of_cases))
        return {str(value): united[value] for value in sorted(united)}


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
