"""The operator that every PCE layer is made of; imports torch alone."""

from __future__ import annotations

from pcenet.ops.library import backend, compiled, why_reference

__all__ = ["backend", "compiled", "why_reference"]
