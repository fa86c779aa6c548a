"""What a node keeps between rounds: at most two states of an experiment, and none of those that are over.

Fed-BioMed writes the optimizers' state and the tensors that stay at the site into two files in every round, adds a row
to the node's database, and removes neither. A researcher can ask for two states only: the newest, or the one that the
last round began from, when that round's answer was lost, came too late or did not count, or when the researcher
resumes the run from its last finished round. These two are kept. The two newest would not be enough: after a round was
repeated twice, the one that all attempts began from is the third.

Rows are removed before files: a row whose file is missing would let the framework begin with new optimizers without a
word, while a file without a row is removed with the next ones.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ..connection.component import NODE, read_component
from .state_rows import StateRow, remove_rows, state_rows

KEEP = 2  # states of an experiment
DAY = 86400.0  # seconds
FOLDER_OF_NODE, FOLDER_OF_EXPERIMENT = "node_state_", "experiment_id_"  # beginnings of names below NODE/var
TEMPORARY = Path("var", "tmp")  # below the node's folder
IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,80}")
STATE_FILE = re.compile(r"(?:optim_state|persistent_model_weights|preproc)_.+?_(node_state_[0-9a-f-]+)")
IN_WORK = 3600.0  # seconds; a younger file without a row may belong to a round that is just being saved


def check_experiment_id(text: object) -> str:
    """The identifier of an experiment as a researcher sent it, if it can be part of a path.

    The framework makes a folder of it without a look: with `..` and slashes, states would be written anywhere.

    Raises: UsageError unless it is a text of 1 to 80 letters, digits, hyphens and underscores.
    """
    return _checked("experiment_id", text)


def check_state_id(text: object) -> str | None:
    """The same for the identifier of a state, which may also be None: the experiment's first round."""
    return None if text is None else _checked("state_id", text)


