"""Rules of the house that a reader should be able to rely on."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import fedfactory
import pytest
from fedfactory.adaptation.federated_method import MethodConfig
from fedfactory.adaptation.segmenter_training import SegmenterConfig
from fedfactory.errors import ConfigError
from fedfactory.generative import FactoryConfig
from fedfactory.slicing import SliceFormat

PACKAGE = Path(fedfactory.__file__).parent
ROOMS = ("generative", "adaptation", "node", "researcher", "commands")
MODULES = [*PACKAGE.glob("*.py"), *(path for room in ROOMS for path in (PACKAGE / room).glob("*.py"))]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a module imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 2 or (node.level == 1 and path.parent == PACKAGE):
                rooms.add(parts[0])
            elif node.level == 0 and parts[0] == "fedfactory" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms & set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if path.name in ("cli.py", "generate_volumes.py") and path.parent == PACKAGE:
        return
    rank = ROOMS.index(path.parent.name) if path.parent != PACKAGE else -1
    assert all(ROOMS.index(room) <= rank for room in imported_rooms(path))


def test_the_synthesis_script_needs_no_federation():
    assert imported_rooms(PACKAGE / "generate_volumes.py") <= {"generative", "adaptation"}


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
    """But the one that reads the published program's slices, through a loader that knows arrays only."""
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
def test_a_factory_configuration_is_checked_at_the_door(changes, message):
    with pytest.raises(ConfigError, match=message):
        FactoryConfig.from_dict({"domains": ("a",), **changes})


def test_a_configuration_survives_json():
    import json

    config = FactoryConfig.preset("small", ("a", "b"))
    assert FactoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_plan_that_travels_is_short_and_names_its_version():
    import inspect

    from fedfactory.researcher.wire_plan import FactoryPlan, SharedDiscriminatorPlan

    for plan in (FactoryPlan, SharedDiscriminatorPlan):
        assert len(inspect.getsource(plan).splitlines()) < 25
        lines = plan.init_dependencies(None)
        assert any(f"== '{fedfactory.__version__}'" in line for line in lines)


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
