"""The compiled library: found, or compiled at first use; loaded once per process; what runs, and why.

Where there is none everything runs on the reference, in plain torch. ``PCENET_OPS`` may say what is to run:

- ``auto``, the default: the best instruction set that the processor has, else the reference;
- ``required``: the same, but that there is no library is an error;
- ``reference``: plain torch;
- the name of an instruction set (``pcenet.ops.build.SETS``): that one, or an error.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcenet.ops import build

VARIABLE = "PCENET_OPS"
CHOICES = ("auto", "required", "reference", *build.SETS)
OLDEST_TORCH = "2.10"  # its stable interface is what the library is compiled against
REFERENCE_COST = 1.8  # times that pce_nano's training step takes on the reference, on a processor with AVX2
TYPES = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


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
    """What runs: an instruction set, or, for None, the reference, with the reason."""

    instructions: str | None
    reason: str | None = None


_library: Library | None = None
_choice: Choice | None = None
_lock = threading.RLock()
_here = threading.local()


def backend() -> str:
    """What computes on the processor: ``"cpu (avx2)"``, or another instruction set, or ``"reference"``.

    The first call in a process decides, loads, and may compile, for up to a minute.

    Raises:
        ValueError: if ``PCENET_OPS`` has a wrong value, or one that cannot be had here.
    """
    instructions = choice().instructions
    return f"cpu ({instructions})" if instructions else "reference"


def why_reference() -> str | None:
    """Why the reference runs, in one line; None where the compiled library does."""
    return choice().reason


def compiled() -> bool:
    """Whether the compiled operators run. Dynamo takes the answer for a constant: it cannot trace how it is found."""
    return choice().instructions is not None


# What torch.compiler.assume_constant_result does, which imports all of Dynamo first: seconds.
compiled._dynamo_marked_constant = True  # type: ignore[attr-defined] # a mark on a function


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

    Args:
        name: ``auto``, ``required``, ``reference`` or an instruction set.

    Raises:
        ValueError: if there is no such choice, or it cannot be had here.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name}: there is {', '.join(CHOICES)}")
    with _lock:
        _choice = _choose(name)
        return _choice


def _choose(name: str) -> Choice:
    if name == "reference":
        return Choice(None, f"{VARIABLE}=reference")
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


def _check_worth_loading() -> None:
    """Nothing is compiled that would not run unasked."""
    names = build.sets_here()
    if names and not any(build.SETS[name].proven for name in names):
        raise build.BuildError(
            f"the kernels for this kind of processor have never run; {VARIABLE}={names[0]} turns them on"
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
    """Load a library into the process, and register its operators; None where the system refuses."""
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
    _register()
    return Library(path, functions, sets, runnable)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled operators compute on a map, and on what belongs to it, where there is any; not where
    torch.export looks on, whose programs run without this package."""
    own = x.device.type == "cpu" and all(t is None or t.dtype in TYPES for t in (x, *others))
    return own and not torch.compiler.is_exporting() and compiled()


@contextmanager
def lowering(convolution: Callable[..., Tensor]) -> Iterator[None]:
    """Within, what torch.export traces in this thread has another function for `pcenet.ops.patch_conv2d_affine`, for a
    runtime that has its own way."""
    before = getattr(_here, "lowered", None)
    _here.lowered = convolution
    try:
        yield
    finally:
        _here.lowered = before


def lowered() -> Callable[..., Tensor] | None:
    """The function that `lowering` set, while torch.export traces."""
    return getattr(_here, "lowered", None) if torch.compiler.is_exporting() else None


@functools.cache  # torch takes each once per process
def _register() -> None:
    _register_fakes()
    _register_flops()


