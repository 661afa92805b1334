"""Even loads without a loss: the bias per expert under which a batch spreads evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from pcenet.ops import library
from pcenet.ops.compiled import transforming

SWEEPS = 8
DAMPING = 0.7  # undamped, all experts answering at once overshoot, and a clustered batch swings to and fro for ever


@torch.no_grad()
def balancing_bias(logits: Tensor, top_k: int = 1) -> Tensor:
    """The bias ``[E]``, mean 0, with which top-k choices by ``logits + bias`` come close to ``N * k / E`` per expert.

    It is the dual variable of assigning patches to experts of equal capacity (BASE layers, Lewis et al., 2021, solve
    the same by an auction): each expert would be raised or lowered until exactly its share of the patches prefers it to
    its best rival; here all move at once, damped, for 8 sweeps. Random logits of 4 experts are then spread
    within 2 % of evenly; clustered ones, or those of many experts, less so. Patches with equal logits cannot be parted
    by any bias.

    A pure function of the batch, so that a pass that is repeated (activation checkpointing) routes the same.

    Args:
        logits: ``[N, E]``.
        top_k: k.
    """
    num_patches, num_experts = logits.shape
    share = -(-num_patches * top_k // num_experts)
    if share >= num_patches or top_k == num_experts:  # too few patches to tell, or everybody gets all
        return logits.new_zeros(num_experts)
    # The same in one operator, at less than half of the time.
    if logits.dtype == torch.float32 and library.takes("balancing_bias", logits) and not transforming():
        return torch.ops.pcenet.balancing_bias(logits.contiguous(), top_k, SWEEPS, DAMPING)
    bias = -logits.mean(dim=0)
    for _ in range(SWEEPS):
        scores = logits + bias
        best = scores.topk(top_k + 1, dim=1).values
        last_in, first_out = best[:, top_k - 1 : top_k], best[:, top_k:]
        lead = scores - torch.where(scores >= last_in, first_out, last_in)
        # Lowered by what lies between the leads of the last patch of its share and of the next one.
        border = lead.topk(share + 1, dim=0).values[-2:].mean(dim=0)
        bias = bias - DAMPING * border
        bias = bias - bias.mean()
    return bias
