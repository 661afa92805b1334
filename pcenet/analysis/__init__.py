"""Looking at what a trained network does. Linear probes are in `pcenet.analysis.probes`."""

from pcenet.analysis.pictures import expert_map, routing_picture

__all__ = ["expert_map", "routing_picture"]
