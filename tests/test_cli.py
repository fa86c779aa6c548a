"""The command line: its output, its exit codes, and errors that take a single line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fedfactory
import pytest
import torch
from fedfactory.adaptation import choices
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labels.weak_labels import CONVERTERS
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.volume_formats import WRITERS
from fedfactory.cli import main
from fedfactory.commands.terminal import with_flags
from fedfactory.errors import UsageError
from helpers import ball_volume, small_config, untrained_labelled_factory, write_site

COMMANDS = [
    ["demo"], ["prepare"], ["import-slices"], ["embed"], ["gaze"], ["weaken-labels"], ["plan"], ["site", "add"],
    ["site", "approve"], ["train"], ["export"], ["import-checkpoint"], ["train-segmenter"], ["adapt-remote"], ["label"],
    ["generate-volumes"], ["audit"], ["adapt"], ["segment"], ["evaluate"], ["train-localiser"], ["locate"],
    ["sites"], ["status"], ["watch"], ["report"],
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
        "import fedfactory; from fedfactory.generative import *; assert FactoryTrainer.__name__ == 'FactoryTrainer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_public_name_is_imported_at_its_first_use_and_an_unknown_name_is_refused():
    import fedfactory.researcher as room
    from fedfactory.researcher.experiment import factory_experiment

    assert room.factory_experiment is factory_experiment
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        room.no_such_name  # noqa: B018


MADE = str(Path(__file__).resolve())  # a file that is there

# Decided by the command line and by what is there: (words, exit code, part of the output). What stands above the first
# row that prepares is decided by the command line alone.
QUICK = [
    (["--help"], 0, "train-segmenter"),
    (["methods"], 0, "fedicra"),
    *(([*command, "--help"], 0, "Show this message") for command in COMMANDS),
    (["adapt", "--nonsense"], 2, "--nonsense"),
    (["train"], 2, "--researcher"),
    (["status"], 2, "argument"),
    (["demo", "--preset", "xl"], 2, "--preset is 'xl'; choose tiny, small or paper"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--label-kind", "odd"], 2, "--label-kind is 'odd'"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--plane", "odd"], 2, "--plane is 'odd'"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--label-kind", "point"], 2, "--unlabelled-value"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--spacing", 1, "--field-of-view", 150], 2,
     "--spacing is 1 and --field-of-view is 150 mm; give one of them"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--field-of-view", 0], 2, "--field-of-view is 0.0; it must be"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--centres", "no.csv"], 2, "no.csv: cannot be read as a table"),
    (["prepare", "x", "--out", "y", "--domain", "a", "--centres", "c", "--localiser", "l"], 2,
     "--centres is c and --localiser is l; give one of them"),
    (["gaze", "x", "--refine", "odd"], 2, "--refine is 'odd'; choose crf or none"),
    (["gaze", "x", "--loose", 0.9], 2, "--loose is 0.9"),
    (["gaze", "x", "--sigma", 0], 2, "--sigma is 0.0; choose a number above 0"),
    (["weaken-labels", "x", "--out", "y", "--kind", "odd"], 2, "--kind is 'odd'"),
    (["embed", "x", "--encoder", "e", "--weights", "w", "--device", "gpu"], 2, "--device is 'gpu'; choose cpu, cuda"),
    (["site", "add", "x", "--store", "y", "--tag", "abc", "--network", "odd"], 2, "--network is 'odd'; choose unet"),
    (["site", "add", "x", "--store", "y", "--tag", "abc", "--other", "mri"], 2, "--other is 'mri'; write MODALITY="),
    (["site", "add", "x", "--store", "y", "--tag", "abc", "--other", "mri=z"], 2, "give --modality"),
    (["train", "--researcher", "x", "--out", "y", "--tag", "abc"], 2, "give either --domains or --config"),
    (["train", "--researcher", "x", "--out", "y", "--tag", "abc", "--domains", "a,,b"], 2, "empty"),
    (["train", "--researcher", "x", "--out", "y", "--tag", "abc", "--domains", "a,a"], 2, "--domains are"),
    (["train", "--researcher", "x", "--out", "y", "--domains", "a,b"], 2, "--tag is ''"),
    (["train", "--researcher", "x", "--out", "y", "--domains", "a,b", "--preset", "xl"], 2, "--preset is 'xl'"),
    (["train", "--researcher", "x", "--out", "y", "--weighting", "odd"], 2, "--weighting is 'odd'; choose samples or"),
    (["train", "--researcher", "x", "--out", "y", "--tag", "abc", "--domains", "a", "--secagg", "--transport",
      "float16"], 2, "--transport is 'float16'"),
    (["train", "--researcher", "x", "--out", "y", "--tag", "abc", "--domains", "a", "--secagg", "--transport",
      "int8"], 2, "--transport is 'int8'; with"),
    (["train-segmenter", "--method", "odd", "--researcher", "x", "--tag", "abc", "--out", "y"], 2,
     "--method is 'odd'; choose one of local, fedavg"),
    (["train", "--method", "odd", "--researcher", "x", "--tag", "abc", "--out", "y"], 2, "--method is 'odd'"),
    (["train-segmenter", "--method", "hssf", "--researcher", "x", "--tag", "abc", "--out", "y"], 2, "--public is"),
    (["train-segmenter", "--method", "fedbn", "--researcher", "x", "--tag", "abc", "--out", "y", "--option", "a"], 2,
     "--option is 'a'; write NAME=VALUE"),
    (["adapt-remote", "--factory", "f", "--researcher", "x", "--tag", "abc", "--out", "y", "--engine", "odd"], 2,
     "--engine is 'odd'; choose segmenter or translator"),
    (["import-checkpoint", "f.pt", "--out", "y", "--domains", "a,a"], 2, "--domains are"),
    (["label", "--factory", "f", "--store", "x", "--out", "y", "--labelling", "odd"], 2, "--labelling is 'odd'"),
    (["generate-volumes", "--out", "y"], 2, "give either --factory or --ckpt_dir"),
    (["generate-volumes", "--factory", "f", "--domain", "a", "--label", 1], 2, "give either --domain or --label"),
    (["generate-volumes", "--factory", "f", "--domain", "a"], 2, "--out_dir is None; give a new folder"),
    (["generate-volumes", "--factory", "f", "--domain", "a", "--layout", "odd"], 2, "--layout is 'odd'"),
    (["audit", "--factory", "f", "--store", "x", "--out", "y", "--encoder", "e"], 2, "give its --weights"),
    (["adapt", "--store", "x", "--out", "y"], 2, "give either --factory or --synthetic"),
    (["adapt", "--store", "x", "--out", "y", "--factory", "f", "--network", "odd"], 2, "--network is 'odd'"),
    (["adapt", "--store", "x", "--out", "y", "--factory", "f", "--precision", "odd"], 2, "--precision is 'odd'"),
    (["adapt", "--store", "x", "--out", "y", "--synthetic", "s", "--engine", "translator"], 2, "give --factory"),
    (["adapt", "--store", "x", "--out", "y", "--factory", "f", "--updates", 9, "--minutes", 5], 2,
     "--updates is 9 and --minutes is 5.0; give one of them"),
    (["plan", "--help"], 0, "--size-of-network"),
    (["plan", "x", "--size-of-network", "odd"], 2, "--size-of-network is 'odd'; choose small, standard or"),
    (["plan", "x", "--memory", 0], 2, "--memory is 0.0; choose a number above 0"),
    # A file or folder that is not there.
    (["prepare", "no", "--out", "y", "--domain", "a"], 2, "no: no such folder; give a folder of cases"),
    (["import-slices", "no", "--out", "y", "--domain", "a"], 2, "no: no such folder"),
    (["weaken-labels", "no", "--out", "y", "--kind", "box"], 2, "no: no such folder"),
    (["embed", "no", "--encoder", "e", "--weights", "w"], 2, "no: no slice store here"),
    (["gaze", "no"], 2, "no: no slice store here"),
    (["plan", "no"], 2, "no: no slice store here"),
    (["label", "--factory", "no", "--store", "x", "--out", "y"], 2, "no: no such file; give a factory"),
    (["audit", "--factory", "no", "--store", "x", "--out", "y"], 2, "no: no such file; give a labelled factory"),
    (["generate-volumes", "--factory", "no", "--domain", "a", "--out", "y"], 2, "no: no such file; give a labelled"),
    (["generate-volumes", "--ckpt_dir", "no", "--domain", "a", "--out", "y"], 2, "no: no such folder"),
    (["adapt", "--store", "no", "--factory", "f", "--out", "y"], 2, "no: no slice store here"),
    (["segment", "no.nii", "--model", "no", "--out", "y"], 2, "no: no such file; give a segmenter"),
    (["segment", "no.nii", "--model", MADE, "--out", "y"], 2, "no.nii: no such file or folder; give images"),
    (["locate", "no.nii", "--localiser", "no", "--out", "y"], 2, "no: no such file; give a labelled factory or segm"),
    (["evaluate", "no", "x", "--out", "y.csv"], 2, "no: no such file or folder; give label maps"),
    (["train-localiser", "--store", "no", "--out", "y"], 2, "no: no slice store here"),
    (["export", "no", "--out", "y"], 2, "experiment is no; choose a folder that a training run wrote"),
    (["status", "no"], 2, "experiment is no; choose a folder that a training run wrote"),
    (["import-checkpoint", "no", "--out", "y"], 2, "no: no such file; give a checkpoint"),
    (["train", "--researcher", "no", "--out", "y", "--tag", "abc", "--domains", "a,b"], 2, "no Fed-BioMed researcher"),
    (["train-segmenter", "--method", "fedavg", "--researcher", "no", "--tag", "abc", "--out", "y"], 2,
     "no Fed-BioMed researcher here"),
    (["adapt-remote", "--factory", MADE, "--researcher", "no", "--tag", "abc", "--out", "y"], 2,
     "no Fed-BioMed researcher here"),
    (["sites", "--researcher", "no", "--tag", "abc"], 2, "no Fed-BioMed researcher here"),
    (["check", "no"], 2, "no Fed-BioMed researcher here"),
    (["site", "add", "no", "--store", "no", "--tag", "abc"], 2, "no: no slice store here"),
    *((["site", name, "no"], 2, "no Fed-BioMed node") for name in ("approve", "check", "clean", "ledger", "policy")),
]  # fmt: skip
LARGE = ("torch", "monai", "fedbiomed", "scipy", "skimage", "matplotlib", "nibabel", "pydicom", "cv2")
FEW = ("numpy", "psutil")  # small enough for a command that uses them to decide what it was given
DRIVER = """
import contextlib, io, json, sys
from fedfactory.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    text = io.StringIO()
    import fedfactory.commands.terminal as terminal
    terminal.console.file = terminal.errors.file = text
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(words)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    answers.append([code, text.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(answers))
"""


def test_help_mistyped_options_and_missing_files_need_no_large_library(tmp_path):
    """PyTorch and Fed-BioMed take ten seconds to import; a mistyped option should not wait for them."""
    words = json.dumps([[str(word) for word in words] for words, _, _ in QUICK])
    command = [sys.executable, "-c", DRIVER, words, json.dumps([*LARGE, *FEW])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    prepared = False
    for (typed, code, part), (ended, text, imported) in zip(QUICK, json.loads(done.stdout), strict=True):
        assert set(imported) <= set(FEW), typed
        assert ended == code and part in text, (typed, text)
        prepared |= typed[0] == "prepare" and "--help" not in typed
        assert prepared or not imported, typed
    assert not list(tmp_path.iterdir())


def test_local_commands_import_no_federation_and_preparing_no_pytorch(tmp_path):
    """In each row all that a command imports is imported before it finds that a file is damaged."""
    write_site(tmp_path / "site")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    cut, store, damaged = "cut.safetensors", "site.store", "cut.safetensors: not a readable"
    rows = [
        (["prepare", "site", "--out", store, "--domain", "a", "--size", 16, "--z-bins", 4, "--workers", 1], 0, "added"),
        (["weaken-labels", "site", "--out", "weak", "--kind", "box"], 0, "cases; next"),
        (["evaluate", "site", "site", "--out", "scores.csv"], 0, "mean foreground Dice"),
        (["gaze", store], 2, "no fixations"),
        (["plan", store], 0, "network"),
        (["label", "--factory", cut, "--store", store, "--out", "y"], 1, damaged),
        (["pseudo-label", store, "--segmenter", cut], 1, damaged),
        (["audit", "--factory", cut, "--store", store, "--out", "y"], 1, damaged),
        (["generate-volumes", "--factory", cut, "--domain", "a", "--out", "y"], 1, damaged),
        (["adapt", "--store", store, "--factory", cut, "--out", "y"], 1, damaged),
        (["segment", "site", "--model", cut, "--out", "y"], 1, damaged),
        (["locate", "site", "--localiser", cut, "--out", "y"], 1, damaged),
        (["embed", store, "--encoder", "RN50", "--weights", cut], 1, cut),
        (["import-checkpoint", cut, "--out", "y"], 1, cut),
        (["status", "site"], 2, "choose a folder that a training run wrote"),
    ]
    words = json.dumps([[str(word) for word in words] for words, _, _ in rows])
    command = [sys.executable, "-c", DRIVER, words, json.dumps(["fedbiomed", "torch", "monai"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    answers = json.loads(done.stdout)
    for (typed, code, part), (ended, text, imported) in zip(rows, answers, strict=True):
        assert ended == code and part in text, (typed, text)
        assert "fedbiomed" not in imported, typed
    assert answers[0][2] == []


def test_the_names_that_commands_accept_are_those_of_the_tables_behind_them():
    assert tuple(WRITERS) == choices.LAYOUTS
    assert sorted(CONVERTERS) == sorted(choices.WEAK_LABEL_KINDS)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("label_kind is 'x'; choose dense", "--label-kind is 'x'; choose dense"),
        ("volumes must be at least 1", "--n_volumes must be at least 1"),
        ("label_kind is 'point'; give unlabelled_value", "--label-kind is 'point'; give --unlabelled-value"),
        ("give either `domain` or `label`", "give either --domain or --label"),
        ("image_size is 33; choose a power of two", "image_size is 33; choose a power of two"),  # no flag of its own
        ("domain names differ", "domain names differ"),  # a word of the sentence
        ("/data/label_kind/a.nii: no such file", "/data/label_kind/a.nii: no such file"),
        ("label_kind.nii: no such file", "label_kind.nii: no such file"),
        ("volumes is what label_kind says", "--n_volumes is what --label-kind says"),
    ],
)
def test_an_error_names_the_flag_that_declares_the_argument(message, shown):
    names = ("label_kind", "unlabelled_value", "domain", "label")
    flags = {name: f"--{name.replace('_', '-')}" for name in names} | {"volumes": "--n_volumes"}
    assert with_flags(message, flags) == shown


def test_the_former_train_method_runs_the_segmentation_and_names_its_new_command(monkeypatch, tmp_path, capsys):
    from fedfactory.researcher import segmentation

    asked = {}

    def reached(method, out, **options):
        asked.update(options, method=method, out=out)
        raise UsageError("reached")

    monkeypatch.setattr(segmentation, "train_method", reached)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "config.ini").write_text("")  # as far as the command line looks, a component
    words = ["--researcher", tmp_path, "--tag", "abc", "--rounds", 3, "--rotation", 180, "--option", "crf_weight=0.5"]
    former, moved = [], "fedfactory: `train --method` is now `fedfactory train-segmenter --method`"
    for begin in (
        ["train", "--method", "fedicra"],
        ["train", "--method=fedicra"],
        ["train-segmenter", "--method", "fedicra"],
    ):
        asked.clear()
        assert run(*begin, *words, "--out", tmp_path / "new") == 2
        assert asked["method"] == "fedicra" and asked["rounds"] == 3 and asked["options"] == {"crf_weight": 0.5}
        assert asked["rotation"] == pytest.approx(math.pi) and asked["nodes"].tag == "abc"
        former.append([line.startswith(moved) for line in capsys.readouterr().err.splitlines()])
    assert former == [[True, False], [True, False], [False]]  # the last line is that of the error


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
        (["--label", 1, "--domain", "dark"], "either --domain or --label"),
        (["--domain", "grey"], "bright, dark"),
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
    assert "2 cases of 2 patients, mean foreground Dice" in capsys.readouterr().out


def test_a_site_sees_what_would_be_trained_before_it_trains(store, labelled_file, tmp_path, capsys):
    words = ["plan", store.path, "--width", 8, "--batch-size", 3, "--rotation", 10, "--out"]
    assert run(*words, tmp_path / "plan.json", "--updates", 600) == 0
    shown = {line[:24].strip(): line[24:].strip() for line in capsys.readouterr().out.splitlines()}
    made = json.loads((tmp_path / "plan.json").read_text())
    plan = TrainingPlan.from_dict(made["plan"])
    assert (plan.updates, plan.batch_size, plan.widths[0], plan.classes) == (600, 3, 8, 3)
    assert made["minutes"] == pytest.approx(10 * made["seconds_per_update"]) and made["seconds_per_update"] > 0
    assert made["memory"] == plan.memory and made["slices"] == len(store.slices("train"))
    assert made["parameters"] == sum(values.numel() for values in PlannedNetwork(plan).parameters())
    assert shown["network"].startswith("dynunet, ") and shown["channels by level"] == "8 16 16"
    assert shown["window"] == f"16 x 16 pixels, {16 * store.format.spacing:.0f} mm"
    assert shown["updates"].startswith("600, ") and shown["batch"] == "3 windows"
    assert shown["training"] == f"about {max(1, math.ceil(made['minutes']))} min on this machine"


def test_the_plan_of_an_unlabelled_site_goes_on_from_the_factorys_first_guess(store, labelled_file, tmp_path, capsys):
    factory = LabelledFactory.load(labelled_file)
    factory.robust.card = replace(factory.robust.card, settings=small_config().to_dict())
    factory.save(tmp_path / "l.safetensors")
    index = json.loads((store.path / "store.json").read_text())
    for case in index["cases"]:
        case["label_kind"] = "none"
    (store.path / "store.json").write_text(json.dumps(index))
    words = ["plan", store.path, "--size-of-network", "small", "--width", 8, "--minutes", 0.01]
    words += ["--precision", "float32"]  # some processors would choose another
    assert run(*words) == 1
    assert "no case of this store has dense labels" in capsys.readouterr().err
    assert run(*words, "--factory", tmp_path / "l.safetensors", "--out", tmp_path / "plan.json") == 0
    plan = TrainingPlan.from_dict(json.loads((tmp_path / "plan.json").read_text())["plan"])
    was = factory.robust.card.plan
    assert plan == replace(was, updates=plan.updates, learning_rate=was.learning_rate / 2)
    assert 1 <= plan.updates < 600  # an update takes at least a millisecond


def test_bad_input_is_one_line_with_the_right_exit_code(tmp_path, capsys, labelled_file):
    write_site(tmp_path / "site")
    (tmp_path / "text" / "a" / "image").mkdir(parents=True)
    (tmp_path / "text" / "a" / "image" / "x.nii.gz").write_text("notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "store.json").write_text("{}")
    (tmp_path / "no.nii").write_text("notes")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(labelled_file.read_bytes()[:1000])
    out = ["--out", tmp_path / "new"]
    prepare = ["--domain", "x", "--size", 16, "--z-bins", 4, *out]
    for words, code, message in [
        (["prepare", tmp_path / "nowhere", *prepare], 2, "no such folder"),
        (["prepare", tmp_path / "empty", *prepare], 2, "no case found"),
        (["prepare", tmp_path / "text", *prepare], 1, "x.nii.gz: is no NIfTI file"),
        (
            ["prepare", tmp_path / "site", "--domain", "x", "--size", 16, "--label-kind", "odd", *out],
            2,
            "--label-kind is",
        ),
        (["generate-volumes", "--factory", cut, "--domain", "dark", *out], 1, "cut.safetensors: not a readable"),
        (["export", tmp_path / "empty", *out], 2, "choose a folder that a training run wrote"),
        (["label", "--factory", labelled_file, "--store", tmp_path / "like", *out], 1, "expected a factory"),
        (["adapt", "--factory", labelled_file, "--store", tmp_path / "empty", *out], 2, "no slice store"),
        (["plan", tmp_path / "empty", *out], 2, "no slice store"),
        (["segment", tmp_path / "no.nii", "--model", cut, *out], 1, "not a readable"),
        (["evaluate", tmp_path / "empty", tmp_path / "site", *out], 2, "no label map"),
        (["site", "add", tmp_path / "empty", "--store", tmp_path / "empty", "--tag", "abc"], 2, "no slice store"),
        (["site", "approve", tmp_path / "empty"], 2, "no Fed-BioMed node"),
        (["train", "--researcher", tmp_path / "empty", "--tag", "abc", "--domains", "a,b", *out], 2, "researcher here"),
        (["train", "--researcher", tmp_path, "--tag", "abc", *out], 2, "give either --domains or --config"),
        (["train", "--researcher", tmp_path, "--tag", "abc", "--domains", "a", "--preset", "xl", *out], 2, "preset"),
        (["demo", "--out", tmp_path], 2, "not empty"),
    ]:
        assert run(*words) == code, words
        error = capsys.readouterr().err.strip()
        assert message in error, words
        assert len(error.splitlines()) == 1, error
        assert not (tmp_path / "new").exists()
