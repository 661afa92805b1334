"""Looking at what a trained network does. Linear probes are in `pcenet.analysis.probes`."""

from pcenet.analysis.counting import PatchCounts, count_experts, patch_classes
from pcenet.analysis.interventions import random_expert, redirect
from pcenet.analysis.pictures import expert_map, routing_picture
from pcenet.analysis.specialisation import Specialisation, specialisation

__all__ = [
    "PatchCounts",
    "Specialisation",
    "count_experts",
    "expert_map",
    "patch_classes",
    "random_expert",
    "redirect",
    "routing_picture",
    "specialisation",
]
