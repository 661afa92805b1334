"""Where and how to compute: device, precision, threads, and the record of the environment."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import pcenet
from pcenet import ops
from pcenet.choices import Device, Precision

PACKAGES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow", "safetensors")


def resolve_device(name: Device, count: int = 1) -> torch.device:
    """``"auto"`` is a CUDA GPU where there is one, else the processor.

    Args:
        name: what the options say.
        count: processes on this machine, each of which needs a GPU of its own.

    Raises:
        ValueError: for ``"cuda"`` where torch sees no GPU, or too few; for ``"mps"`` likewise, which is one GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch sees no CUDA GPU; use --device cpu")
    if name == "cuda" and count > torch.cuda.device_count():
        raise ValueError(
            f"devices {count}: torch sees {torch.cuda.device_count()} CUDA GPUs; give as many or fewer, or --device cpu"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': torch sees no GPU of a Mac; use --device cpu")
    if name == "mps" and count > 1:
        raise ValueError(f"devices {count}: a Mac has one GPU; give one, or --device cpu")
    return torch.device(name)


def resolve_precision(name: Precision, device: torch.device) -> Precision:
    """``"auto"`` is ``"bf16"`` where the hardware computes with bfloat16 natively, else ``"fp32"``.

    Raises:
        ValueError: for ``"tf32"`` but on an NVIDIA GPU.
    """
    if name == "tf32" and (device.type != "cuda" or torch.version.cuda is None):
        raise ValueError(f"precision 'tf32' is of NVIDIA GPUs, and the device is {device.type}; use --precision fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = False  # never tried
    else:
        native = any(capabilities().get(key, False) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native else "fp32"


def capabilities() -> Mapping[str, Any]:
    """What torch knows of the processor by name; nothing in a torch that cannot be asked."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def resolve_workers(workers: int | None, device: torch.device, count: int = 1) -> int:
    """None is no process where the processor itself computes, which needs every core, and up to 8 beside a GPU.

    Args:
        workers: what the options say.
        device: where is computed.
        count: processes on this machine that train together, which share its cores.
    """
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) // count))


def set_precision(precision: Precision, device: torch.device) -> None:
    """Let a GPU multiply numbers in float32 as a resolved precision says, in the whole process from now on: torch's own
    choice is TF32 for convolutions and not for matrix products."""
    if device.type == "cuda":
        allowed = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def widest(device: torch.device) -> torch.dtype:
    """The type for sums over a whole data set: float64, which a Mac's GPU has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a resolved precision."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


def set_threads(threads: int | None) -> None:
    """Let torch use this many threads; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def processor_name() -> str:
    """The processor's name as the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest vector instructions that torch uses on this processor: ``"AVX2"``, ``"AVX-512"``, ``"NEON"``; without
    any the architecture's name."""
    level = torch.backends.cpu.get_cpu_capability()
    if level == "DEFAULT":  # of x86 its oldest instructions, of arm64 NEON
        return {"aarch64": "NEON", "arm64": "NEON"}.get(platform.machine(), platform.machine())
    return {"AVX512": "AVX-512"}.get(level, level)


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions and hardware, for ``environment.json`` and beside measured figures."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {
        "pcenet": pcenet.__version__,
        "python": sys.version.split()[0],
        "versions": versions,
        "system": platform.platform(),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "operators": ops.backend(device.type),
        "precision": precision,
    }
