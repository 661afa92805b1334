"""PCE: convolutional networks in which each patch of an image is filtered by the expert chosen for it.

Importing this package costs nothing: torch is loaded when a name is used. The networks are registered with timm as soon
as timm itself is imported, before or after this package, so that ``timm.create_model("pce_nano")`` finds them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcenet.api import TrainedRun, compare, evaluate, explain, export, predict, train
    from pcenet.models import create_network, load_model
    from pcenet.models.complexity import complexity
    from pcenet.nn import PCEConv2d, PCELayer, attach_aux_losses, aux_loss, record_routing
    from pcenet.upcycling import upcycle

__version__ = "0.1.0"
__all__ = [
    "PCEConv2d",
    "PCELayer",
    "TrainedRun",
    "__version__",
    "attach_aux_losses",
    "aux_loss",
    "compare",
    "complexity",
    "create_network",
    "evaluate",
    "explain",
    "export",
    "load_model",
    "predict",
    "record_routing",
    "train",
    "upcycle",
]

_HOME = {
    "PCEConv2d": "pcenet.nn",
    "PCELayer": "pcenet.nn",
    "attach_aux_losses": "pcenet.nn",
    "aux_loss": "pcenet.nn",
    "record_routing": "pcenet.nn",
    "complexity": "pcenet.models",
    "create_network": "pcenet.models",
    "load_model": "pcenet.models",
    "upcycle": "pcenet.upcycling",
    **dict.fromkeys(("TrainedRun", "compare", "evaluate", "explain", "export", "predict", "train"), "pcenet.api"),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_networks() -> None:
    try:
        importlib.import_module("pcenet.models")
    except ImportError as error:  # whoever imports timm may not care for our networks
        warnings.warn(f"pcenet could not register its networks with timm: {error}", ImportWarning, stacklevel=2)


class _TimmLoader(importlib.abc.Loader):
    """Loads timm with its own loader, then registers the networks."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TimmFinder)]
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register_networks()


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Sees the import of timm. timm has no plugin mechanism, and importing it here would cost every user of
    ``pcenet.nn`` and every ``pcenet --help`` seconds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _TimmLoader(spec.loader)
                return spec
        return None


if "timm" in sys.modules:
    _register_networks()
else:
    sys.meta_path.insert(0, _TimmFinder())
