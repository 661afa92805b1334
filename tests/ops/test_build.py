"""Compiling kernels: once, by one process, whole or not at all; what is missing or fails is one sentence."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pcenet.ops import build
from pcenet.ops.build import BuildError

DAY = 24 * 3600


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_compiled_once(compiler: str, cache: Path, tiny: Path, program: Callable[[str], Path]) -> None:
    calls = program(f'exec {compiler} "$@"')
    path = build.build(tiny)
    assert path.is_relative_to(cache / "pcenet")
    assert answer(path) == 42
    assert count(calls) == 2  # one unit, one link
    assert build.build(tiny) == path
    assert count(calls) == 2
    assert {each.name for each in path.parent.iterdir()} == {build.LIBRARY, "lock"}


def test_found_where_there_is_no_compiler_any_more(
    compiler: str, cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build(tiny)
    monkeypatch.setenv("CXX", "nowhere-to-be-found")
    assert build.build(tiny) == path


@pytest.mark.parametrize("change", ["source", "header", "new file", "recipe", "machine"])
def test_another_library_for_other_sources_recipes_and_machines(
    change: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.fingerprint(tiny)
    assert build.fingerprint(tiny) == before
    if change == "source":
        (tiny / "bind.cpp").write_text("int other;")
    elif change == "header":
        (tiny / "answer.h").write_text("#define ANSWER 43\n")
    elif change == "new file":
        (tiny / "more.inl").write_text("")
    elif change == "recipe":
        recipe = tmp_path / "build.py"
        recipe.write_text(Path(build.__file__).read_text().replace("-O3", "-O2"))
        monkeypatch.setattr(build, "__file__", str(recipe))
    else:
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.fingerprint(tiny) != before


def test_processes_wait_for_the_one_that_compiles(
    compiler: str, cache: Path, tiny: Path, program: Callable[[str], Path]
) -> None:
    calls = program(f'sleep 0.3; exec {compiler} "$@"')
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=build.build, args=(tiny,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert count(calls) == 2
    assert answer(build.build(tiny)) == 42


def test_what_a_killed_process_left_is_removed(compiler: str, cache: Path, tiny: Path) -> None:
    folder = build.cache_folder(tiny)
    (folder / "unfinished-abc").mkdir(parents=True)
    (folder / "unfinished-abc" / build.LIBRARY).write_text("half a library")
    assert answer(build.build(tiny)) == 42
    assert not list(folder.glob("unfinished-*"))


def test_a_failure_is_remembered_for_a_day(cache: Path, tiny: Path, program: Callable[..., Path]) -> None:
    calls = program("echo no such thing; exit 3")

    def fail(**options: bool) -> int:
        """Calls of the compiler, in all."""
        with pytest.raises(BuildError, match=r"^\w+ could not compile the kernels: see \$XDG_CACHE_HOME/pcenet/ops-"):
            build.build(tiny, **options)
        return count(calls)

    assert fail() == 1
    assert fail() == 1
    [log] = build.cache_folder(tiny).glob("failed-*.log")
    assert "no such thing" in log.read_text()
    assert "exit code 3" in log.read_text()
    assert fail(again=True) == 2
    a_day_ago = time.time() - DAY - 1
    os.utime(log, (a_day_ago, a_day_ago))
    assert fail() == 3
    program("exit 4", name="other")  # whoever takes another compiler does not wait
    assert fail() == 4
    program("exit 5  # mended", name="other")
    assert fail() == 5


def test_the_log_holds_what_the_compiler_said(compiler: str, cache: Path, tiny: Path) -> None:
    (tiny / "bind.cpp").write_text("int main() { return undeclared_name; }")
    with pytest.raises(BuildError):
        build.build(tiny)
    [log] = build.cache_folder(tiny).glob("failed-*.log")
    assert "undeclared_name" in log.read_text()
    assert "-c bind.cpp" in log.read_text()
    (tiny / "bind.cpp").write_text("int used(); int user() { return used(); }")  # fails when it is linked
    with pytest.raises(BuildError):
        build.build(tiny)
    [log] = build.cache_folder(tiny).glob("failed-*.log")
    assert "used()" in log.read_text()


def test_a_compiler_that_never_ends_is_stopped(
    cache: Path, tiny: Path, program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("exec sleep 100")
    monkeypatch.setattr(build, "LIMIT", 0.2)
    start = time.monotonic()
    with pytest.raises(BuildError):
        build.build(tiny)
    assert time.monotonic() - start < 20
    [log] = build.cache_folder(tiny).glob("failed-*.log")
    assert "took more than" in log.read_text()


@pytest.mark.parametrize("given", ["nowhere-to-be-found", "/dev/null", "'", "$(rm)"])
def test_a_wrong_compiler_is_none(given: str, cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(
        BuildError, match=r"need a C\+\+ compiler, and none was found \(\$CXX, g\+\+, c\+\+, clang\+\+\)"
    ):
        build.build(tiny)
    assert not cache.exists()


def test_the_compiler_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    for name in ("clang++", "c++", "g++"):  # the later, the better
        shutil.copy(shutil.which("true", path=os.defpath) or "/bin/true", tmp_path / name)
        assert build.find_compiler() == [str(tmp_path / name)]
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++ '-DA=b c'")
    assert build.find_compiler() == [str(tmp_path / "clang++"), "-stdlib=libc++", "-DA=b c"]
    monkeypatch.setenv("CXX", " ")
    assert build.find_compiler() == [str(tmp_path / "g++")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./c++")
    assert build.find_compiler() == [str(tmp_path / "c++")]


def test_a_cache_that_cannot_be_written(cache: Path, tiny: Path, program: Callable[[str], Path]) -> None:
    program("exit 0")
    cache.write_text("a file where the folder should be")
    with pytest.raises(BuildError, match=r"^\$XDG_CACHE_HOME/pcenet/ops-\w+ cannot be written: Not a directory$"):
        build.build(tiny)


def test_without_a_home(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither $HOME nor the user is known
    with pytest.raises(BuildError, match="there is no home; set XDG_CACHE_HOME"):
        build.build(tiny)


def test_plain_units_are_linked_first_and_the_best_set_last(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("isa_avx512", "isa_avx2", "isa_neon", "zeros"):
        (tiny / f"{name}.cpp").write_text("")
    units = build.units(tiny)
    assert list(units) == ["bind.cpp", "zeros.cpp", "isa_avx2.cpp", "isa_avx512.cpp"]
    assert units["bind.cpp"] == units["zeros.cpp"] == ()
    assert set(units["isa_avx2.cpp"]) == {"-mavx2", "-mfma"}
    assert not any(flag.startswith("-m") for flag in build.FLAGS)
    (tiny / "isa_mmx.cpp").write_text("")
    with pytest.raises(KeyError, match="mmx: flags are given in"):
        build.units(tiny)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_plain_code_is_not_replaced_by_that_of_an_instruction_set(compiler: str, cache: Path, tiny: Path) -> None:
    """What several units have compiled is one function for all of them, and it has to run everywhere."""
    (tiny / "answer.h").write_text(
        """
        #if defined(__AVX512F__)
        #define LEVEL 2
        #elif defined(__AVX2__)
        #define LEVEL 1
        #else
        #define LEVEL 0
        #endif
        inline __attribute__((noinline)) int of_all() { return LEVEL; }
        inline __attribute__((noinline)) int of_sets() { return LEVEL; }
        #define FUNCTION(name, content) \\
          extern "C" __attribute__((visibility("default"))) int name() { return content; }
        """
    )
    (tiny / "bind.cpp").write_text('#include "answer.h"\nFUNCTION(plain, of_all())')
    for name in ("avx2", "avx512"):
        source = f'#include "answer.h"\nFUNCTION({name}, 10 * of_all() + of_sets())\nFUNCTION({name}_own, LEVEL)'
        (tiny / f"isa_{name}.cpp").write_text(source)
    functions = ctypes.CDLL(str(build.build(tiny)))
    assert functions.plain() == 0
    assert functions.avx2() == functions.avx512() == 1
    assert [functions.avx2_own(), functions.avx512_own()] == [1, 2]


@pytest.mark.parametrize(
    ("system", "machine", "reason"),
    [
        ("linux", "x86_64", None),
        ("linux", "aarch64", None),
        ("linux", "riscv64", "there are no kernels for the processor riscv64"),
        ("darwin", "arm64", "kernels are compiled on Linux only, and this is "),
        ("win32", "AMD64", "kernels are compiled on Linux only, and this is "),
    ],
)
def test_where_nothing_is_compiled(
    system: str, machine: str, reason: str | None, cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = build.unsupported()
    assert found is None if reason is None else found is not None and found.startswith(reason)
    if reason is not None:
        with pytest.raises(BuildError, match=reason):
            build.build(tiny)


def test_paths_do_not_name_their_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.shown(Path("/home/someone/.cache/pcenet/x")) == "~/.cache/pcenet/x"
    assert build.shown(Path("/opt/x")) == "/opt/x"
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/someone/fast")
    assert build.shown(Path("/home/someone/fast/pcenet/x")) == "$XDG_CACHE_HOME/pcenet/x"
    assert build.shown(build.IN_PACKAGE) == f"{build.LIBRARY} of the package"
