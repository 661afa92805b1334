"""The compiled library: whether it runs, and fake kernels of its operators."""

from __future__ import annotations

from torch import Tensor


def takes(x: Tensor) -> bool:
    """Whether the library computes on a tensor like this."""
    return False
