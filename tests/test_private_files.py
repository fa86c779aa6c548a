"""What is written at a site is for its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedfactory.cli import main
from fedfactory.common import files
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import write_site


@pytest.fixture(autouse=True)
def open_umask(monkeypatch) -> Iterator[None]:
    """The usual setting of a machine, under which others may read what is not protected."""
    monkeypatch.setattr(files, "_taken", files.OWNER_ALONE)
    mask = os.umask(0o022)
    yield
    os.umask(mask)


def permissions(folder: Path) -> set[str]:
    return {stat.filemode(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


def run(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code in (0, None)


def test_a_prepared_store_is_readable_by_its_owner_alone(tmp_path):
    write_site(tmp_path / "site", cases=2)
    prepare(tmp_path / "site", tmp_path / "deep" / "store", PrepareConfig(domain="x", size=16, z_bins=4))
    assert permissions(tmp_path / "deep") == {"drwx------", "-rw-------"}


def test_commands_write_for_the_owner_alone_and_with_an_option_for_the_group(tmp_path):
    write_site(tmp_path / "site", cases=2)
    rest = ("prepare", tmp_path / "site", "--domain", "x", "--size", 16, "--z-bins", 4, "--out")
    run(*rest, tmp_path / "alone")
    assert permissions(tmp_path / "alone") == {"drwx------", "-rw-------"}
    run("--share-group", *rest, tmp_path / "shared")
    assert permissions(tmp_path / "shared") == {"drwxr-x---", "-rw-r-----"}
    weaker = ("weaken-labels", tmp_path / "site", "--kind", "box", "--out")
    run(*weaker, tmp_path / "weak")
    assert permissions(tmp_path / "weak") == {"drwx------", "-rw-------"}


def test_a_finished_folder_is_as_private_as_its_files(tmp_path):
    with files.atomic_folder(tmp_path / "new" / "folder") as folder:
        (folder / "inside").mkdir()
    assert stat.filemode((tmp_path / "new" / "folder").stat().st_mode) == "drwx------"
    assert stat.filemode((tmp_path / "new").stat().st_mode) == "drwx------"
