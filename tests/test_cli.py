"""The command line: what it prints, how it ends, and that it says what is wrong in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fedfactory
import pytest
import torch
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.cli import main
from helpers import ball_volume, untrained_labelled_factory, write_site

COMMANDS = [
    ["demo"], ["prepare"], ["site", "add"], ["site", "approve"], ["train"], ["export"], ["label"],
    ["generate-volumes"], ["audit"], ["adapt"], ["segment"], ["evaluate"], ["weaken-labels"],
]  # fmt: skip


def run(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture
def labelled_file(trained, tmp_path):
    torch.manual_seed(1)
    branch = LabelBranch.for_generator(trained.generator, 3).eval()
    untrained_labelled_factory(trained, branch).save(tmp_path / "factory" / "labelled.safetensors")
    return tmp_path / "factory" / "labelled.safetensors"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_each_of_its_options(command, capsys):
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.strip().startswith("--")]
    assert options
    lines = text.splitlines()
    for line in options:  # the help stands on the option's own line, or on the next
        after = lines[lines.index(line) + 1] if line in lines[:-1] else ""
        assert len(line.split("  ")) > 2 or after.startswith("    "), line


def test_importing_the_package_needs_only_pytorch():
    code = (
        "import sys; sys.modules.update({n: None for n in ('fedbiomed', 'monai', 'safetensors', 'rich', 'nibabel')});"
        "import fedfactory, fedfactory.generative"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ["generative", "adaptation"])
def test_lower_rooms_run_without_the_federation(room):
    code = f"import sys; sys.modules['fedbiomed'] = None; import pkgutil, importlib, fedfactory.{room} as r\n"
    code += "for m in pkgutil.iter_modules(r.__path__): importlib.import_module(r.__name__ + '.' + m.name)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_original_flags_of_generate_volumes_work_as_a_script(labelled_file, tmp_path):
    script = Path(fedfactory.__file__).parent / "generate_volumes.py"
    words = ["--ckpt_dir", labelled_file.parent, "--label", 1, "--n_volumes", 2, "--slices_in_one_z", 3]
    words += ["--n_segmentation_labels", 3, "--out_dir", tmp_path / "out", "--z_depth", 4, "--batch_size", 4]
    words += ["--device", "cpu", "--n_domains", 2, "--remove_largest_components"]
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 labelled volumes of domain dark" in done.stdout
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", 2], "domains 0 to 1"),
        (["--label", 1, "--n_domains", 3], "has 2"),
        (["--label", 1, "--n_segmentation_labels", 5], "draws 3"),
        (["--label", 1, "--clip_mean", "m.npy"], "without CLIP"),
        (["--label", 1, "--domain", "dark"], "either --domain"),
        (["--domain", "grey"], "knows bright, dark"),
        (["--label", 1, "--z_depth", 5], "4 bins"),
    ],
)
def test_flags_that_contradict_the_factory_end_with_code_2(labelled_file, tmp_path, capsys, words, message):
    assert run("generate-volumes", "--ckpt_dir", labelled_file.parent, "--out_dir", tmp_path / "o", *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_site_can_go_from_volumes_to_scores_by_commands_alone(tmp_path, capsys, labelled_file):
    write_site(tmp_path / "site")
    options = ["--domain", "bright", "--size", 16, "--z-bins", 4]
    assert run("prepare", tmp_path / "site", "--out", tmp_path / "store", *options) == 0
    assert "3 cases, 3 labelled, 24 slices of 16 px" in capsys.readouterr().out
    adapt = ["adapt", "--store", tmp_path / "store", "--factory", labelled_file, "--updates", 2]
    assert run(*adapt, "--out", tmp_path / "model.safetensors") == 0
    for number in range(2):
        from fedfactory.imaging.volume_files import write_volume

        write_volume(tmp_path / "images" / f"case{number}.nii.gz", ball_volume(seed=number)[0])
    images = sorted((tmp_path / "images").iterdir())
    assert run("segment", *images, "--model", tmp_path / "model.safetensors", "--out", tmp_path / "pred") == 0
    assert run("evaluate", tmp_path / "pred", tmp_path / "site", "--out", tmp_path / "m.csv") == 0
    assert "2 cases, mean foreground Dice" in capsys.readouterr().out


def test_bad_input_is_one_line_with_the_right_exit_code(tmp_path, capsys, labelled_file):
    write_site(tmp_path / "site")
    (tmp_path / "text" / "a" / "image").mkdir(parents=True)
    (tmp_path / "text" / "a" / "image" / "x.nii.gz").write_text("notes")
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(labelled_file.read_bytes()[:1000])
    out = ["--out", tmp_path / "new"]
    prepare = ["--domain", "x", "--size", 16, "--z-bins", 4, *out]
    for words, code, message in [
        (["prepare", tmp_path / "nowhere", *prepare], 2, "no such folder"),
        (["prepare", tmp_path / "empty", *prepare], 2, "no case found"),
        (["prepare", tmp_path / "text", *prepare], 1, "x.nii.gz: cannot be read"),
        (["prepare", tmp_path / "site", "--domain", "x", "--size", 16, "--label-kind", "odd", *out], 2, "not known"),
        (["generate-volumes", "--factory", cut, "--domain", "dark", *out], 1, "cut.safetensors: not a readable"),
        (["export", tmp_path / "empty", *out], 2, "choose a folder that a training run wrote"),
        (["label", "--factory", labelled_file, "--store", tmp_path / "empty", *out], 1, "expected a factory"),
        (["adapt", "--factory", labelled_file, "--store", tmp_path / "empty", *out], 2, "no slice store"),
        (["segment", tmp_path / "no.nii", "--model", cut, *out], 1, "not a readable"),
        (["evaluate", tmp_path / "empty", tmp_path / "site", *out], 2, "no label map"),
        (["site", "add", tmp_path / "empty", "--store", tmp_path / "empty", "--tag", "abc"], 2, "no slice store"),
        (["site", "approve", tmp_path / "empty"], 2, "no Fed-BioMed node"),
        (["train", "--researcher", tmp_path / "empty", "--tag", "abc", "--domains", "a,b", *out], 2, "researcher here"),
        (["train", "--researcher", tmp_path, "--tag", "abc", *out], 2, "domains is '' and config is None"),
        (["train", "--researcher", tmp_path, "--tag", "abc", "--domains", "a", "--preset", "xl", *out], 2, "preset"),
        (["demo", "--out", tmp_path], 2, "not empty"),
    ]:
        assert run(*words) == code, words
        error = capsys.readouterr().err.strip()
        assert message in error, words
        assert len(error.splitlines()) == 1, error
        assert not (tmp_path / "new").exists()
