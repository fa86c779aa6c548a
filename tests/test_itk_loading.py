"""ITK changes the working folder while it loads its parts: nothing may be left to load when threads read files."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers import ball_volume, write_dicom

SCRIPT = """
import os
from pathlib import Path
from fedfactory.imaging.archive.series import find_series, read_grid, read_series

(files,) = find_series(Path("scan")).values()
moves = []
os.chdir = moves.append
assert read_series(files).data.ndim == 3 and read_grid(files)
assert not moves, moves
"""


def test_finding_series_loads_all_of_itk_that_reading_in_threads_needs(tmp_path):
    write_dicom(tmp_path / "scan", ball_volume(seed=0)[0])
    child = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