def _checked(name: str, text: object) -> str:
    if isinstance(text, str) and IDENTIFIER.fullmatch(text):
        return text
    raise UsageError(f"{name} is {str(text)[:80]!r}; it must be 1 to 80 letters, digits, hyphens and underscores")


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What was removed: rows of the database, files, and their size in bytes."""

    rows: int = 0
    files: int = 0
    bytes: int = 0

    def __add__(self, other: Removed) -> Removed:
        return Removed(rows=self.rows + other.rows, files=self.files + other.files, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class StatePlace:
    """Where a node keeps its states.

    Attributes:
        folder: NODE/var/node_state_<id of the node>; it may not exist yet.
        database: the node's JSON file.
    """

    folder: Path
    database: Path

    def of_experiment(self, experiment_id: str) -> Path:
        """The folder of an experiment. Raises: UsageError if the identifier cannot be part of a path."""
        return self.folder / f"{FOLDER_OF_EXPERIMENT}{check_experiment_id(experiment_id)}"


def state_place(root: str | Path) -> StatePlace:
    """Where the node at `root` keeps its states. Raises: UsageError if there is no node."""
    component = read_component(root, NODE)
    node_id = component.options.get("default.id", "")
    if not IDENTIFIER.fullmatch(node_id):
        raise UsageError(f"{component.config}: it has no usable default.id; put the file back from a backup")
    return StatePlace(
        folder=component.root / "var" / f"{FOLDER_OF_NODE}{node_id}", database=component.database.resolve()
    )


def keep_newest_states(
    place: StatePlace, experiment_id: str, *, keep: int = KEEP, needed: Collection[str] = ()
) -> Removed:
    """Remove all but `keep` states of an experiment: rows first, then files, and files that no row names.

    The newest state stays in any case, then those that are `needed`, then the next newest ones. It must be called where
    no round of this experiment is being saved. A process that is killed here leaves rows that are all whole, and
    possibly files without a row, which the next call removes.

    Args:
        place: of the node.
        experiment_id: of the researcher; checked.
        keep: number of states, from 1 up.
        needed: identifiers of states that a researcher may still ask for.

    Raises: UsageError if the identifier cannot be part of a path, or if the database is damaged.
    """
    return _trim(place, experiment_id, keep=keep, needed=needed, newest=None)


def after_round(
    root: str | Path, node_id: str, db_path: str | Path, experiment_id: str, state_id: str | None,
    *, previous_state_id: str | None,
) -> Removed:  # fmt: skip
    """Remove what no researcher can ask for any more; to be called after every round, before the next one begins.

    Args:
        root: folder of the node.
        node_id: of the node.
        db_path: the node's database.
        experiment_id: of the round.
        state_id: of the state that the round saved. If it is None or was not saved, as when the round failed, nothing
            is removed.
        previous_state_id: of the state that the round began from.

    Raises: UsageError as `keep_newest_states`.
    """
    place = StatePlace(folder=Path(root) / "var" / f"{FOLDER_OF_NODE}{node_id}", database=Path(db_path))
    if state_id is None:
        return Removed()
    needed = () if previous_state_id is None else (previous_state_id,)
    return _trim(place, experiment_id, keep=KEEP, needed=needed, newest=state_id)


def _trim(place: StatePlace, experiment_id: str, *, keep: int, needed: Collection[str], newest: str | None) -> Removed:
    """See `keep_newest_states`; nothing is removed unless the newest state is `newest`, if one is given."""
    folder = place.of_experiment(experiment_id)
    stay: set[str] = set()

    def doomed(rows: list[StateRow]) -> list[StateRow]:
        stay.clear()
        own = [row for row in rows if row.experiment_id == experiment_id]
        if newest is not None and (not own or own[-1].state_id != newest):
            return []
        by_rank = sorted(own[::-1], key=lambda row: 0 if row is own[-1] else 1 if row.state_id in needed else 2)
        stay.update(row.state_id for row in by_rank[:keep])
        return by_rank[keep:]

    rows = remove_rows(place.database, doomed)
    if newest is not None and newest not in stay:
        return Removed()
    return Removed(rows=len(rows)) + _remove_files(folder, stay)


@dataclass(frozen=True, kw_only=True)
class ExperimentStates:
    """What a node keeps of one experiment.

    Attributes:
        experiment_id: as the folder or the rows name it; not checked, so to be shown with care.
        states: number of rows.
        bytes: of all its files.
        orphans: number of files that no row names and that are older than an hour, see `remove_orphans`.
        age: seconds since the newest file was written; None if there is none.
    """

    experiment_id: str
    states: int
    bytes: int
    orphans: int
    age: float | None


def states_of(root: str | Path, now: float | None = None) -> list[ExperimentStates]:
    """All experiments of which the node keeps something, the one used last first.

    Raises: UsageError if there is no node, or if its database is damaged.
    """
    place, now = state_place(root), time.time() if now is None else now
    rows = state_rows(place.database)
    folders = _experiment_folders(place)
    listed = []
    for name in {*folders, *(row.experiment_id for row in rows)}:
        own = {row.state_id for row in rows if row.experiment_id == name}
        files = _files(folders[name]) if name in folders else []
        newest = max((file.stat(follow_symlinks=False).st_mtime for file in files), default=None)
        listed.append(
            ExperimentStates(
                experiment_id=name,
                states=len(own),
                bytes=sum(file.stat(follow_symlinks=False).st_size for file in files),
                orphans=sum(_is_orphan(file, own, before=now - IN_WORK) for file in files),
                age=max(now - newest, 0.0) if newest is not None else None,
            )
        )
    return sorted(listed, key=lambda states: (states.age is None, states.age or 0.0, states.experiment_id))


def bytes_of_states(root: str | Path) -> int:
    """Size of all files that the node at `root` keeps between rounds, in bytes."""
    folders = _experiment_folders(state_place(root)).values()
    return sum(file.stat(follow_symlinks=False).st_size for folder in folders for file in _files(folder))


def remove_experiment(root: str | Path, experiment_id: str) -> Removed:
    """Remove all states of an experiment: its rows, then its folder.

    Args:
        root: folder of the node.
        experiment_id: as `states_of` lists it. One that cannot be part of a path has rows removed only.

    Raises: UsageError if there is no node, or if its database is damaged.
    """
    place = state_place(root)
    rows = remove_rows(place.database, lambda rows: [row for row in rows if row.experiment_id == experiment_id])
    removed = Removed(rows=len(rows))
    if folder := _experiment_folders(place).get(experiment_id):  # only what is there by this name, never a path
        sizes = [file.stat(follow_symlinks=False).st_size for file in _files(folder)]
        shutil.rmtree(folder)
        removed += Removed(files=len(sizes), bytes=sum(sizes))
    return removed


def remove_orphans(root: str | Path, now: float | None = None) -> Removed:
    """Remove files of states that no row names, and that are older than an hour.

    Raises: UsageError if there is no node, or if its database is damaged.
    """
    place, now = state_place(root), time.time() if now is None else now
    rows, removed = state_rows(place.database), Removed()
    for name, folder in _experiment_folders(place).items():
        own = {row.state_id for row in rows if row.experiment_id == name}
        removed += _remove_files(folder, own, before=now - IN_WORK)
    return removed


def leftovers_of_killed_nodes(root: str | Path) -> list[Path]:
    """Temporary files and folders below the node's folder. While the node runs, some of them are in use."""
    folder = Path(root) / TEMPORARY
    return sorted(folder.iterdir()) if folder.is_dir() else []


def remove_leftovers(root: str | Path) -> int:
    """Remove temporary files of a node that does not run; their number."""
    found = leftovers_of_killed_nodes(root)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def _experiment_folders(place: StatePlace) -> dict[str, Path]:
    """Experiment to its folder. A link in its place is left out: what is behind it was not written by the node."""
    if not place.folder.is_dir():
        return {}
    with os.scandir(place.folder) as entries:
        return {
            entry.name.removeprefix(FOLDER_OF_EXPERIMENT): Path(entry.path)
            for entry in entries
            if entry.name.startswith(FOLDER_OF_EXPERIMENT) and entry.is_dir(follow_symlinks=False)
        }


def _files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.is_dir(follow_symlinks=False)]


def _is_orphan(file: os.DirEntry[str], kept: Collection[str], *, before: float) -> bool:
    found = STATE_FILE.fullmatch(file.name)  # a file by another name is not the framework's, and stays
    return found is not None and found[1] not in kept and file.stat(follow_symlinks=False).st_mtime < before


def _remove_files(folder: Path, kept: Collection[str], before: float = float("inf")) -> Removed:
    removed = Removed()
    for file in _files(folder) if folder.is_dir() and not folder.is_symlink() else ():
        if _is_orphan(file, kept, before=before):
            size = file.stat(follow_symlinks=False).st_size
            Path(file.path).unlink(missing_ok=True)
            removed += Removed(files=1, bytes=size)
    return removed
