"""Observing the routing of whole networks from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from pcenet.nn.conv import PCEConv2d
from pcenet.nn.layer import PCELayer
from pcenet.nn.routing import Router, Routing


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect every `Routing` that the network's PCE layers and convolutions make, through hooks on their routers.

    >>> import torch
    >>> from pcenet.nn import PCELayer, record_routing
    >>> layer = PCELayer(8, 8, patch_size=4)
    >>> with record_routing(nn.Sequential(layer)) as records:
    ...     y = nn.Sequential(layer)(torch.zeros(2, 8, 16, 16))
    >>> list(records), records["0"][0].grid
    (['0'], Grid(batch=2, rows=4, columns=4))

    Recorders may be nested and the network may be any that contains PCE layers; without one nothing is collected and
    nothing costs anything. The records keep the autograd graph alive for as long as they are held. What activation
    checkpointing computes again in the backward pass is not recorded again. (Its variant ``use_reentrant=True`` makes
    the first pass without gradients, so that the records of it carry none.) Recorded are the passes of this network, in
    the thread that records: threads that share a network have records of their own, and a copy that is made within the
    block is not recorded.

    Raises:
        ValueError: for a router in a compiled part, whose graph calls no hooks that are added later; enter the
            recorder on the network itself.

    Yields:
        Layer name (as in ``model.named_modules()``, ``""`` for the model itself) to its Routings in the order of the
        forward passes. Empty for a network without PCE layers; a layer that did not run has no entry.
    """
    check_not_compiled(model, "record the network itself")
    records: dict[str, list[Routing]] = {}
    with ExitStack() as stack:
        for name, router in routers_of(model):
            stack.callback(router.register_forward_hook(_Collector(name, records)).remove)
        yield records


class _Collector:
    """The hook on a router. A copy of it, in a copy of the network, collects nothing."""

    def __init__(self, name: str = "", records: dict[str, list[Routing]] | None = None) -> None:
        self.name, self.records, self.thread = name, records, get_ident()

    def __call__(self, _router: nn.Module, _args: Any, routing: Routing) -> None:
        if self.records is not None and get_ident() == self.thread and not _in_backward_pass():
            self.records.setdefault(self.name, []).append(routing)

    def __reduce__(self) -> tuple[type[_Collector], tuple[()]]:
        return _Collector, ()


def check_not_compiled(model: nn.Module, way_out: str) -> None:
    """Raise a ``ValueError`` with a way out if a network, or a part of it with a router, is compiled."""
    for name, module in model.named_modules():
        compiled = name.endswith("_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled and any(isinstance(part, Router) for part in module.modules()):
            raise ValueError(f"model is compiled, and a compiled network calls no hooks added later: {way_out}")


def routers_of(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """The routers of a network, each under the name of its `PCELayer` or `PCEConv2d`; layers that follow another one's
    router have none."""
    for name, module in model.named_modules():
        if isinstance(module, PCELayer | PCEConv2d) and module.router is not None:
            yield name, module.router


def _in_backward_pass() -> bool:
    """Whether autograd is at work on this thread: a forward pass is then a repetition, by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
