"""Tables as spreadsheets and programs write them."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
from fedfactory.common import tables
from fedfactory.common.files import read_lines
from fedfactory.common.tables import harmless, read_table, write_table
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.case_files import is_label_table
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.centre_table import read_centre_table, write_centre_table
from fedfactory.imaging.patients import read_patient_table
from fedfactory.imaging.pictures.colour_table import read_colour_table
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.slice_grid import SliceGrid
from fedfactory.node.store.label_tables import read_gaze, read_presence

ROWS = [("p 1", "1.5"), ("Müller", "-2.25")]


def grid() -> SliceGrid:
    fmt = SliceFormat(size=8, spacing=1.0, z_bins=4, window=((-1.0, 1.0),))
    return SliceGrid((8, 8, 4), np.eye(4), box=((0, 8), (0, 8), (0, 4)), fmt=fmt)


def as_text(separator: str, *, end="\n", space="", quote="", decimal=".", heading=("case", "x")) -> str:
    lines = [heading, *((name, number.replace(".", decimal)) for name, number in ROWS)]
    joined = f"{space}{separator}{space}"
    return "".join(joined.join(f"{quote}{cell}{quote}" for cell in line) + end for line in lines)


WRITTEN = {
    "plain": as_text(",").encode(),
    "byte order mark": as_text(",", end="\r\n").encode("utf-8-sig"),
    "semicolons and decimal commas": as_text(";", end="\r\n", decimal=",").encode("utf-8-sig"),
    "semicolons and decimal points": as_text(";").encode(),
    "tabs": as_text("\t").encode(),
    "Unicode text of Excel": as_text("\t", end="\r\n").encode("utf-16"),
    "the same with decimal commas": as_text("\t", end="\r\n", decimal=",").encode("utf-16"),
    "the other byte order": b"\xfe\xff" + as_text("\t").encode("utf-16-be"),
    "spaces": as_text(",", space="  ").encode(),
    "spaces after semicolons": as_text(";", space=" ", decimal=",").encode(),
    "quoted": as_text(",", quote='"').encode(),
    "quoted with spaces": as_text(";", quote='"', space=" ", decimal=",").encode(),
    "capital letters": as_text(",", heading=("CASE", "X")).encode(),
    "capital first letters": as_text(",", heading=("Case", " X ")).encode(),
    "line ends of old computers": as_text(",", end="\r").encode(),
    "no line end": as_text(",").rstrip().encode(),
    "empty columns at the end": as_text(",", end=",,\r\n").encode(),
    "empty rows": ("\n" + as_text(",").replace("\n", "\n\n") + ",\n;\n".replace(";", " ") + "  \n").encode(),
    "named separator": ("sep=;\r\n" + as_text(";", end="\r\n", decimal=",")).encode("utf-8-sig"),
    "named separator in quotation marks": ('"sep=;"\n' + as_text(";")).encode(),
    "a column without a name": "case,,x\np 1,note,1.5\nMüller,,-2.25\n".encode(),
    "notes over several lines": 'case,note,x\np 1,"first\nsecond",1.5\nMüller,,-2.25\n'.encode(),
    "commas in other cells": 'note, left; case;x\n"a,b,c";p 1;1.5\n;Müller;-2.25\n'.encode(),
    "no-break spaces": as_text(",", space="\u00a0").encode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_tables_of_spreadsheets_are_read(name, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(WRITTEN[name])
    table = read_table(path, known=("case", "x"))
    assert table.has(("CASE", "X")) and not table.has(("Y",))
    assert [(row.text("case"), row.number("X")) for row in table.rows()] == [("p 1", 1.5), ("Müller", -2.25)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"case,x\na,1,5\n", r"line 2: has more values than columns; write decimals with a point"),
        (b"case;x\na;1,234.5\n", r"line 2: X is '1,234.5'; it must be a finite number"),
        (b"case\tx\na\t1,234\n", r"line 2: X is '1,234'"),  # 1.234 or 1234
        (b'case,x\na,"1,5"\n', r"line 2: X is '1,5'"),
        (b"case,x\na,1_0\n", r"line 2: X is '1_0'"),
        (b"case,x\na,nan\n", r"X is 'nan'"),
        (b"case,x\na\n", r"line 2: X is ''"),
        (b"case,x\n\n\na,two\n", r"line 4: X is 'two'"),
        (b'case,x\n"a\nb",1\n', r"line 3: CASE goes over several lines"),
        (b'case,x\n"a,1\n', r"a quotation mark has no partner"),
        (b"case,x,Case\na,1,b\n", r"has the column CASE 2 times"),
        (b"case,x\n\xff,1\n", r"line 2 is not in UTF-8\); save it as 'CSV UTF-8'"),
        (b"case,x\n\0,1\n", r"it is no text"),
        (b"\xff\xfea", r"line 1 is not in UTF-8"),
        (b"case,x\n" + b"a" * 200_000 + b",1\n", r"field larger than field limit"),
        (b"a,b\n" + b"," * (1 << 20) + b"\n", r"a line has over 1048576 characters"),
        (b"," * 5000, r"has 5001 columns; at most 4096 are read"),
        (b"case,x\n" + b"," * 5000, r"line 2: at most 1048576 rows and 4096 columns are read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(content, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        table = read_table(path, known=("CASE", "X"))
        assert table.has(("CASE", "X"))
        print([(row.text("CASE"), row.number("X")) for row in table.rows()])
    assert str(error.value).startswith(f"{path}") and "\n" not in str(error.value)


def test_large_tables_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # takes no room
    with pytest.raises(UsageError, match=r"over 32 MiB"):
        read_table(path)
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    path.write_text("case\na\nb\nc\n")
    assert len(list(read_table(path).rows())) == 3
    path.write_text("case\na\nb\nc\nd\n")
    with pytest.raises(UsageError, match=r"line 5: at most 3 rows"):
        list(read_table(path).rows())


def test_a_folder_or_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path, tmp_path / "pipe.csv", tmp_path / "none.csv"):
        with pytest.raises(UsageError, match=r"cannot be read as a table"):
            read_table(path)


def test_cells_that_a_spreadsheet_would_run_are_made_harmless(tmp_path):
    names = ["=1+1", "+a", "-b", "@c", "plain", "a=b"]
    write_table(tmp_path / "t.csv", ["case", "x"], [(name, -1.5) for name in names])
    with (tmp_path / "t.csv").open(newline="") as file:
        cells = list(csv.reader(file))[1:]
    assert [name for name, _ in cells] == ["'=1+1", "'+a", "'-b", "'@c", "plain", "a=b"]
    assert {number for _, number in cells} == {"-1.5"}  # numbers stay numbers
    assert harmless("\t=1") == "'\t=1" and harmless(-1) == -1
    assert [row.text("case") for row in read_table(tmp_path / "t.csv").rows()] == names


def test_tables_are_read_back_as_they_were_written(tmp_path):
    names = ["'=1", "''+a", "'plain", "-5", "+1e3", "-5x", "\uff1dcmd", "'-5", "=", "it's"]
    write_table(tmp_path / "t.csv", ["=case", "x"], [(name, "-0.5") for name in names])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        heading, *cells = list(csv.reader(file))
    assert heading == ["'=case", "x"]  # a column may be named after a class
    for shown, _ in cells:
        assert not re.match(r"[=+\-@\uff1d]", shown) or float(shown)  # a number is no formula
    assert {number for _, number in cells} == {"-0.5"}
    assert [row.text("'=case") for row in read_table(tmp_path / "t.csv").rows()] == names


def test_centres_of_cases_named_like_formulas_are_found_again(tmp_path):
    places = {"=cmd": (-1.25, 2.0, 3.0), "case 2": (4.0, -5.5, 6.0)}
    write_centre_table(tmp_path / "t.csv", places)
    assert "\n'=cmd,-1.25,2.00,3.00\n" in (tmp_path / "t.csv").read_text()
    assert read_centre_table(tmp_path / "t.csv").places == places


def german(path: Path, text: str) -> Path:
    """A table as Excel writes it in countries with decimal commas."""
    path.write_bytes(text.replace(",", ";").replace(".", ",").replace("\n", "\r\n").encode("utf-8-sig"))
    return path


def test_every_table_of_a_site_may_come_from_a_spreadsheet(tmp_path):
    centres = german(tmp_path / "a.csv", "Case,X,Y,Z\np1,-1.5,2.0,3\n")
    assert read_centre_table(centres).places == {"p1": (-1.5, 2.0, 3.0)}
    patients = german(tmp_path / "b.csv", "Case,Patient,\nscan1,p1,\n,,\n")
    assert read_patient_table(patients) == {"scan1": "p1"}
    colours = german(tmp_path / "c.csv", "r,g,b,class,name\n0,0,0,0,\n255,0,0,1,cup\n")
    assert read_colour_table(colours).classes == {(0, 0, 0): 0, (255, 0, 0): 1}
    seen = german(tmp_path / "d.CSV", "Slice,Label\n2,1\n")
    np.testing.assert_array_equal(read_presence(seen, grid()), [[1, 0], [1, 0], [1, 1], [1, 0]])
    text = "Current_Fix_X,Current_Fix_Y,Slice,Current_Fix_Duration\n0.5,0.25,2,200.5\n0.5,0.25,1,3\n"
    (found,), remarks = read_gaze(german(tmp_path / "e.csv", text), grid())
    assert found[0] == 2 and found[3] == 200.5
    assert remarks == ("up to 50% of its fixations left out: shorter than 50 ms",)


def test_a_missing_column_is_named_with_what_was_found(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("SLICE|LABEL\n1|1\n")
    with pytest.raises(
        VolumeError, match=r"lacks the column SLICE; it must have SLICE, LABEL, and its columns are SLICE\|"
    ):
        read_presence(path, grid())
    path.write_text("slice;lable\n1;1\n")
    with pytest.raises(
        VolumeError, match=r"lacks the column LABEL; .* its columns are slice,lable, separated by semicolons"
    ):
        read_presence(path, grid())
    with pytest.raises(
        UsageError, match=r"needs the columns CASE,PATIENT.*its columns are slice,lable, separated by semi"
    ):
        read_patient_table(path)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("t.csv", "anything", True),
        ("T.CSV", "", True),
        ("t.tsv", "SLICE\tLABEL\n", True),
        ("t.txt", "slice;label\r\n1;1\r\n", True),
        ("t.TXT", "CURRENT_FIX_X,CURRENT_FIX_Y\n", True),
        ("README.txt", "The LABEL of each slice.\n", False),
        ("yolo.txt", "0 0.5 0.5 0.1 0.1\n", False),
        ("t.xlsx", "SLICE,LABEL\n", False),
        (".t.csv", "SLICE,LABEL\n", False),
    ],
)
def test_tables_of_labels_are_told_from_notes(name, text, wanted, tmp_path):
    (tmp_path / name).write_text(text)
    assert is_label_table(tmp_path / name) is wanted
    (tmp_path / "folder.csv").mkdir()
    assert not is_label_table(tmp_path / "folder.csv")
    (tmp_path / "u.txt").write_bytes("SLICE\tLABEL\r\n1\t1".encode("utf-16"))
    assert is_label_table(tmp_path / "u.txt")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,1\n4,1\n", r"line 3: SLICE is 4; it must be a whole number from 0 to 3"),
        ("0,1\n\n-1,1\n", r"line 4: SLICE is -1"),
        ("1.5,1\n", r"line 2: SLICE is 1.5"),
        ("1,255\n", r"line 2: LABEL is 255; it must be a whole number from 0 to 254"),
        ("1,x\n", r"line 2: LABEL is 'x'; it must be a finite number"),
    ],
)
def test_a_row_that_cannot_be_right_is_named_by_its_line(rows, message, tmp_path):
    (tmp_path / "t.csv").write_text("SLICE,LABEL\n" + rows)
    with pytest.raises(VolumeError, match=message):
        read_presence(tmp_path / "t.csv", grid())


def test_a_fixation_that_cannot_be_right_is_named_by_its_line(tmp_path):
    heading = "CURRENT_FIX_X,CURRENT_FIX_Y,SLICE,CURRENT_FIX_DURATION\n0.5,0.5,1,300\n"
    for row in ("0.5,0.5,1,-3", "1e7,0.5,1,300"):
        (tmp_path / "t.csv").write_text(heading + row)
        with pytest.raises(VolumeError, match="line 3: a fixation with a negative duration, or a place far outside"):
            read_gaze(tmp_path / "t.csv", grid())


@pytest.mark.parametrize(
    ("rows", "kept", "remarks"),
    [
        (["0.5,0.5,1,300"] * 9 + ["1.2,0.5,1,300"], 9, ["up to 10% of its fixations left out: outside the image"]),
        (
            ["0.5,0.5,1,300", "0.5,-0.1,1,300", "0.5,0.5,4,300"],
            1,
            ["most of its fixations left out: outside the image"],
        ),
        (["0.5,0.5,1,0.3", "0.5,0.5,2,0.2"], 0, ["all of its fixations left out: shorter than 50 ms"]),
        (["0.5,0.5,0,300", "0.5,0.5,3,300"], 2, []),
        (["1.01,0.5,0,300"], 0, ["all of its fixations left out: outside the image"]),
        ([], 0, []),
    ],
)
def test_fixations_that_are_left_out_are_told(rows, kept, remarks, tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["CURRENT_FIX_X,CURRENT_FIX_Y,SLICE,CURRENT_FIX_DURATION", *rows]))
    found, told = read_gaze(tmp_path / "t.csv", grid())
    assert (len(found), list(told)) == (kept, remarks)


def test_fixations_beside_the_part_that_is_kept_are_told(tmp_path):
    fmt = SliceFormat(size=4, spacing=1.0, z_bins=4, window=((-1.0, 1.0),))
    part = SliceGrid((8, 8, 4), np.eye(4), box=((0, 4), (0, 4), (0, 4)), fmt=fmt)
    (tmp_path / "t.csv").write_text(
        "CURRENT_FIX_X,CURRENT_FIX_Y,SLICE,CURRENT_FIX_DURATION\n0.2,0.2,1,300\n0.9,0.2,1,300\n"
    )
    found, told = read_gaze(tmp_path / "t.csv", part)
    assert len(found) == 1
    assert told == ("up to 50% of its fixations left out: outside the slices, which show a part of the image",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("120,140,1,300", r"none of its 1 rows lies on the image: .* go from 120 to 140 and must be shares"),
        ("0.5,0.5,9,300", r"SLICE goes from 9 to 9 and must be from 0 to 3"),
        ("0.5,0.5,1.5,300", r"line 2: SLICE is 1.5; it must be a whole number"),
    ],
)
def test_fixations_in_another_unit_are_refused(row, message, tmp_path):
    (tmp_path / "t.csv").write_text("CURRENT_FIX_X,CURRENT_FIX_Y,SLICE,CURRENT_FIX_DURATION\n" + row)
    with pytest.raises(VolumeError, match=message):
        read_gaze(tmp_path / "t.csv", grid())


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"])
def test_a_workbook_is_called_one(start, tmp_path):
    """Not a table that is not in UTF-8; and beside an image it is no file that can be passed over."""
    (tmp_path / "t.csv").write_bytes(start + bytes(100))
    with pytest.raises(UsageError, match="is the workbook of a spreadsheet; save it as 'CSV UTF-8'"):
        read_table(tmp_path / "t.csv")
    for part in ("image", "label"):
        (tmp_path / "in" / "case1" / part).mkdir(parents=True)
    (tmp_path / "in" / "case1" / "image" / "i.nii").touch()
    (tmp_path / "in" / "case1" / "label" / "seen.xlsx").write_bytes(start)
    assert "seen.xlsx: is the workbook of a spreadsheet" in find_cases(tmp_path / "in").problems["case1"]


def test_a_table_of_tabs_and_notes_beside_it_are_told_apart_in_a_data_set(tmp_path):
    """Notes beside a label map are no second label file, and a table may end in .tsv or .txt."""
    for number, name in enumerate(("seen.tsv", "seen.txt", "seen.CSV")):
        case = tmp_path / f"case{number}"
        for part in ("image", "label"):
            (case / part).mkdir(parents=True)
        (case / "image" / "i.nii.gz").touch()
        (case / "label" / name).write_text("SLICE\tLABEL\n1\t1\n")
        (case / "label" / "readme.txt").write_text("Drawn by two readers.\n")
    found = find_cases(tmp_path)
    assert not found.problems
    assert [label.path.name for case in found.cases for label in case.labels] == ["seen.tsv", "seen.txt", "seen.CSV"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_names_may_come_from_an_editor_of_windows(encoding, tmp_path):
    (tmp_path / "exclude.txt").write_bytes("Müller\r\n# a remark\r\n\r\ncase 2\r\n".encode(encoding))
    assert read_lines(tmp_path / "exclude.txt") == ["Müller", "case 2"]


def test_long_tables_of_short_lines_are_no_long_lines(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"case,x\r" + b"a,1\r" * 300_000)  # over a mebibyte
    assert next(read_table(tmp_path / "t.csv").rows()).number("x") == 1
