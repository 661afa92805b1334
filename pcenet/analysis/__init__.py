"""Looking at what a trained network does."""

from pcenet.analysis.pictures import expert_map, routing_picture

__all__ = ["expert_map", "routing_picture"]
