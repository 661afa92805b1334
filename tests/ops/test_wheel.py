"""Wheels with and without kernels, on machines with and without a compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from pcenet.ops import build

ROOT = Path(__file__).parents[2]
USE = """
from pcenet import ops
from pcenet.ops.library import loaded
found = loaded()
print(ops.__file__, ops.backend(), ops.why_reference(), found and found.path, sep="\\n")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def try_wheel() -> ModuleType:
    """What `make dist` runs."""
    spec = importlib.util.spec_from_file_location("try_wheel", ROOT / ".ci" / "try_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Callable[[str], NoReturn]
) -> Callable[[str | None], Path]:
    """Builds a wheel, from an sdist, with a given C++ compiler; None is the usual one."""
    if importlib.util.find_spec("hatchling") is None:
        missing("hatchling is not installed")

    def make(compiler: str | None) -> Path:
        if compiler is not None:
            monkeypatch.setenv("CXX", compiler)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        [wheel] = (tmp_path / "dist").glob("*.whl")
        assert ("a pure wheel, since no kernels were compiled" in done.stdout + done.stderr) == (compiler is not None)
        return wheel

    return make


def use(wheel: Path, tmp_path: Path, **environment: str) -> tuple[str, str, str]:
    """Backend, reason and library where a wheel is installed; with an empty cache."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "PCENET_OPS")}
    changes = {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env=kept | changes | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, *found = done.stdout.splitlines()
    assert where.startswith(str(tmp_path / "site"))
    return (found[0], found[1], found[2])


def test_kernels_of_a_wheel_need_no_compiler(
    compiler: str, wheel_of: Callable[..., Path], try_wheel: ModuleType, tmp_path: Path
) -> None:
    wheel = wheel_of(None)
    assert wheel.name.endswith(f"-py3-none-linux_{build.platform.machine()}.whl")
    assert try_wheel.check_content(wheel)
    backend, reason, path = use(wheel, tmp_path, PATH="")
    assert backend.startswith("cpu (")
    assert reason == "None"
    assert path == str(tmp_path / "site" / "pcenet" / "ops" / build.LIBRARY)
    assert not (tmp_path / "cache").exists()


def test_a_broken_compiler_makes_a_pure_wheel(
    wheel_of: Callable[..., Path], try_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PCENET_OPS", raising=False)
    wheel = wheel_of("false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not try_wheel.check_content(wheel)
    if build.unsupported() is None:
        assert use(wheel, tmp_path, PATH="") == (
            "reference",
            "kernels need a C++ compiler, and none was found ($CXX, g++, c++, clang++)",
            "None",
        )
    monkeypatch.setenv("PCENET_OPS", "required")
    with pytest.raises(AssertionError, match="no kernels were compiled"):
        try_wheel.check_content(wheel)


def test_a_pure_wheel_compiles_at_first_use(compiler: str, wheel_of: Callable[..., Path], tmp_path: Path) -> None:
    backend, reason, path = use(wheel_of("false"), tmp_path, CXX=compiler)
    assert backend.startswith("cpu (")
    assert reason == "None"
    assert Path(path).is_relative_to(tmp_path / "cache" / "pcenet")
