"""Constants that depend on sizes alone, computed once: for a single image, making them again would take most of the
time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pcenet.nn.transforms import transforming

P = ParamSpec("P")
R = TypeVar("R", bound=tuple[object, ...])

_KEPT = 64  # results of each function
_LARGEST = 2**17  # numbers in a tensor that is kept: 1 MiB of int64, so that what is kept is bounded


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Remember the results of a pure function of hashable arguments that returns a tuple with tensors in it.

    Not what is large, and not while a compiler, an exporter or a fake mode traces, whose tensors have no values, or a
    transform is active, whose tensors end with it. What comes back is shared: nobody may write to it.
    """

    @lru_cache(maxsize=_KEPT)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> R | None:
        # A tensor that is born in inference mode could never take part in training.
        with torch.inference_mode(False), torch.no_grad():
            result = function(*args, **kwargs)
        large = any(isinstance(part, Tensor) and part.numel() > _LARGEST for part in result)
        return None if large else result

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or transforming() or _get_current_dispatch_mode() is not None:
            return function(*args, **kwargs)
        result = remembered(*args, **kwargs)  # type: ignore[arg-type] # a ParamSpec cannot say Hashable
        return function(*args, **kwargs) if result is None else result

    return call
