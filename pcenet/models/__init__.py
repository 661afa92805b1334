"""Networks made of PCE layers and their dense twins, registered with timm on import."""

from pcenet.models.complexity import Complexity, complexity
from pcenet.models.hub import SavableModel, load_model
from pcenet.models.pcenet import PCENet, list_models, model_options, twin_of
from pcenet.models.stages import Stage, make_stages

__all__ = [
    "Complexity",
    "PCENet",
    "SavableModel",
    "Stage",
    "complexity",
    "list_models",
    "load_model",
    "make_stages",
    "model_options",
    "twin_of",
]
