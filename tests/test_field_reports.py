"""Inputs after public reports of people who met them elsewhere, where their folder lies beside the repository.

Each is read, or refused in a line that says why. Without the folder these tests are skipped; other tests have inputs of
their own for every kind of fault.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from fedfactory.cli import main

MAKER = Path(__file__).parents[2] / "shared" / "field" / "make_cases.py"
READ, SOME, NONE, ASKED = 0, 3, 1, 2  # exit codes of `prepare`: all, some or no cases, and a wrong request

pytestmark = [
    pytest.mark.tutorial,
    pytest.mark.skipif(not MAKER.is_file(), reason=f"{MAKER} is not there"),
]

# Input: exit code, and what is printed.
EXPECTED: dict[str, tuple[int, str]] = {
    "affine_round": (READ, "4 cases, 4 labelled"),
    "origin_off": (SOME, "case01/label/m.nii.gz: its affine differs"),
    "spacing_one_percent": (NONE, "corners are up to 3.25 mm apart"),
    "units_meter": (READ, "4 cases, 4 labelled"),
    "slope_zero": (READ, "4 cases, 4 labelled"),
    "slope_nan": (READ, "4 cases, 4 labelled"),
    "label_slope_rounding": (READ, "4 cases, 4 labelled"),
    "big_endian": (READ, "4 cases, 4 labelled"),
    "dtypes": (READ, "7 cases, 7 labelled"),
    "four_d": (READ, "4 cases, 4 labelled"),
    "five_d": (READ, "4 cases, 4 labelled"),
    "nan_background": (NONE, "--nan background"),
    "float_labels": (SOME, "holds values such as 0.98"),
    "brats_values": (READ, "4 cases, 4 labelled"),
    "mmwhs_values": (NONE, "--label-values 205=1,500=2"),
    "mask_255": (NONE, "--label-values 255=1"),
    "acdc_scaled_85": (READ, "--label-values 85=1,170=2"),
    "codes_zero": (READ, "4 cases, 4 labelled"),
    "codes_zero_label": (NONE, "its affine differs"),
    "gz_in_nii": (READ, "2 cases, 2 labelled"),
    "upper_ext": (READ, "4 cases, 4 labelled"),
    "thin": (READ, "3 cases, 3 labelled"),
    "mac_zip": (READ, "22 passed over"),
    "symlinks": (READ, "a link to a folder in which no case was found: links/case01"),
    "twins": (NONE, "scan0.nii and"),
    "dotted": (READ, "4 cases, 4 labelled"),
    "brats_layout": (ASKED, "choose by --image-key"),
    "acdc_layout": (READ, "8 cases, 8 labelled"),
    "totalseg_layout": (READ, "4 cases, 4 labelled"),
    "bids_layout": (READ, "4 cases, 4 labelled"),
    "amos": (READ, "4 cases, 4 labelled"),
    "labels_with_channel": (READ, "4 cases, 4 labelled"),
    "nn_upper": (READ, "4 cases, 4 labelled"),
    "nn_bom": (READ, "4 cases, 4 labelled"),
    "nn_png": (READ, "4 cases, 4 labelled"),
    "png2d": (READ, "4 cases, 4 labelled"),
    "names_adni": (READ, "10 cases, 10 patients (8 train, 1 validation, 1 test)"),
    "names_brats_two_years": (READ, "BraTS since 2020 has patients of earlier years under other names"),
    "names_mnms": (READ, "10 cases, 10 patients"),
    "kvasir_names": (READ, "tell no patient"),
    "image_mha": (READ, "4 cases, 4 labelled"),
    "label_itk_nifti": (READ, "4 cases, 4 labelled"),
    "label_itk_shear": (READ, "4 cases, 4 labelled"),
    "csv_plain": (READ, "4 cases, 4 labelled"),
    "csv_bom": (READ, "4 cases, 4 labelled"),
    "csv_semicolon": (READ, "4 cases, 4 labelled"),
    "csv_upper": (READ, "4 cases, 4 labelled"),
    "csv_spaces": (READ, "4 cases, 4 labelled"),
    "csv_utf16": (READ, "4 cases, 4 labelled"),
    "dcm_ok": (READ, "3 cases, 3 labelled"),
    "dcm_rtstruct": (READ, "a structured report"),
    "dcm_noheader": (READ, "3 cases, 3 labelled"),
    "dcm_duplicates": (READ, "passed over (24): a copy of another slice"),
    "dcm_one_duplicate": (READ, "passed over (3): a copy of another slice"),
    "dcm_cine": (NONE, "3 time points (cine phases) lie at each place"),
    "dcm_two_echoes": (NONE, "2 echoes lie at each place"),
    "dcm_no_spacing": (NONE, "have no PixelSpacing"),
    "dcm_no_spacing_nolabel": (NONE, "have no PixelSpacing"),
    "dcm_no_position": (NONE, "have no ImagePositionPatient"),
    "dcm_sc": (READ, "3 cases, 0 labelled"),
    "dcm_slopes": (READ, "3 cases, 3 labelled"),
    "dcm_mono1": (READ, "3 cases, 3 labelled"),
    "dcm_nested": (READ, "3 cases, 0 labelled"),
    "dcm_localizer": (NONE, "choose with --series largest"),
    "dcm_media": (READ, "9 passed over"),
    "dcm_variable_gap": (NONE, "gaps between slices vary from 2.00 to 4.00 mm"),
    "dcm_label_rtstruct": (NONE, "is a structure set without regions"),
    "dcm_instance_numbers": (READ, "3 cases, 3 labelled"),
    "dcm_same_uid_two_patients": (NONE, "images of 2 patients have one series identifier"),
    "dcm_slice_lost_at_end": (NONE, "1 DICOM files cannot be read, such as IM0008.dcm"),
    "symlink_dangling": (SOME, "case99: is a link to nothing"),
    "enhanced_one": (READ, "3 cases, 3 labelled"),
}
OPTIONS = {
    "nan_background": ("--nan", "background"),
    "mmwhs_values": ("--label-values", "205=1,500=2"),
    "mask_255": ("--label-values", "255=1"),
    "acdc_scaled_85": ("--label-values", "85=1,170=2"),
    "brats_layout": ("--image-key", "flair,t1"),
    "dcm_localizer": ("--series", "largest"),
}


@pytest.fixture(scope="module")
def maker():
    found = importlib.util.spec_from_file_location("field_cases", MAKER)
    module = importlib.util.module_from_spec(found)
    argv, sys.argv = sys.argv, [str(MAKER)]
    try:
        found.loader.exec_module(module)
    finally:
        sys.argv = argv
    return module


def prepare(source: Path, out: Path, capsys, *options: str) -> tuple[int, str]:
    kind = ("--label-kind", "image") if source.name.startswith("csv_") else ()
    common = ("--domain", "x", "--size", "32", "--z-bins", "4")
    with pytest.raises(SystemExit) as end:
        main(["prepare", str(source), "--out", str(out), *common, *kind, *options])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out + captured.err


@pytest.mark.parametrize("name", EXPECTED)
def test_an_input_is_read_or_refused_for_its_true_reason(name, maker, tmp_path, capsys):
    source = tmp_path / name
    maker.C[name](source)
    code, printed = prepare(source, tmp_path / "store", capsys)
    assert (code, EXPECTED[name][1] in printed) == (EXPECTED[name][0], True), printed
    assert "Traceback" not in printed
    assert "Warning:" not in printed
    if name in OPTIONS:
        code, printed = prepare(source, tmp_path / "chosen", capsys, *OPTIONS[name])
        assert code == READ, printed
