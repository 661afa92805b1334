"""What computes operators, for tests to run through."""

from __future__ import annotations

import os

from pcenet.ops import build

# Triton's interpreter is on or off for a whole process, which then tests it alone: make test-triton.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What has kernels: the instruction sets that are compiled on this kind of machine, none on some.
SETS = [name for name in build.sets_here() if f"isa_{name}.cpp" in build.units(build.SOURCES)]
KERNELS = ["triton"] if INTERPRETED else SETS
BACKENDS = KERNELS if INTERPRETED else ["reference", *KERNELS]
