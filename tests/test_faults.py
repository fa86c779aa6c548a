"""Errors that nobody foresaw are one line, which names a log with the traceback; nothing of libraries is printed."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.cli import main
from fedfactory.common.fault_log import LOG, faults_named, log_fault, unforeseen
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging import cases, image_reader
from fedfactory.imaging.case_files import CaseFiles, LabelFile
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.label_maps import read_label_map
from fedfactory.imaging.volume_files import write_volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import ball_volume, image_of, write_site


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "fedfactory" / LOG


def fail_on(name: str, error: Exception, read):
    """A reader that fails for one file."""

    def reader(path, **options):
        if name in str(path):
            raise error
        return read(path, **options)

    return reader


def run(capsys, *words) -> tuple[int, str]:
    """Exit code and what is on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code, capsys.readouterr().err


def test_a_log_can_be_read_by_its_owner_alone_and_keeps_earlier_tracebacks(log):
    for number in range(2):
        try:
            raise ZeroDivisionError(f"fault {number}")
        except ZeroDivisionError as error:
            assert log_fault(error, "patient.nii") == log
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert text.index("fault 0") < text.index("fault 1")
    assert text.count("Traceback (most recent call last)") == 2
    assert text.count("UTC, patient.nii") == 2


def test_a_long_log_begins_anew_and_keeps_one_old_one(log, monkeypatch):
    monkeypatch.setattr("fedfactory.common.fault_log.MAX_BYTES", 10)
    for _ in range(3):
        log_fault(ValueError("v"), "x")
    assert sorted(path.name for path in log.parent.iterdir()) == [LOG, f"{LOG}.old"]
    assert log.read_text().count("ValueError") == 1


def test_a_log_is_never_written_through_a_link(log, tmp_path):
    log.parent.mkdir(parents=True)
    log.symlink_to(tmp_path / "elsewhere")
    used = log_fault(ValueError("v"), "x")
    assert not (tmp_path / "elsewhere").exists()
    assert "ValueError" in used.read_text()
    assert stat.S_IMODE(used.stat().st_mode) == 0o600
    used.unlink()


def test_without_a_folder_for_state_the_log_is_a_temporary_file(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    used = log_fault(ValueError("v"), "x")
    assert "ValueError: v" in used.read_text()
    used.unlink()


def test_a_line_about_a_fault_is_one_line_and_names_kind_file_and_log(log):
    text = unforeseen(RuntimeError("\n first line\nsecond line"), "a.nii")
    assert text == (f"a.nii: failed with an unforeseen error (RuntimeError: first line); its traceback is in {log}")


@pytest.mark.parametrize("error", [UsageError("u"), VolumeError("v"), MemoryError(), KeyboardInterrupt()])
def test_known_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, faults_named("a.nii"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyError("k"), np.linalg.LinAlgError("SVD"), OSError(5, "EIO")])
def test_any_exception_of_a_reader_leaves_one_case_out(tmp_path, monkeypatch, log, error):
    write_site(tmp_path / "in", cases=3)
    monkeypatch.setattr(image_reader, "read_volume", fail_on("case1", error, image_reader.read_volume))
    made = prepare(tmp_path / "in", tmp_path / "out", PrepareConfig(domain="x", size=16, z_bins=4))
    assert [case.name for case in made.store.cases] == ["case0", "case2"]
    assert type(error).__name__ in made.failed["case1"]
    assert made.failed["case1"].endswith(str(log))
    assert "test_faults.py" in log.read_text()  # where it was raised
    assert made.accounting.count("left out") == 2


def test_an_error_while_a_case_is_searched_leaves_it_out(tmp_path, monkeypatch, log):
    write_site(tmp_path, cases=3)
    monkeypatch.setattr(cases, "only_volume", fail_on("case1", RuntimeError("odd"), cases.only_volume))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["case0", "case2"]
    assert "unforeseen error (RuntimeError: odd)" in found.problems["case1"]


