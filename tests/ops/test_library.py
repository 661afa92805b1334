"""The compiled library: what it needs of the system, which instruction set runs, and what runs in its place."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from pcenet import ops
from pcenet.ops import build, library
from pcenet.ops.build import BuildError


def works() -> None:
    """The chosen kernels compute."""
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 3, 3)
    with torch.profiler.profile(acc_events=True) as profile:
        found = ops.patch_conv2d(x, weight, torch.zeros(4, dtype=torch.int64), patch_size=4)
    assert "pcenet::patch_conv2d" in {event.name for event in profile.events()}
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight[0], padding=1), atol=1e-4, rtol=1e-4)


def test_the_library_needs_torch_and_the_compilers_runtime_alone(
    kernels: library.Library, output_of: Callable[..., str]
) -> None:
    dynamic = output_of("readelf", "-d", str(kernels.path))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    of_the_system = re.compile(r"lib(c|m|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-\S+")
    assert {name for name in needed if not of_the_system.fullmatch(name)} == {"libtorch_cpu.so"}  # no OpenMP
    assert "PATH)" not in dynamic  # neither RPATH nor RUNPATH


def test_the_library_uses_the_stable_interface_alone(kernels: library.Library, output_of: Callable[..., str]) -> None:
    lines = output_of("nm", "-D", "--undefined-only", str(kernels.path)).splitlines()
    names = [line.split()[-1] for line in lines]
    assert any(name.startswith("torch_parallel_for") for name in names)
    of_torch = re.compile(r"(aoti_)?torch_\w+")
    of_the_system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__")
    assert [name for name in names if not of_torch.fullmatch(name) and not of_the_system.fullmatch(name)] == []


def test_the_library_names_no_path(kernels: library.Library) -> None:
    content = kernels.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(build.SOURCES).encode() not in content


@pytest.mark.slow
def test_no_further_openmp(kernels: library.Library) -> None:
    """Not even beside scikit-learn, which brings one of its own: torch's stays the only one that we use."""
    pytest.importorskip("sklearn")
    code = """
import re, sklearn.linear_model, torch
from pcenet import ops
def runtimes():
    return set(re.findall(r"/\\S*(?:gomp|iomp|libomp)\\S*", open("/proc/self/maps").read()))
torch.ones(100, 100) @ torch.ones(100, 100)
before = runtimes()
assert ops.backend() != "reference"
ops.patch_conv2d(torch.ones(1, 64, 64, 64), torch.ones(1, 64, 64, 3, 3), torch.zeros(16, dtype=torch.int64), 16)
print(len(before), runtimes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, further = done.stdout.split(maxsplit=1)
    assert int(number) >= 1  # the pattern finds what there is
    assert further.strip() == "set()"


@pytest.mark.parametrize("name", build.SETS)
def test_kernels_of_an_instruction_set(name: str, kernels: library.Library) -> None:
    if name not in kernels.runnable:
        pytest.skip(f"NOT RUN, and not tested on this machine: {name}")
    library.use(name)
    assert ops.backend() == f"cpu ({name})"
    assert ops.why_reference() is None
    assert library.kernels_on("cpu") == "cpu"
    works()


def test_what_is_compiled_follows_a_change(kernels: library.Library) -> None:
    """Graphs have what runs as a constant: whether maps in bfloat16 are taken as they are, or the reference."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    x, weight, expert = torch.randn(1, 8, 8, 8).bfloat16(), torch.randn(1, 8, 8, 3, 3), torch.zeros(4).long()
    compiled = torch.compile(lambda: ops.patch_conv2d(x, weight, expert, patch_size=4), backend=backend)
    expected = torch.nn.functional.conv2d(x.float(), weight[0], padding=1)
    for name in (*kernels.runnable, "reference"):
        library.use(name)
        torch.testing.assert_close(compiled().float(), expected, atol=0.2, rtol=0.02)
        assert ("pcenet.patch_conv2d" in graphs[-1]) == (name != "reference")
    assert len(graphs) == len(kernels.runnable) + 1


