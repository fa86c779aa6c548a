"""Rules of this code base: import directions, packages of the wheel, pickles, unused settings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import fields
from pathlib import Path

import fedfactory
import pytest
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import METHODS
from fedfactory.errors import ConfigError
from fedfactory.generative import FactoryConfig
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.node.protection.package_digest import digest_of_all, package_fingerprint

PACKAGE = Path(fedfactory.__file__).parent
# From the bottom to the top: a room imports from itself and from the rooms before it.
ROOMS = ("common", "imaging", "generative", "adaptation", "node", "researcher", "demo", "commands")
MODULES = [*PACKAGE.glob("*.py"), *(path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py")))]
NAMES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """Modules and packages of this package that a module imports, lazily and for types too, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*path.relative_to(PACKAGE).parts[: -node.level], *parts]
            elif parts[:1] == ["fedfactory"]:
                parts = parts[1:]
            else:
                continue
            name = ".".join(parts)
            modules = {f"{name}.{alias.name}".lstrip(".") for alias in node.names} & NAMES.keys()
            found |= modules or {name if name in NAMES else f"{name}.__init__".lstrip(".")}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fedfactory.") for alias in node.names if "fedfactory." in alias.name}
    return found


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of a directed graph as the names along it; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for following in sorted(arrows.get(name, ())):
            if circle := walk(following, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in arrows if (circle := walk(name, []))), [])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    top = len(ROOMS) if path.parent == PACKAGE and path.stem in ("cli", "generate_volumes") else -1
    rank = ROOMS.index(path.relative_to(PACKAGE).parts[0]) if path.parent != PACKAGE else top
    rooms = {name.split(".")[0] for name in imported_modules(path)} & set(ROOMS)
    assert all(ROOMS.index(room) <= rank for room in rooms)


def test_no_circles_among_modules_and_folders():
    arrows = {name: imported_modules(path) for name, path in NAMES.items()}
    assert circle_in(arrows) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]  # the search finds a circle
    # A folder inside a room counts as one module; modules beside it count singly.
    for depth in (1, 2):

        def folder(name, depth=depth):
            parts = name.split(".")
            return ".".join(parts[:depth]) if len(parts) > depth else name

        folders: dict[str, set[str]] = {}
        for name, targets in arrows.items():
            folders.setdefault(folder(name), set()).update(folder(target) for target in targets)
        assert circle_in({name: targets - {name} for name, targets in folders.items()}) == []


def test_rooms_that_run_without_a_federation_import_none():
    for name, path in NAMES.items():
        if name.split(".")[0] in ("common", "imaging", "generative", "adaptation"):
            assert not re.search(r"^\s*(from|import) fedbiomed", path.read_text(), re.MULTILINE), name


def test_the_packages_of_the_wheel_are_those_of_the_tree():
    """A package that is not listed in pyproject.toml is missing from the wheel, and no other test notices."""
    listed = set(re.findall(r'^    "(fedfactory[\w.]*)",$', (PACKAGE / "pyproject.toml").read_text(), re.MULTILINE))
    folders = {path.parent.relative_to(PACKAGE) for path in MODULES}
    assert listed == {".".join(("fedfactory", *folder.parts)) for folder in folders}
    assert all((PACKAGE / folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("config", [FactoryConfig, SegmenterConfig, SliceFormat, MethodConfig])
def test_every_setting_is_read(config):
    code = "".join(path.read_text() for path in MODULES)
    unread = [
        f.name
        for f in fields(config)
        if not any(f"{owner}.{f.name}" in code for owner in ("config", "fmt", "format", "self"))
    ]
    assert not unread, f"nothing reads {unread}: use them or delete them"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_reads_pickles(path):
    """Only `original_slices.py` may read pickles, through a loader that accepts arrays alone."""
    code = path.read_text()
    assert "allow_pickle=True" not in code
    if re.search(r"^\s*import pickle|from pickle import (?!UnpicklingError$)", code, re.MULTILINE):
        assert path.name == "original_slices.py"
        assert set(re.findall(r"pickle\.(\w+)", code)) == {"Unpickler", "UnpicklingError"}
        assert code.count("pickle.Unpickler") == 1  # subclassed, never used as it is
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ()}, "at least one"),
        ({"domains": ("a", "a")}, "each once"),
        ({"domains": ("a", " ")}, "empty"),
        ({"image_size": 48}, "power of two"),
        ({"image_size": 4}, "power of two"),
        ({"start_size": 6}, "power of two"),
        ({"channels": (8, 8)}, "one each"),
        ({"channels": (8, 0, 8)}, "at least 1"),
        ({"z_bins": 0}, "z_bins is 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"learning_rate": 0.0}, "positive"),
        ({"learning_speed": 1.0}, "unknown settings"),
        ({"z_bins": "many"}, "whole number"),
        ({"head": "other"}, "choose from palette, image"),
        ({"conditioning": "late"}, "choose from auto, head, mapping"),
        ({"discriminator": "public"}, "choose from local, shared"),
        ({"texture": 2.0}, "from 0 to 1"),
    ],
)
def test_a_factory_configuration_is_checked_when_it_is_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        FactoryConfig.from_dict({"domains": ("a",), **changes})


