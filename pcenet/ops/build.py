"""Compiles the operators for the processor: one recipe, for the wheel and for the first use.

It imports no torch, so that a wheel can be built where torch is only installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import NamedTuple

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = "libpcenet_cpu.so"
IN_PACKAGE = Path(__file__).parent / LIBRARY  # where a wheel has it

COMPILERS = ("g++", "c++", "clang++")  # where $CXX says nothing
# No -ffast-math: NaN stays NaN. No -fopenmp: threads are torch's. No -march=native: a wheel runs elsewhere, too.
FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=fast", "-Wall"),
    *("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # LibTorch's stable interface as of 2.10
)
LINK = ("-shared", "-s", "-Wl,-z,defs", "-ltorch_cpu")


class InstructionSet(NamedTuple):
    """How ``cpu/isa_NAME.cpp`` is compiled, and whether it may run unasked.

    Attributes:
        machine: the kind of processor, as ``platform.machine()`` calls it.
        flags: exactly what the unit's check at load time looks for.
        proven: its tests ran on some processor, not just under emulation; what is not runs only where ``PCENET_OPS``
            names it.
    """

    machine: str
    flags: tuple[str, ...]
    proven: bool


AVX2 = ("-mavx2", "-mfma")
BFLOAT16 = "-mavx512bf16"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AMX = ("-mamx-tile", "-mamx-bf16")
# Every unit isa_NAME.cpp has its line here; all other units run anywhere and get no flags of their own.
SETS = {
    "avx512_amx": InstructionSet("x86_64", (*AVX2, *AVX512, BFLOAT16, *AMX), proven=True),
    "avx512_bf16": InstructionSet("x86_64", (*AVX2, *AVX512, BFLOAT16), proven=True),
    "avx512": InstructionSet("x86_64", (*AVX2, *AVX512), proven=True),
    "avx2": InstructionSet("x86_64", AVX2, proven=True),
    "neon": InstructionSet("aarch64", (), proven=False),
}

LIMIT = 600.0  # seconds that compiling may take
REMEMBERED = 24 * 3600.0  # seconds for which nobody tries again what failed

log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no compiled library; the message is one line that says why."""


class CompilerError(Exception):
    """The compiler failed; the message is everything that it said."""


def sets_here() -> list[str]:
    """The instruction sets that are compiled on this kind of machine, the best first."""
    return [name for name, each in SETS.items() if each.machine == platform.machine()]


def unsupported() -> str | None:
    """Why nothing can be compiled on this kind of machine; None where it can."""
    if sys.platform != "linux":
        return f"kernels are compiled on Linux only, and this is {platform.system()}"
    return None if sets_here() else f"there are no kernels for the processor {platform.machine()}"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: ``$CXX``, or the first of `COMPILERS`; None where there is none."""
    given = os.environ.get("CXX", "").strip()
    for candidate in [given] if given else COMPILERS:
        try:
            name, *options = shlex.split(candidate)
        except ValueError:  # quotes that are not closed
            name, options = candidate, []
        if program := shutil.which(name):
            return [os.path.abspath(program), *options]
    return None


def units(sources: Path) -> dict[str, tuple[str, ...]]:
    """The files to compile on this machine, each with the flags of its own, in the order in which they are linked.

    A function of a header that several units have compiled is taken from the first of them, so that those for plain
    processors come first and those for the best set last.

    Raises:
        KeyError: if a unit has no line in `SETS`.
    """
    sets = {path.stem.removeprefix("isa_"): path.name for path in sources.glob("isa_*.cpp")}
    if unknown := sets.keys() - SETS.keys():
        raise KeyError(f"{', '.join(sorted(unknown))}: flags are given in {__name__}.SETS")
    plain = {path.name: () for path in sorted(sources.glob("*.cpp")) if path.name not in sets.values()}
    return plain | {sets[name]: SETS[name].flags for name in reversed(sets_here()) if name in sets}


def fingerprint(sources: Path = SOURCES) -> str:
    """Twelve letters that change with the sources, with this recipe and with the kind of machine."""
    digest = hashlib.sha256(platform.machine().encode())
    for path in (Path(__file__), *sorted(each for each in sources.iterdir() if each.is_file())):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder(sources: Path = SOURCES) -> Path:
    """Where a library compiled at first use lies: in ``$XDG_CACHE_HOME``, or ``~/.cache``.

    Raises:
        BuildError: if there is no home.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise BuildError("kernels are compiled into ~/.cache, and there is no home; set XDG_CACHE_HOME") from error
    return caches / "pcenet" / f"ops-{fingerprint(sources)}"


