"""What an import loads, and who may import whom."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

import pcenet

PACKAGE = Path(pcenet.__file__).parent
ROOT = Path(__file__).parents[1]
HEAVY = {
    "av",
    "matplotlib",
    "gradio",
    "onnx",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "scipy",
    "sklearn",
    "segmentation_models_pytorch",
}
EVERYWHERE = {
    "catalogue",
    "choices",
    "reading",
    "texts",
    "writing",
    "yaml_files",
}  # single modules, which import none of the parts
# Who may import whom, itself and these aside.
ALLOWED = {
    "ops": set(),
    "nn": {"ops"},
    "upcycling": {"nn"},
    "models": {"nn", "upcycling"},
    "scenes": set(),
    "data": {"scenes"},
    "runtime": {"ops", "nn"},
    "runs": {"nn"},
    "reporting": {"runtime", "runs"},
    "tasks": {"nn", "models", "data", "runtime", "runs", "reporting"},
    "analysis": {"nn", "models", "data", "runs", "reporting", "tasks"},
    "training": {"ops", "nn", "models", "data", "runtime", "runs", "reporting", "tasks", "analysis"},
    "comparison": {"models", "runtime", "runs", "reporting", "tasks", "training"},
    "app": {"models", "nn", "data", "runtime", "runs", "reporting", "tasks", "analysis"},
    "exporting": {"ops", "nn", "models", "data", "runtime", "runs", "tasks"},
    "inference": {"nn", "models", "data", "runtime", "runs", "reporting", "tasks", "analysis", "exporting"},
    "explanation": {"nn", "models", "data", "runtime", "runs", "reporting", "tasks", "analysis", "inference"},
    "publish": {"nn", "models", "data", "runtime", "runs", "reporting", "tasks", "analysis"},
}


def test_no_part_has_the_name_of_what_users_will_call():
    """Importing the part would put it in the function's place."""
    functions = {"train", "predict", "evaluate", "explain", "export", "compare", "push", "upcycle", "load_model"}
    assert not functions & {path.name for path in PACKAGE.iterdir()}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_layer_alone_loads_torch_alone():
    loaded = loaded_by("import pcenet.nn")
    assert "torch" in loaded
    assert not (HEAVY | {"timm", "torchvision", "huggingface_hub", "pcenet.models"}) & loaded


def test_the_package_loads_nothing():
    assert not (HEAVY | {"torch", "timm"}) & loaded_by("import pcenet")


@pytest.mark.parametrize(
    "code",
    [
        "import pcenet, timm",
        pytest.param("import timm, pcenet", marks=pytest.mark.slow),
        pytest.param("import pcenet\nfrom timm.models import create_model\nimport timm", marks=pytest.mark.slow),
        pytest.param("import pcenet.nn, timm", marks=pytest.mark.slow),
        # Looking for timm without importing it must not use the registration up.
        pytest.param(
            "import pcenet, importlib.util as u\nassert u.find_spec('timm').loader.get_source('timm')\nimport timm",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_networks_are_registered_whichever_comes_first(code):
    loaded = loaded_by(f"{code}\ntimm.create_model('pce_nano', num_classes=10)")
    assert not HEAVY & loaded


@pytest.mark.slow
def test_the_hook_leaves_when_it_has_fired():
    loaded_by(
        "import sys, pcenet, timm\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'pcenet']\n"
        "assert timm.__spec__.loader is timm.__loader__\n"
        "assert type(timm.__loader__).__name__ == 'SourceFileLoader'"
    )


@pytest.mark.slow
def test_timm_can_be_imported_where_the_networks_cannot():
    loaded_by(
        "import sys, warnings\nsys.modules['safetensors.torch'] = None\nimport pcenet\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import timm\n"
        "assert 'pcenet could not register its networks' in str([w.message for w in caught])\n"
        "assert 'pce_nano' not in timm.list_models()"
    )


# What a method of a network imports when it is called.
CALLED = {("models/hub.py", "pcenet.inference.predictions")}


def test_imports_point_up_only():
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        part = relative.parts[0] if len(relative.parts) > 1 else None
        for name in _imported(path):
            if part in ALLOWED and name.startswith("pcenet.") and (str(relative), name) not in CALLED:
                allowed = ALLOWED[part] | {part} | (EVERYWHERE if part not in ("nn", "ops") else set())
                assert name.split(".")[1] in allowed, f"{relative} imports {name}"


def test_no_file_imports_itself_by_way_of_others():
    """Not what a function imports when it is called, nor what only type checkers read."""
    files = {path.relative_to(PACKAGE.parent).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}
    arrows = {name: _imported(path, modules) & modules.keys() - {name} for name, path in modules.items()}
    while free := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - free for name, targets in arrows.items() if name not in free}
    assert not arrows


@pytest.mark.parametrize("part", ["inference.predict", "exporting.command", "explanation.command", "app.server"])
def test_a_trained_network_is_used_without_a_training_framework(part):
    assert not {"lightning", "torchmetrics", "pcenet.training"} & loaded_by(f"import pcenet.{part}")


SCRIPTS = sorted(path for folder in ("examples", "experiments", "benchmarks") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_scripts_import_from_the_package_is_there(path):
    """They run for minutes or hours, so that no test runs all of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "pcenet":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def _imported(path: Path, modules: Collection[str] = ()) -> set[str]:
    """The modules that a file imports; where all are given, those of its outermost level alone."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if modules else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                own = f"{node.module}.{alias.name}"
                names.add(own if node.module == "pcenet" or own in modules else node.module)
    return names
