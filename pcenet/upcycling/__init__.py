"""Converting a network that is already trained: its convolutions become PCE convolutions that compute the same."""

from pcenet.upcycling.convert import Freeze, rebuild, upcycle
from pcenet.upcycling.record import Converted, Upcycling

__all__ = ["Converted", "Freeze", "Upcycling", "rebuild", "upcycle"]
