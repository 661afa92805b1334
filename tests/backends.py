"""What computes operators, for tests to run through."""

from __future__ import annotations

from pcenet.ops import build

# The instruction sets that are compiled on this kind of machine; of a kind that nothing is compiled for, none.
SETS = [name for name in build.sets_here() if f"isa_{name}.cpp" in build.units(build.SOURCES)]
BACKENDS = ["reference", *SETS]
