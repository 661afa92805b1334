"""The idea itself: patches, routing, experts, losses, and the layer made of them. Imports torch alone."""

from pcenet.nn.attached_losses import AttachedLosses, attach_aux_losses
from pcenet.nn.conv import PCEConv2d
from pcenet.nn.expert_bias_update import update_expert_bias
from pcenet.nn.experts import ConvExperts
from pcenet.nn.fourier import fourier_features
from pcenet.nn.layer import PCELayer
from pcenet.nn.losses import (
    AuxTerms,
    aux_loss,
    aux_terms,
    load_balance_loss,
    z_loss,
)
from pcenet.nn.patches import Grid, PatchExtractor
from pcenet.nn.recording import record_routing, routers_of
from pcenet.nn.routing import Router, Routing, expert_counts, route
from pcenet.nn.statistics import RoutingStatistics, RoutingSummary
from pcenet.nn.synchronising import synchronise

__all__ = [
    "AttachedLosses",
    "AuxTerms",
    "ConvExperts",
    "Grid",
    "PCEConv2d",
    "PCELayer",
    "PatchExtractor",
    "Router",
    "Routing",
    "RoutingStatistics",
    "RoutingSummary",
    "attach_aux_losses",
    "aux_loss",
    "aux_terms",
    "expert_counts",
    "fourier_features",
    "load_balance_loss",
    "record_routing",
    "route",
    "routers_of",
    "synchronise",
    "update_expert_bias",
    "z_loss",
]
