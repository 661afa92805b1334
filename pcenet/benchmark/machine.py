"""Where figures come from: processor, instruction set, backend, versions."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

import pcenet
from pcenet.ops import backend
from pcenet.runtime.device import capabilities, instruction_set, processor_name, resolve_precision


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, kind, backend, threads and versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "kind": kind_of(device),
        "backend": backend(device.type),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pcenet": pcenet.__version__,
    }


def other_work() -> str | None:
    """A warning where other processes have the cores, so that no figure is worth much; None: they are free."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1  # not on Windows
    if load < cores:
        return None
    return f"the machine is busy (load {load:.1f} on {cores} cores): no figure is worth much; try again when it is idle"


def kind_of(device: torch.device) -> str:
    """Machines whose figures may be compared: ``"AVX2"``, ``"AVX-512"``, ``"AVX-512 + bfloat16"``, ``"AVX-512 + AMX"``,
    which torch's convolutions in bfloat16 use; a GPU's name."""
    name = instruction_set() if device.type == "cpu" else torch.cuda.get_device_name(device)
    if resolve_precision("auto", device) != "bf16":
        return name
    has_tiles = device.type == "cpu" and capabilities().get("amx_bf16", False)
    return f"{name} + {'AMX' if has_tiles else 'bfloat16'}"


def as_file_name(kind: str) -> str:
    """A kind in the names of files: ``"AVX-512 + bfloat16"`` is ``"avx-512-bfloat16"``."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def describe(about: Mapping[str, Any]) -> str:
    """A machine in a line."""
    return (
        f"{about['processor']}, {about['kind']}, {about['threads']} threads, backend {about['backend']}; "
        f"torch {about['torch']}, pcenet {about['pcenet']}, Python {about['python']}; {about['date']}"
    )
