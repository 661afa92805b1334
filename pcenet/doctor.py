"""``pcenet doctor``: what is installed, what the machine is and how fast it convolves, to be pasted into a bug report.

It must work where little else does: every package, torch too, may be missing or broken. It tells no path of its user.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pcenet

if TYPE_CHECKING:
    import torch

MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where a module is not named like its package
GATHERED = ("all", "dev")  # extras that a user has no need of: the former repeats others
ROUNDS = 5
SHAPE = (16, 64, 32, 32)  # of the map that is convolved: images, channels, rows, columns
GIGA = 1e9


def examine() -> dict[str, Any]:
    """Everything that ``pcenet doctor`` prints; sizes in bytes, speeds in GFLOP/s, None for what is not known."""
    extras = requirements()
    versions = {name: installed(name) for name in extras}
    torch_works = import_error("torch") is None
    return {
        "pcenet": pcenet.__version__,
        "python": sys.version.split()[0],
        "packages": versions,
        "missing": {name: install_command(extras[name]) for name, found in versions.items() if found is None},
        "broken": dict(broken([name for name, extra in extras.items() if extra is None and versions[name]])),
        "system": platform.platform(),
        "cores": {"machine": os.cpu_count(), "usable": usable_cores()},
        "memory": memory(),
        "free_disk": {"current folder": free_disk(Path()), "cache": free_disk_of_cache() if torch_works else None},
        "operators": operators() if torch_works else None,
        "compute": computing() if torch_works else None,
    }


def requirements() -> dict[str, str | None]:
    """The packages that pcenet asks for, and the smallest extra that brings each; None for those that come with it.

    Empty where pcenet itself is not installed but found on the path.
    """
    try:
        lines = requires("pcenet") or []
    except PackageNotFoundError:
        return {}
    extras: dict[str, list[str | None]] = {}
    for line in lines:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and name[0] != "pcenet" and (extra is None or extra[1] not in GATHERED):
            extras.setdefault(name[0], []).append(extra[1] if extra else None)
    size = Counter(chain.from_iterable(extras.values()))
    return {name: None if None in of else min(of, key=lambda extra: size[extra]) for name, of in extras.items()}


def installed(name: str) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install_command(extra: str | None) -> str:
    """What brings the packages of an extra; those of pcenet itself for None."""
    return f"pip install 'pcenet[{extra}]'" if extra else "pip install pcenet"


def broken(names: list[str]) -> Iterator[tuple[str, str]]:
    """Of some installed packages those that cannot be imported, with the reason."""
    for name in names:
        if (reason := import_error(MODULES.get(name, name.replace("-", "_")))) is not None:
            yield name, reason


def import_error(module: str) -> str | None:
    """Why a module cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    return None


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory() -> dict[str, int | None]:
    """The machine's memory, and what of it is available, in bytes, as Linux tells it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kibibytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    sizes = {name: kibibytes.get(key) for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))}
    return {name: None if size is None else size * 1024 for name, size in sizes.items()}


def free_disk(folder: Path) -> int | None:
    """Free bytes where a folder lies."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def free_disk_of_cache() -> int | None:
    """Free bytes where downloaded data sets go: in the cache folder, or the nearest one above it that exists."""
    from pcenet.data import default_root

    folder = default_root()
    return free_disk(next(path for path in (folder, *folder.parents) if path.exists()))


def operators() -> dict[str, Any]:
    """What computes PCE layers on the processor, why it is not compiled kernels, and where those lie."""
    from pcenet.ops import build, library

    try:
        chosen, found = library.choice(), library.loaded()
    except ValueError as error:  # PCENET_OPS asks for what there is not
        return {"backend": None, "why_reference": str(error), "library": None, "not_used": {}}
    return {
        "backend": library.backend(),
        "why_reference": chosen.reason,
        "library": build.shown(found.path) if found else None,
        "not_used": library.not_used(),
    }


def computing() -> dict[str, Any]:
    """Processor, devices, threads, bfloat16 and speed, as torch sees them."""
    import torch

    from pcenet.runtime.device import processor_name, resolve_device, resolve_precision

    device = resolve_device("auto")
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        "device": device.type,
        "native_bfloat16": resolve_precision("auto", device) == "bf16",
        "convolution": convolution_speed(device),
    }


def convolution_speed(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a 3x3 convolution, 64 to 64 channels, of 16 maps of 32 x 32; a multiply-add counts as two.

    The median of `ROUNDS` rounds, in each of which every kind of number and layout has its turn.
    """
    import torch
    import torch.nn.functional as F

    images, channels, rows, columns = SHAPE
    kinds: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype, layout in product((torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)):
        x = torch.rand(SHAPE).to(device, dtype, memory_format=layout)
        weight = torch.rand(channels, channels, 3, 3).to(device, dtype, memory_format=layout)
        name = f"{str(dtype).removeprefix('torch.')} {str(layout).removeprefix('torch.').removesuffix('_format')}"
        kinds[name] = partial(F.conv2d, x, weight, padding=1)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            for name, convolve in kinds.items():
                seconds[name].append(timed(convolve, device))
    operations = 2 * 9 * channels * channels * images * rows * columns
    # The first round is for warming up.
    return {name: operations / statistics.median(times[1:]) / GIGA for name, times in seconds.items()}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, a GPU's work included."""
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def as_text(report: dict[str, Any]) -> str:
    """What `examine` found as plain lines, ``name: value``."""
    cores, sizes, disk, compute = report["cores"], report["memory"], report["free_disk"], report["compute"]
    lines = [
        ("pcenet", report["pcenet"]),
        ("python", report["python"]),
        *((name, found) for name, found in report["packages"].items() if found),
        *((name, f"missing; {command}") for name, command in report["missing"].items()),
        *((name, f"broken; {reason}") for name, reason in report["broken"].items()),
        ("system", report["system"]),
        ("cores", f"{cores['usable']} usable of {cores['machine']}"),
        ("memory", f"{gigabytes(sizes['available'])} available of {gigabytes(sizes['total'])}"),
        *((f"free disk, {name}", gigabytes(size)) for name, size in disk.items()),
    ]
    if report["operators"]:
        lines.append(("operators", describe(report["operators"])))
    if compute:
        lines += [
            ("processor", compute["processor"]),
            ("threads of torch", compute["threads"]),
            ("CUDA", f"{compute['cuda'] or 'not built in'}; {', '.join(compute['gpus']) or 'no GPU'}"),
            ("MPS", "available; --device mps, which was never tried" if compute["mps"] else "not available"),
            ("device of --device auto", compute["device"]),
            ("bfloat16", "native" if compute["native_bfloat16"] else "emulated: --precision auto takes fp32"),
            *((f"3x3 convolution, {kind}", f"{speed:.1f} GFLOP/s") for kind, speed in compute["convolution"].items()),
        ]
    return "\n".join(f"{name}: {value}" for name, value in lines)


def describe(operators: dict[str, Any]) -> str:
    """What `operators` found, in one line."""
    from pcenet.ops.library import REFERENCE_COST

    if operators["backend"] is None:
        return f"none; {operators['why_reference']}"
    if operators["why_reference"]:
        return f"reference, about {REFERENCE_COST:g} times slower than kernels; {operators['why_reference']}"
    reasons = [f"{name}: {reason}" for name, reason in operators["not_used"].items()]
    return "; ".join([f"{operators['backend']}, {operators['library']}", *reasons])


def gigabytes(size: int | None) -> str:
    """A size in GB."""
    return "unknown" if size is None else f"{size / GIGA:.1f} GB"
