"""The compiled library: found, or compiled at first use; loaded once per process; what runs where, and why.

What has no kernels runs on the reference, in plain torch. ``PCENET_OPS`` may say what is to run:

- ``auto``, the default: the best instruction set that the processor has, else the reference;
- ``required``: the same, but that there is no library is an error;
- ``reference``: plain torch;
- the name of an instruction set (``pcenet.ops.build.SETS``): that one, or an error;
- ``triton``: the Triton kernels (`pcenet.ops.gpu`) on a GPU, and on the processor as with ``auto``. They have never run
  on a GPU, and so run only where they are asked for. Under ``TRITON_INTERPRET=1`` they compute on the processor.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pcenet.ops import build, schemas

VARIABLE = "PCENET_OPS"
CHOICES = ("auto", "required", "reference", "triton", *build.SETS)
OLDEST_TORCH = "2.10"  # its stable interface is what the library is compiled against
OLDEST_GPU = (8, 0)  # compute capability: products in 16 bits are tensor cores' from there on
REFERENCE_COST = 1.8  # times that pce_nano's training step takes on the reference, on a processor with AVX2
TYPES = {"cpu": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


class Library(NamedTuple):
    """The library in this process.

    Attributes:
        path: the file.
        functions: its exported functions.
        sets: the compiled instruction sets, the best first.
        runnable: those that the processor has.
    """

    path: Path
    functions: ctypes.CDLL
    sets: tuple[str, ...]
    runnable: tuple[str, ...]


class Choice(NamedTuple):
    """What runs.

    Attributes:
        instructions: an instruction set on the processor; None: the reference.
        reason: why it is the reference.
        triton: the kinds of devices on which the Triton kernels run.
    """

    instructions: str | None
    reason: str | None = None
    triton: tuple[str, ...] = ()


_library: Library | None = None
_choice: Choice | None = None
_lock = threading.RLock()
_here = threading.local()


def backend(device: str = "cpu") -> str:
    """What computes on a kind of device: ``"cpu (avx2)"``, or another instruction set, ``"triton"``, ``"reference"``,
    or, for tests, ``"triton (interpreted)"``.

    The first call in a process decides, loads, and may compile, for up to a minute.

    Raises:
        ValueError: if ``PCENET_OPS`` has a wrong value, or one that cannot be had here.
    """
    kernels = kernels_on(device)
    if kernels == "triton":
        return "triton (interpreted)" if device == "cpu" else "triton"
    return f"cpu ({choice().instructions})" if kernels else "reference"


def why_reference() -> str | None:
    """Why the reference runs, in one line; None where the compiled library does."""
    return choice().reason


def constant_for_dynamo(function: F) -> F:
    """Let Dynamo, which cannot trace how a function finds its answer, take that for a constant.

    This is what `torch.compiler.assume_constant_result` does, which imports all of Dynamo first: seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # the mark that Dynamo looks for
    return function


@constant_for_dynamo
def kernels_on(device: str) -> str | None:
    """Whose kernels run on a kind of device: ``"cpu"`` for the compiled library's, ``"triton"``, or None."""
    found = choice()
    if device in found.triton:
        return "triton"
    return "cpu" if device == "cpu" and found.instructions is not None else None


@constant_for_dynamo
def takes_bfloat16() -> bool:
    """Whether the compiled library's kernels take maps in bfloat16 as they are."""
    found = choice()
    return found.instructions is not None and build.BFLOAT16 in build.SETS[found.instructions].flags


def loaded() -> Library | None:
    """The library in this process, if there is one: with ``PCENET_OPS=reference`` it is not looked for."""
    choice()
    return _library


def not_used() -> dict[str, str]:
    """The compiled instruction sets that are better than the one that runs, and why each of them does not."""
    instructions = choice().instructions
    if _library is None or instructions is None:
        return {}
    better = _library.sets[: _library.sets.index(instructions)]
    return {name: _why_not(name, _library) for name in better}


def _why_not(name: str, library: Library) -> str:
    if name not in library.runnable:
        return "not of this processor"
    if not build.SETS[name].proven:
        return f"never tested, {VARIABLE}={name} turns it on"
    return f"{VARIABLE}={os.environ.get(VARIABLE)}"


def choice() -> Choice:
    """What runs, as ``PCENET_OPS`` says; decided once per process."""
    if _choice is not None:
        return _choice
    with _lock:
        return _choice or use(os.environ.get(VARIABLE) or "auto")


