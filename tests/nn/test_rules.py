"""What the files of `pcenet.nn` may know of the world, read off their sources; and their examples, run."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch

import pcenet.nn
from pcenet.nn import PCELayer

SOURCES = sorted(Path(pcenet.nn.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_examples_in_docstrings_run(source: Path) -> None:
    module = importlib.import_module(f"pcenet.nn.{source.stem}" if source.stem != "__init__" else "pcenet.nn")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nn_knows_torch_ops_and_itself_alone(source: Path) -> None:
    standard = sys.stdlib_module_names
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: a relative import hides where it leads"
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            allowed = top in standard or top == "torch" or (module + ".").startswith(("pcenet.nn.", "pcenet.ops."))
            assert allowed, f"{source.name}:{node.lineno} imports {module}"
            assert top not in {"os", "random", "logging", "time", "io", "pathlib"}, f"{source.name} imports {module}"


GLOBAL_STATE = {
    "manual_seed",
    "seed",
    "set_rng_state",
    "environ",
    "getenv",
    "open",
    "set_num_threads",
    "print",
}
TRANSFERS = {"item", "tolist", "cpu", "numpy"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nn_touches_no_global_state_and_no_host(source: Path) -> None:
    """A forward pass never waits for the data; statistics are read on demand."""
    tree = ast.parse(source.read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert set(names) & GLOBAL_STATE == set()
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))
    allowed = int(source.name == "statistics.py")
    assert sum(name in TRANSFERS for name in names) <= allowed


def test_nothing_is_kept_between_forward_passes() -> None:
    """No list that grows, no record of the last batch: the layer's attributes are those it was built with."""
    layer = PCELayer(3, 3, patch_size=2)
    modules = list(layer.modules())
    before = [set(vars(module)) for module in modules]
    layer(torch.randn(1, 3, 4, 4))
    assert [set(vars(module)) for module in modules] == before
