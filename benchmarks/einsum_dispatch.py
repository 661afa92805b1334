"""The usual way to dispatch, kept to be measured against: one-hot masks and einsum, every expert's batch padded to the
largest (GShard, Lepikhin et al. 2020; Switch Transformers, Fedus et al. 2021).

For ``pcenet bench --against benchmarks/einsum_dispatch.py``. The same function as a `PCELayer` with ``border="zero"``,
top-1, nothing dropped, on maps that the patches divide, with evaluation statistics; in training the
padding enters the batch statistics, as it does in the implementations that this stands for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn import PCELayer


class EinsumLayer(nn.Module):
    """A layer's experts behind one-hot dispatch."""

    def __init__(self, layer: PCELayer) -> None:
        super().__init__()
        self.router = layer.router
        self.extractor = layer.extractor
        self.experts = nn.ModuleList(layer.experts.to_sequential(e) for e in range(layer.experts.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        routing = self.router(x)
        patches, grid = self.extractor.split(x)
        chosen = F.one_hot(routing.expert_ids[:, 0], routing.num_experts)
        place = (chosen.cumsum(0) * chosen - 1).clamp(min=0)
        # [N, E, capacity]: patch n is the c-th of expert e.
        dispatch = F.one_hot(place, int(routing.expert_counts.max())) * chosen.unsqueeze(2)
        dispatch = dispatch.to(patches.dtype)
        batches = torch.einsum("nec,nijk->ecijk", dispatch, patches)
        outputs = torch.stack([expert(batch) for expert, batch in zip(self.experts, batches, strict=True)])
        weighted = dispatch.to(outputs.dtype) * routing.gates[:, :, None].to(outputs.dtype)
        return x + self.extractor.merge(torch.einsum("nec,ecijk->nijk", weighted, outputs), grid, x.shape[2:])


def make_layer(layer: PCELayer) -> nn.Module:
    """The rival of a layer."""
    return EinsumLayer(layer).to(memory_format=torch.channels_last)