def test_readers_of_images_and_labels_name_the_file(tmp_path, monkeypatch, log):
    image, label = ball_volume()
    path = tmp_path / "l.nii"
    write_volume(path, label)
    monkeypatch.setattr(image_reader, "read_volume", fail_on("l.nii", ValueError("odd"), None))
    with pytest.raises(VolumeError, match=r"l\.nii: failed with an unforeseen error \(ValueError: odd\)"):
        read_image((path,))
    monkeypatch.setattr("fedfactory.imaging.label_maps.read_volume", fail_on("l.nii", ValueError("odd"), None))
    with pytest.raises(VolumeError, match=r"l\.nii: failed with an unforeseen error"):
        read_label_map(CaseFiles("c", (path,), (LabelFile(path),)), image_of(image))


@pytest.mark.parametrize("command", [
    ["evaluate", "a", "a", "--out", "c"], ["weaken-labels", "a", "--out", "b", "--kind", "box"],
])  # fmt: skip
def test_an_unforeseen_error_of_a_command_is_one_line(tmp_path, monkeypatch, capsys, log, command):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    target = {
        "evaluate": "fedfactory.adaptation.evaluation.evaluate.find_labels",
        "weaken-labels": "fedfactory.adaptation.labels.weak_labels.find_cases",
    }[command[0]]

    def broken(*_, **__):
        raise IndexError("list index\nout of range")

    monkeypatch.setattr(target, broken)
    code, text = run(capsys, *command)
    assert code == 1
    assert text == (
        "fedfactory: this command: failed with an unforeseen error (IndexError: list index); its traceback is in "
        f"{log}\n"
    )
    assert "Traceback" in log.read_text()


def test_lack_of_memory_is_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise MemoryError

    monkeypatch.setattr("fedfactory.adaptation.evaluation.evaluate.find_labels", broken)
    code, text = run(capsys, "evaluate", tmp_path, tmp_path, "--out", tmp_path / "c")
    assert (code, text.count("\n")) == (1, 1)
    assert "memory" in text


def test_warnings_of_libraries_are_not_printed(tmp_path, monkeypatch, capsys):
    def warns(*_, **__):
        warnings.warn("All-NaN slice encountered", RuntimeWarning, stacklevel=1)
        raise UsageError("the end")

    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.setattr("fedfactory.adaptation.evaluation.evaluate.find_labels", warns)
    assert run(capsys, "evaluate", tmp_path, tmp_path, "--out", tmp_path / "c") == (2, "fedfactory: the end\n")


COMMANDS_WITH_A_DEVICE = [
    ["segment", "i", "--model", "m", "--out", "o"],
    ["generate-volumes", "--factory", "f", "--domain", "d", "--out", "o"],
    ["adapt", "--store", "s", "--out", "o", "--factory", "f"],
    ["plan", "s"],
    ["embed", "s", "--encoder", "e", "--weights", "w"],
]


@pytest.mark.parametrize("words", COMMANDS_WITH_A_DEVICE, ids=lambda words: words[0])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", "mps", "xpu"])
def test_a_device_that_the_machine_lacks_is_one_line(monkeypatch, capsys, words, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    code, text = run(capsys, *words, "--device", device)
    line = f"fedfactory: --device is '{device}'; PyTorch finds no such device on this machine, choose cpu\n"
    assert (code, text) == (2, line)


@pytest.mark.parametrize("words", COMMANDS_WITH_A_DEVICE, ids=lambda words: words[0])
@pytest.mark.parametrize(
    "device", ["gpu", "", "CUDA", "cuda:", "cuda:-1", "cuda:x", "0", "cpu:0", "meta", "cuda:٣", "cuda:0 "]
)
def test_nonsense_is_no_device(capsys, words, device):
    code, text = run(capsys, *words, "--device", device)
    assert (code, text) == (
        2, f"fedfactory: --device is '{device}'; choose cpu, cuda, or cuda:N for the GPU with number N\n"
    )  # fmt: skip


def test_the_number_of_a_gpu_must_be_there_and_is_written_as_pytorch_does(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, text = run(capsys, "plan", "s", "--device", "cuda:2")
    assert (code, text) == (2, "fedfactory: --device is 'cuda:2'; this machine has 2, with numbers from 0 to 1\n")
    for device in ("cuda", "cuda:1", "cuda:01"):  # PyTorch itself refuses a leading zero
        assert "no slice store here" in run(capsys, "plan", "s", "--device", device)[1]


def test_a_driver_that_fails_counts_as_no_device(monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "PyTorch finds no such device" in run(capsys, "plan", "s", "--device", "cuda")[1]
