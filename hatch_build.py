"""Puts the compiled library into the wheel where torch and a C++ compiler are at hand. Elsewhere the wheel is pure, as
in pip's isolated builds, which know no torch: the library is then compiled at first use, by the same recipe."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Hatchling calls it around the building of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform in the wheel's tag: one wheel for every Python and every torch from 2.10."""
        if version == "editable":  # compiled at first use, whenever the sources have changed
            return
        self.work = tempfile.TemporaryDirectory()
        try:
            recipe = load_recipe(Path(self.root))
            library = compile_library(recipe, Path(self.work.name))
        except Exception as error:  # a build without a library is better than none
            self.app.display_warning(f"pcenet: a pure wheel, since no kernels were compiled: {error}")
            return
        build_data["force_include"][str(library)] = f"pcenet/ops/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The library is in the wheel."""
        if version != "editable":
            self.work.cleanup()


def load_recipe(root: Path) -> ModuleType:
    """`pcenet.ops.build` on its own: the package around it needs torch."""
    spec = importlib.util.spec_from_file_location("pcenet_build", root / "pcenet/ops/build.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def compile_library(recipe: ModuleType, folder: Path) -> Path:
    """The path of the library.

    Raises:
        RuntimeError: with the reason why there is none.
    """
    if reason := recipe.unsupported():
        raise RuntimeError(reason)
    compiler = recipe.find_compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    return recipe.compile_library(folder, compiler)