def shown(path: Path) -> str:
    """A path to be pasted into a bug report or a shell: it does not name its user."""
    if path == IN_PACKAGE:
        return f"{path.name} of the package"
    cache = os.environ.get("XDG_CACHE_HOME")
    for folder, name in ((cache, "$XDG_CACHE_HOME"), (os.path.expanduser("~"), "~")):
        if folder and path.is_relative_to(folder):
            return str(name / path.relative_to(folder))
    return str(path)


def build(sources: Path = SOURCES, *, again: bool = False) -> Path:
    """The library in the user's cache, compiled if it is not there. One process compiles, the others wait for it.

    Args:
        sources: the folder of the sources.
        again: compile although there is a library, or although compiling has failed before.

    Raises:
        BuildError: if there is no compiler, if it fails or has failed within a day, or if nothing can be written.
    """
    folder = cache_folder(sources)
    library = folder / LIBRARY
    if library.is_file() and not again:
        return library
    if reason := unsupported():
        raise BuildError(reason)
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"kernels need a C++ compiler, and none was found ($CXX, {', '.join(COMPILERS)})")
    failure = folder / f"failed-{_identity(compiler)}.log"
    from filelock import FileLock  # a wheel is built where torch and its dependencies may be missing

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if library.is_file() and not again:  # another process was first
                return library
            if not again and failure.is_file() and time.time() - failure.stat().st_mtime < REMEMBERED:
                raise BuildError(_failed(compiler, failure))
            _compile_into_cache(folder, compiler, sources, failure)
    except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
        why = getattr(error, "strerror", None) or error
        raise BuildError(f"{shown(folder)} cannot be written: {why}") from error
    return library


def _compile_into_cache(folder: Path, compiler: Sequence[str], sources: Path, failure: Path) -> None:
    """Compile beside the place of the library and move it there, whole; we hold the lock."""
    for left in folder.glob("unfinished-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    log.warning("compiling kernels for this machine, once; that takes up to a minute")
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as work:
        try:
            made = compile_library(Path(work), compiler, sources)
        except CompilerError as error:
            failure.write_text(str(error), encoding="utf-8")
            raise BuildError(_failed(compiler, failure)) from error
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(folder / LIBRARY)
    failure.unlink(missing_ok=True)


def _identity(compiler: Sequence[str]) -> str:
    """Changes with the compiler, without running it: whoever mends or updates it need not wait."""
    status = Path(compiler[0]).stat()
    return hashlib.sha256(repr((compiler, status.st_mtime_ns, status.st_size)).encode()).hexdigest()[:12]


def _failed(compiler: Sequence[str], failure: Path) -> str:
    return f"{Path(compiler[0]).name} could not compile the kernels: see {shown(failure)}"


def compile_library(folder: Path, compiler: Sequence[str], sources: Path = SOURCES) -> Path:
    """Compile all units at once, then link them.

    Args:
        folder: where objects and library go; it exists.
        compiler: the command of the compiler.
        sources: the folder of the sources.

    Returns:
        The path of the library.

    Raises:
        CompilerError: with what the compiler said, if it fails, or takes longer than `LIMIT`.
    """
    spec = importlib.util.find_spec("torch")  # found, not imported
    if spec is None or spec.origin is None:
        raise CompilerError("torch is not installed")
    torch = Path(spec.origin).parent
    include = torch / "include"
    common = [*compiler, *FLAGS, "-isystem", str(include), f"-fmacro-prefix-map={include}/="]
    flags = units(sources)
    objects = {name: str(folder.resolve() / f"{name}.o") for name in flags}
    library = folder / LIBRARY
    _run([[*common, *flags[name], "-c", name, "-o", objects[name]] for name in flags], sources)
    _run([[*compiler, *objects.values(), "-o", str(library.resolve()), f"-L{torch / 'lib'}", *LINK]], sources)
    return library


def _run(commands: Sequence[Sequence[str]], sources: Path) -> None:
    """Run commands at the same time, within the sources so that no path of the machine enters the library."""
    run = partial(
        subprocess.run, cwd=sources, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, errors="replace", timeout=LIMIT
    )
    try:
        with ThreadPoolExecutor(len(commands)) as pool:
            done = list(pool.map(run, commands))
    except OSError as error:
        raise CompilerError(f"{shlex.join(commands[0])}\n{error}") from error
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{shlex.join(error.cmd)}\ntook more than {LIMIT:.0f} s") from error
    if any(process.returncode for process in done):
        said = [f"{shlex.join(p.args)}\nexit code {p.returncode}\n{p.stdout}" for p in done]
        raise CompilerError("\n".join(said))
