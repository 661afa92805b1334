"""What the tests of kernels share: a compiler, sources that take no time, a cache of their own, the library itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import backends
import pytest

from pcenet.ops import build, library

TINY = """
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""


def fail_or_skip(reason: str) -> NoReturn:
    """Skip what cannot be tested here, or fail where a compiled library is required."""
    if os.environ.get(library.VARIABLE) == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def missing() -> Callable[[str], NoReturn]:
    """`fail_or_skip`, for tests."""
    return fail_or_skip


@pytest.fixture
def compiler() -> str:
    """The path of the C++ compiler."""
    found = build.find_compiler()
    if found is None or build.unsupported():
        fail_or_skip(build.unsupported() or "there is no C++ compiler")
    return found[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of sources whose library has one function, ``answer``, that returns 42."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "bind.cpp").write_text('#include "answer.h"\n' + TINY)
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return folder


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the compiler's place; each call of it adds a line to the file that is returned."""
    calls = tmp_path / "calls"

    def put(script: str, name: str = "compiler") -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho called >> {calls}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return put


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: nothing is loaded, nothing decided. Afterwards all is as it was."""
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_choice", None)


@pytest.fixture
def kernels() -> Iterator[library.Library]:
    """The library of this process, whether it runs or not. Afterwards what ran before runs again."""
    before = library.choice()
    try:
        found = library.load()
    except build.BuildError as error:
        fail_or_skip(f"no kernels: {error}")
    yield found
    library.use(before.instructions or "reference")


def use(name: str, request: pytest.FixtureRequest) -> str:
    """Let a backend run, or skip aloud where this processor cannot."""
    if backends.INTERPRETED:
        assert library.use("triton").triton == ("cpu",)
        return name
    kernels = request.getfixturevalue("kernels")  # which restores what ran before
    if name != "reference" and name not in kernels.runnable:
        pytest.skip(f"NOT RUN, and not tested on this machine: {name}")
    library.use(name)
    return name


@pytest.fixture(params=backends.KERNELS)
def compiled(request: pytest.FixtureRequest) -> str:
    """Whatever has kernels, running."""
    return use(request.param, request)


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The reference and each compiled instruction set, running."""
    return use(request.param, request)


@pytest.fixture
def output_of() -> Callable[..., str]:
    """What one of the compiler's tools prints."""

    def run(program: str, *arguments: str) -> str:
        found = shutil.which(program)
        if found is None:
            fail_or_skip(f"{program} is not installed")
        return subprocess.run([found, *arguments], capture_output=True, text=True, check=True).stdout

    return run