def use(name: str) -> Choice:
    """Decide what runs in this process from now on, in place of ``PCENET_OPS``.

    After a change, what torch.compile made is compiled again.

    Args:
        name: what ``PCENET_OPS`` may be.

    Raises:
        ValueError: if there is no such choice, or it cannot be had here.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name}: there is {', '.join(CHOICES)}")
    with _lock:
        before, _choice = _choice, _choose(name)
    # Graphs have the answers of `constant_for_dynamo` as constants. The first choice may be made while one is traced.
    if before not in (None, _choice) and (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    return _choice


def _choose(name: str) -> Choice:
    if name == "reference":
        return Choice(None, f"{VARIABLE}=reference")
    if name == "triton":
        devices = _triton_devices()
        processor = Choice(None, "TRITON_INTERPRET=1") if "cpu" in devices else _choose("auto")
        return processor._replace(triton=devices)
    try:
        if name in ("auto", "required"):
            _check_worth_loading()
        library = load()
        instructions = name if name in build.SETS else _best(library)
        if instructions not in library.sets:
            raise build.BuildError(f"compiled here are {', '.join(library.sets)}")
        if instructions not in library.runnable:
            raise build.BuildError(f"this processor lacks it and has {', '.join(library.runnable) or 'none'}")
    except build.BuildError as error:
        if name == "auto":
            return Choice(None, str(error))
        raise ValueError(f"{VARIABLE}={name}: {error}; {VARIABLE}=reference does without kernels") from error
    library.functions.pcenet_choose(library.sets.index(instructions))
    return Choice(instructions)


def _triton_devices() -> tuple[str, ...]:
    """The kinds of devices on which the Triton kernels can run here; they are made known to torch."""
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError(
            f"{VARIABLE}=triton: Triton cannot be imported ({error}); it comes with torch for NVIDIA GPUs"
        ) from error
    from pcenet.ops import gpu

    interpreted = bool(knobs.runtime.interpret)
    if not interpreted and not torch.cuda.is_available():
        raise ValueError(f"{VARIABLE}=triton: torch sees no GPU; TRITON_INTERPRET=1 computes on the processor, slowly")
    if not interpreted and (torch.version.hip or torch.cuda.get_device_capability() < OLDEST_GPU):
        raise ValueError(f"{VARIABLE}=triton: the kernels are for NVIDIA GPUs of compute capability 8.0 or more")
    if not interpreted and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ValueError(f"{VARIABLE}=triton: Triton needs a C compiler, $CC, gcc or clang; install gcc")
    device = "cpu" if interpreted else "cuda"
    gpu.register(device)
    return (device,)


def _check_worth_loading() -> None:
    """Nothing is compiled that would not run unasked."""
    names = build.sets_here()
    if names and not any(build.SETS[name].proven for name in names):
        raise build.BuildError(
            f"the kernels for this processor have run under emulation alone; {VARIABLE}={names[0]} turns them on"
        )


def _best(library: Library) -> str:
    """The best set of the processor that may run unasked."""
    for name in library.runnable:
        if build.SETS[name].proven:
            return name
    raise build.BuildError(f"this processor has none of the compiled instruction sets ({', '.join(library.sets)})")


def load() -> Library:
    """The library: the package's, or else the one in the cache, which is compiled if need be.

    One that cannot be loaded, because it was damaged or compiled for another system, is compiled anew.

    Raises:
        pcenet.ops.build.BuildError: if there is none.
    """
    global _library
    if _library is None:
        if torch.__version__ < OLDEST_TORCH:
            raise build.BuildError(f"torch {torch.__version__} is older than {OLDEST_TORCH}")
        if build.IN_PACKAGE.is_file():
            _library = _open(build.IN_PACKAGE)
        if _library is None:
            _library = _open(build.build()) or _open(build.build(again=True))
        if _library is None:
            raise build.BuildError(f"{build.shown(build.cache_folder())} holds a library that cannot be loaded")
    return _library


def _open(path: Path) -> Library | None:
    """Load a library into the process; None where the system refuses."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        log.debug("%s", error, exc_info=True)
        return None
    functions = ctypes.CDLL(str(path))  # the same one: the system loads a file once
    functions.pcenet_set.restype = ctypes.c_char_p
    names = [functions.pcenet_set(number) for number in range(len(build.SETS))]
    sets = tuple(name.decode() for name in names if name is not None)
    runnable = tuple(name for number, name in enumerate(sets) if functions.pcenet_runs(number))
    return Library(path, functions, sets, runnable)


def exporting() -> bool:
    """Whether torch.export is tracing. It reads the flag that `torch.compiler.is_exporting` returns: Dynamo in torch
    2.10 replaces a call of that function by True under torch.compile, too."""
    return torch.compiler._is_exporting_flag


def takes(operator: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels compute an operator on a map, and on what belongs to it, where there is any; not where
    torch.export looks on, whose programs run without this package."""
    if exporting():
        return False
    kernels = kernels_on(x.device.type)
    if kernels is None or (kernels == "triton" and operator not in schemas.OF_TRITON):
        return False
    return all(t is None or t.dtype in TYPES[kernels] for t in (x, *others))


@contextmanager
def lowering(convolution: Callable[..., Tensor]) -> Iterator[None]:
    """Within, what torch.export traces in this thread has another function for `pcenet.ops.patch_conv2d`, for a
    runtime that has its own way."""
    before = getattr(_here, "lowered", None)
    _here.lowered = convolution
    try:
        yield
    finally:
        _here.lowered = before


def lowered() -> Callable[..., Tensor] | None:
    """The function that `lowering` set, while torch.export traces."""
    return getattr(_here, "lowered", None) if exporting() else None


def _renew_lock() -> None:
    """A process that loads images is a copy of ours, made at any time: with a lock that another thread held."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