@pytest.mark.parametrize("name", build.SETS)
def test_a_set_that_cannot_run_is_refused(name: str, kernels: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", kernels._replace(runnable=()))
    before = library.choice()
    reason = "this processor lacks it and has none" if name in kernels.sets else "compiled here are "
    with pytest.raises(ValueError, match=f"^PCENET_OPS={name}: {reason}.*; PCENET_OPS=reference does without kernels$"):
        library.use(name)
    assert library.choice() == before


def test_the_best_proven_set_runs(kernels: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    proven = [name for name in kernels.runnable if build.SETS[name].proven]
    assert library.use("auto").instructions == library.use("required").instructions == proven[0]
    for name in build.SETS:
        monkeypatch.setitem(build.SETS, name, build.SETS[name]._replace(proven=True))
    assert library.use("auto").instructions == kernels.runnable[0]


def test_what_never_ran_anywhere_runs_by_name_alone(kernels: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in build.SETS:
        monkeypatch.setitem(build.SETS, name, build.SETS[name]._replace(proven=False))
    best = build.sets_here()[0]
    chosen = library.use("auto")
    assert chosen.instructions is None
    assert chosen.reason == (
        f"the kernels for this processor have run under emulation alone; PCENET_OPS={best} turns them on"
    )
    assert library.use(kernels.runnable[0]).instructions == kernels.runnable[0]


def test_better_sets_that_do_not_run(kernels: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = kernels.runnable[-1]
    three = kernels._replace(sets=("neon", "avx512", worst), runnable=("avx512", worst))
    library.use(worst)
    monkeypatch.setattr(library, "_library", three)
    monkeypatch.setitem(build.SETS, "avx512", build.SETS["avx512"]._replace(proven=False))
    assert library.not_used() == {
        "neon": "not of this processor",
        "avx512": "never tested, PCENET_OPS=avx512 turns it on",
    }
    library.use("reference")
    assert library.not_used() == {}


@pytest.mark.parametrize("wrong", ["avx", "AVX2", "required ", "cuda"])
def test_a_wrong_value_lists_what_there_is(wrong: str, undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCENET_OPS", wrong)
    names = "auto, required, reference, triton, avx512_amx, avx512_bf16, avx512, avx2, neon"
    with pytest.raises(ValueError, match=f"^PCENET_OPS={wrong}: there is {names}$"):
        ops.backend()


def test_the_reference_by_name_looks_for_nothing(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCENET_OPS", "reference")
    monkeypatch.setattr(library, "load", lambda: pytest.fail("looked for a library"))
    assert ops.backend() == "reference"
    assert ops.why_reference() == "PCENET_OPS=reference"
    assert library.kernels_on("cpu") is None
    assert library.loaded() is None


@pytest.fixture
def pure(undecided: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without a library, on a machine without a compiler, on which one could be used."""
    monkeypatch.setattr(build, "IN_PACKAGE", cache / "no" / build.LIBRARY)
    monkeypatch.setattr(build, "unsupported", lambda: None)
    monkeypatch.setattr(build, "sets_here", lambda: ["avx2"])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")


def test_without_a_library_auto_falls_back_and_required_does_not(
    pure: None, program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler = "kernels need a C++ compiler, and none was found ($CXX, g++, c++, clang++)"
    for value in ("", "auto"):
        monkeypatch.setattr(library, "_choice", None)
        monkeypatch.setenv("PCENET_OPS", value)
        assert ops.backend() == "reference"
        assert ops.why_reference() == no_compiler
    for value in ("required", "avx2"):
        with pytest.raises(ValueError, match=f"^PCENET_OPS={value}: {re.escape(no_compiler)}; PCENET_OPS=reference"):
            library.use(value)
    program("exit 1")
    assert library.use("auto").reason is not None
    assert "compiler could not compile the kernels: see $XDG_CACHE_HOME/pcenet/ops-" in str(ops.why_reference())
    with pytest.raises(ValueError, match=r"^PCENET_OPS=required: compiler could not compile the kernels: see "):
        library.use("required")


def test_an_older_torch(pure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    assert library.use("auto").reason == "torch 2.9.1+cpu is older than 2.10"
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    assert "older" not in str(library.use("auto").reason)


def test_a_damaged_library_is_compiled_anew(
    kernels: library.Library, undecided: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / build.LIBRARY
    damaged.write_bytes(kernels.path.read_bytes()[:100])
    asked: list[bool] = []

    def compiled(*, again: bool = False) -> Path:
        asked.append(again)
        return kernels.path if again else damaged

    monkeypatch.setattr(build, "build", compiled)
    monkeypatch.setattr(build, "IN_PACKAGE", damaged)
    assert library.load().path == kernels.path
    assert asked == [False, True]


def test_one_that_never_loads_is_left(
    undecided: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / build.LIBRARY
    damaged.write_bytes(b"")
    monkeypatch.setattr(build, "build", lambda again=False: damaged)
    monkeypatch.setattr(build, "IN_PACKAGE", damaged)
    with pytest.raises(BuildError, match=r"^\$XDG_CACHE_HOME/pcenet/ops-\w+ holds a library that cannot be loaded$"):
        library.load()


def test_the_packages_library_comes_first(
    kernels: library.Library, undecided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "IN_PACKAGE", kernels.path)
    monkeypatch.setattr(build, "build", lambda **_: pytest.fail("looked into the cache"))
    assert library.load().path == kernels.path


def test_a_fork_does_not_wait_for_the_threads_of_its_parent(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a loader that starts its processes while another thread compiles."""
    monkeypatch.setenv("PCENET_OPS", "reference")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with library._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(ops.backend() != "reference"))
    child.start()
    child.join(20)
    code = child.exitcode
    child.kill()
    done.set()
    thread.join()
    assert code == 0


@pytest.mark.slow
def test_dynamo_takes_the_decision_for_a_constant(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCENET_OPS", "reference")

    @torch.compile(backend="eager", fullgraph=True)
    def decide(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if library.kernels_on("cpu") else x - 1

    assert decide(torch.zeros(2)).tolist() == [-1, -1]


@pytest.mark.slow
def test_importing_compiles_nothing_and_loads_no_dynamo(cache: Path) -> None:
    code = (
        "import sys, pcenet.ops\nassert 'torch._dynamo' not in sys.modules\nassert pcenet.ops.library._choice is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not cache.exists()
