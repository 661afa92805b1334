"""Networks made of PCE layers and their dense twins; importing this registers the classifiers with timm."""

from pcenet.models.complexity import Complexity, complexity
from pcenet.models.decoded import DecodedNet, split_name
from pcenet.models.hub import SavableModel, load_model
from pcenet.models.pcenet import PCENet
from pcenet.models.registry import create_network, describe, input_size_of, list_models, model_options, task_of, twin_of
from pcenet.models.stages import Stage, make_stages
from pcenet.models.timm_net import TimmNet, check_timm, is_timm, like_timm
from pcenet.models.unet import PCEUNet

__all__ = [
    "Complexity",
    "DecodedNet",
    "PCENet",
    "PCEUNet",
    "SavableModel",
    "Stage",
    "TimmNet",
    "check_timm",
    "complexity",
    "create_network",
    "describe",
    "input_size_of",
    "is_timm",
    "like_timm",
    "list_models",
    "load_model",
    "make_stages",
    "model_options",
    "split_name",
    "task_of",
    "twin_of",
]
