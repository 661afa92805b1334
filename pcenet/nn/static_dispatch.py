"""Dispatch without a shape that depends on the routing: for compiling and exporting.

Each expert's slots are padded to whole blocks of b, and all blocks are one batch. Everything is made of plain
operators. Axes as in `pcenet.nn.dispatch`; G blocks of b slots each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn.experts import ConvExperts
from pcenet.nn.kernels import PlainKernel
from pcenet.nn.patches import merge_patches
from pcenet.nn.routing import Routing
from pcenet.nn.windows import append_zeros, map_to_rows, real_cells


def run_static(x: Tensor, routing: Routing, experts: ConvExperts, first: PlainKernel, second: PlainKernel) -> Tensor:
    """See `pcenet.nn.dispatch.run_experts`; ``first`` and ``second`` are the experts' convolutions."""
    size = (x.shape[2], x.shape[3])
    slots = _Slots(x, routing, first.side)
    hidden = slots.convolve(slots.take(x, first), first)
    hidden = experts.activate(experts.norm1(hidden, slots.expert, slots.real))
    if second.margin:
        hidden_map = merge_patches(slots.put(hidden), routing.grid, size)
        windows = slots.take(hidden_map, second)
    else:
        windows = hidden.permute(0, 2, 3, 1).flatten(1, 2)
    out = experts.norm2(slots.convolve(windows, second), slots.expert, slots.real)
    return merge_patches(slots.put_weighted(out), routing.grid, size)


def convolve_static(x: Tensor, routing: Routing, kernel: PlainKernel, bias: Tensor | None) -> Tensor:
    """See `pcenet.nn.dispatch.run_convolution`; ``kernel`` is the experts' convolution."""
    slots = _Slots(x, routing, kernel.side)
    out = slots.convolve(slots.take(x, kernel), kernel)
    if bias is not None:
        out = out + bias.index_select(0, slots.expert)[:, :, None, None].to(out.dtype)
    return merge_patches(slots.put_weighted(out), routing.grid, (x.shape[2], x.shape[3]))


class _Slots:
    """Blocks of b slots, each of one expert: ``ceil(N*k/b) + E`` of them suffice for every routing.

    Attributes:
        expert: ``[T]`` int64.
        weight: ``[T]``, the factor of each slot's output; 0 for padding.
        real: ``[T, 1, S, S]`` bool, False for cells that are padding.
    """

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        self._grid = routing.grid
        num_pairs, num_experts = routing.choice.numel(), routing.num_experts
        # A quarter of an expert's fair share bounds the padding by a quarter of the work.
        block = max(1, num_pairs // (4 * num_experts))
        num_blocks = -(-num_pairs // block) + num_experts
        num_slots = num_blocks * block

        load = routing.kept_load
        last_block = ((load + block - 1) // block).cumsum(0)
        first_slot = (last_block * block).roll(1).index_fill(0, load.new_zeros(1), 0)
        first_rank = load.cumsum(0) - load
        pair = routing.pair_order
        expert = routing.choice.flatten()[pair]
        rank = torch.arange(num_pairs, device=x.device)
        slot = torch.where(routing.kept.flatten()[pair], first_slot[expert] + rank - first_rank[expert], num_slots)
        block_index = torch.arange(num_blocks, device=x.device)[:, None]
        self._expert_of_block = (block_index >= last_block).sum(1).clamp(max=num_experts - 1)
        self.expert = self._expert_of_block.repeat_interleave(block, output_size=num_slots)
        # A dropped pair reads the row of zeros that lies behind the slots.
        self._slot_of_pair = slot.scatter(0, pair, slot).view_as(routing.choice)
        # Dropped pairs all write to one place beyond the end, which is cut off.
        pair_of_slot = slot.new_full((num_slots + 1,), num_pairs).scatter(0, slot, pair)[:num_slots]
        self._patch_of_slot = pair_of_slot // routing.top_k
        self.weight = F.pad(routing.choice_weight.flatten(), (0, 1))[pair_of_slot]
        cells = real_cells(x, patch_size)
        if cells is None:
            self.real = (pair_of_slot < num_pairs)[:, None, None, None].expand(-1, 1, patch_size, patch_size)
        else:
            self.real = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, 1))[self._patch_of_slot]

    def take(self, x: Tensor, kernel: PlainKernel) -> Tensor:
        """What a kernel reads of a map for each slot, ``[T, cells, C]``; zeros for padding."""
        size = (x.shape[2], x.shape[3])
        index = kernel.windows(self._grid, size, x.device).rows(self._patch_of_slot)
        return append_zeros(map_to_rows(x)).index_select(0, index.flatten()).unflatten(0, index.shape)

    def convolve(self, windows: Tensor, kernel: PlainKernel) -> Tensor:
        """Each slot through its expert's convolution, ``[T, D, S, S]``."""
        return kernel.apply_blocks(windows, kernel.weight.index_select(0, self._expert_of_block))

    def put(self, batch: Tensor) -> Tensor:
        """Slots ``[T, C, S, S]`` summed into patches ``[N, C, S, S]``; zeros for a patch without a slot."""
        pixels_last = batch.permute(0, 2, 3, 1)
        rows = F.pad(pixels_last.flatten(1), (0, 0, 0, 1))
        first, *others = (rows.index_select(0, column) for column in self._slot_of_pair.unbind(1))
        patches = sum(others, start=first)
        return patches.view(-1, *pixels_last.shape[1:]).permute(0, 3, 1, 2)

    def put_weighted(self, batch: Tensor) -> Tensor:
        """As `put`, each slot times its weight."""
        return self.put(batch * self.weight[:, None, None, None].to(batch.dtype))
