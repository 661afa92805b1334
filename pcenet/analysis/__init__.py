"""Looking at what a trained network does; what interventions cost is in `pcenet.analysis.effects`."""

from pcenet.analysis.agreement import Agreement, AgreementStatistics
from pcenet.analysis.counting import PatchCounts, count_experts, patch_classes
from pcenet.analysis.galleries import Gallery
from pcenet.analysis.interventions import (
    fixed_expert,
    in_layer,
    knock_out,
    random_expert,
    redirect,
    removed_positions,
    second_choice,
    shuffled_positions,
)
from pcenet.analysis.observing import Seen, observe
from pcenet.analysis.pictures import expert_map, routing_picture
from pcenet.analysis.sharpness import Sharpness, SharpnessStatistics
from pcenet.analysis.specialisation import Specialisation, specialisation

__all__ = [
    "Agreement",
    "AgreementStatistics",
    "Gallery",
    "PatchCounts",
    "Seen",
    "Sharpness",
    "SharpnessStatistics",
    "Specialisation",
    "count_experts",
    "expert_map",
    "fixed_expert",
    "in_layer",
    "knock_out",
    "observe",
    "patch_classes",
    "random_expert",
    "redirect",
    "removed_positions",
    "routing_picture",
    "second_choice",
    "shuffled_positions",
    "specialisation",
]