def test_a_configuration_survives_json():
    import json

    config = FactoryConfig.preset("small", ("a", "b"))
    assert FactoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_plan_that_travels_is_short_and_names_its_version():
    import inspect

    from fedfactory.researcher.plans.factory_plans import FactoryPlan, LabelledFactoryPlan, SharedDiscriminatorPlan

    for plan in (FactoryPlan, LabelledFactoryPlan, SharedDiscriminatorPlan):
        assert len(inspect.getsource(plan).splitlines()) < 25
        lines = plan.init_dependencies(None)
        assert any(f"== '{fedfactory.__version__}'" in line for line in lines)


def test_a_module_in_any_folder_changes_the_fingerprint_that_administrators_approve(tmp_path):
    copy = tmp_path / "fedfactory"
    for path in MODULES:
        (copy / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(PACKAGE))
    before = package_fingerprint(copy)
    assert before == package_fingerprint()
    assert set(before) == {path.relative_to(PACKAGE).as_posix() for path in MODULES}
    for room in ROOMS:
        new = copy / room / "further" / "deeper" / "new_module.py"
        new.parent.mkdir(parents=True)
        new.write_text("")
        after = package_fingerprint(copy)
        assert after.keys() - before.keys() == {new.relative_to(copy).as_posix()}
        assert digest_of_all(after) != digest_of_all(before)
        before = after
    changed = copy / "adaptation" / "methods" / "registry.py"
    changed.write_text(changed.read_text() + "\n")
    assert digest_of_all(package_fingerprint(copy)) != digest_of_all(before)


@pytest.mark.tutorial
def test_the_wheel_holds_all_modules_and_its_command_runs(tmp_path):
    """Built from a copy of the tree, and installed where the repository cannot be imported."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    web = sorted(path.relative_to(PACKAGE) for path in (PACKAGE / "researcher" / "watching" / "web").iterdir())
    modules = [path.relative_to(PACKAGE) for path in MODULES]
    for name in [*modules, *web, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(["uv", "venv", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "--no-deps", "--offline", "--python", python, wheel], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # Dependencies come from the current environment; its .pth files are not read, because they add the repository.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    installed = {path.relative_to(packages / "fedfactory") for path in (packages / "fedfactory").rglob("*.py")}
    assert installed == set(modules)
    assert web and all((packages / "fedfactory" / name).read_bytes() == (PACKAGE / name).read_bytes() for name in web)

    def run(*command) -> str:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True)
        return done.stdout

    assert run(python, "-c", "import fedfactory; print(fedfactory.__file__)").strip().startswith(str(packages))
    listed = run(environment / "bin" / "fedfactory", "methods")
    assert all(name in listed for name in METHODS)


def test_the_version_is_written_once_in_the_package_and_once_in_its_metadata():
    assert f'version = "{fedfactory.__version__}"' in (PACKAGE / "pyproject.toml").read_text()


def test_the_private_parts_of_fed_biomed_are_where_they_were():
    """Fails loudly when the framework changes under `node/fedbiomed_hooks.py` or the researcher's debug switch."""
    import inspect

    from fedbiomed.common.training_plans import TorchTrainingPlan
    from fedbiomed.node import node_pm
    from fedbiomed.node.training_plan_security_manager import TrainingPlanSecurityManager

    for name in ("_configure_model_and_optimizer", "_set_device"):
        assert hasattr(TorchTrainingPlan, name)
    assert "secure" in inspect.signature(TrainingPlanSecurityManager.get_training_plan_by_id).parameters
    assert "--node-args" in inspect.getsource(node_pm)
    workflow = Path(inspect.getfile(TorchTrainingPlan)).parents[2] / "researcher" / "federated_workflows"
    assert "FBM_DEBUG" in (workflow / "_federated_workflow.py").read_text()