def _register_fakes() -> None:
    """Tell torch's tracers the shapes of what the operators return. Maps are pixels ``[B, H, W, C]``."""

    def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
        return torch.library.register_fake(f"pcenet::{name}")

    def floats(like: Tensor, *sizes: Any) -> Tensor:
        return like.new_empty(sizes, dtype=torch.float32)

    def summed(x: Tensor, residual: Tensor | None) -> torch.dtype:
        return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)

    @fake("patch_conv2d")
    def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return x.new_empty(*x.shape[:3], weight.shape[1], dtype=summed(x, others[-1]))

    @fake("patch_conv2d_input_grad")
    def _(grad: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return grad.new_empty(*grad.shape[:3], weight.shape[2])

    @fake("patch_conv2d_weight_grad")
    def _(grad: Tensor, x: Tensor, expert: Tensor, size: int, neighbours: bool, experts: int, kernel: int) -> Tensor:
        return floats(x, experts, grad.shape[3], kernel, kernel, x.shape[3])

    @fake("patch_affine")
    def _(x: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(x, dtype=summed(x, others[-1]))

    @fake("expert_moments")
    def _(x: Tensor, expert: Tensor, size: int, experts: int) -> tuple[Tensor, ...]:
        return floats(x, experts), floats(x, experts, x.shape[3]), floats(x, experts, x.shape[3])

    @fake("patch_affine_sums")
    def _(
        grad: Tensor, x: Tensor, scale: Any, shift: Any, expert: Tensor, size: int, experts: int, *others: Any
    ) -> tuple[Tensor, ...]:
        return floats(x, experts, x.shape[3]), floats(x, experts, x.shape[3]), floats(x, expert.shape[0])

    @fake("patch_affine_input_grad")
    def _(grad: Tensor, x: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(x)

    @fake("balancing_bias")
    def _(logits: Tensor, *others: Any) -> Tensor:
        return floats(logits, logits.shape[1])

    @fake("expert_block")
    def _(x: Tensor, expert: Tensor, size: int, *others: Any) -> Tensor:
        return x.new_empty(*x.shape[:3], others[5].shape[1], dtype=summed(x, others[-1]))

    def patches(x: Tensor, size: int) -> int:
        return x.shape[0] * -(-x.shape[1] // size) * -(-x.shape[2] // size)

    @fake("patch_perceptron")
    def _(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
        return floats(x, patches(x, size), weight.shape[0])

    @fake("patch_logits")
    def _(x: Tensor, *others: Any) -> Tensor:
        return floats(x, patches(x, others[4]), others[6].shape[0])

    @fake("patch_perceptron_backward")
    def _(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        columns: Tensor,
        size: int,
        needs_x: bool,
    ) -> tuple[Tensor, ...]:
        hidden = weight.shape[0]
        sizes = ((hidden, x.shape[3]), (x.shape[1], hidden), (x.shape[2], hidden))
        return floats(x, *(x.shape if needs_x else (0,))), *(floats(x, *size) for size in sizes)


def _register_flops() -> None:
    """Tell torch's FlopCounterMode what the operators multiply and add; it gives shapes in the place of tensors."""
    from torch.utils.flop_counter import register_flop_formula

    def formula(name: str) -> Callable[[Callable[..., int]], Any]:
        return register_flop_formula(getattr(torch.ops.pcenet, name))

    def convolution(pixels: Any, weight: Any) -> int:
        return 2 * math.prod(pixels[:3]) * math.prod(weight[1:])

    @formula("patch_conv2d")
    def _(x: Any, weight: Any, *others: Any, **_: Any) -> int:
        return convolution(x, weight)

    @formula("patch_conv2d_input_grad")
    def _(grad: Any, weight: Any, *others: Any, **_: Any) -> int:
        return convolution(grad, weight)

    @formula("patch_conv2d_weight_grad")
    def _(grad: Any, x: Any, expert: Any, size: int, neighbours: bool, experts: int, kernel: int, **_: Any) -> int:
        return convolution(x, (experts, grad[3], x[3], kernel, kernel))

    @formula("expert_block")
    def _(x: Any, expert: Any, size: int, *parts: Any, **_: Any) -> int:
        return convolution(x, parts[0]) + convolution(x, parts[5])

    def perceptron(x: Any, weight: Any) -> int:
        content, position = math.prod(x[:3]) * x[3], (x[1] + x[2]) * (weight[1] - x[3])
        return int(2 * weight[0] * (content + position))

    @formula("patch_perceptron")
    def _(x: Any, weight: Any, *others: Any, **_: Any) -> int:
        return perceptron(x, weight)

    @formula("patch_logits")
    def _(x: Any, weight: Any, *others: Any, out_val: Any = None, out_shape: Any = None, **_: Any) -> int:
        return perceptron(x, weight) + 2 * math.prod(out_shape) * weight[0]

    @formula("patch_perceptron_backward")
    def _(grad: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
        return (2 + others[-1]) * perceptron(x, weight)  # computed again, for the weight, and perhaps for x


def _renew_lock() -> None:
    """A process that loads images is a copy of ours, made at any time: with a lock that another thread held."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
