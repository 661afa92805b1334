"""Running experts on their patches: the only file that handles indices.

Axes: N patches, k experts per patch, T slots (one per kept pair of patch and expert, in the order in which the experts
take them, perhaps with padding between), E experts, C channels, S patch side.

Both implementations follow the same five steps; they differ in how slots are laid out and in how a batch of slots is
convolved and normalised. ``"sorted"`` needs the experts' counts on the host, once per forward pass, and pads nothing.
``"static"`` has no shape that depends on the routing: each expert's slots are padded to whole blocks of b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn.experts import ConvExperts, StackedConv2d, StackedNorm
from pcenet.nn.patches import Grid, merge_patches, patch_windows, split_map
from pcenet.nn.routing import Routing

Border = Literal["zero", "halo", "exchange"]
Dispatch = Literal["sorted", "static"]


def run_experts(
    x: Tensor, routing: Routing, experts: ConvExperts, *, patch_size: int, border: Border, dispatch: Dispatch
) -> Tensor:
    """Each patch through its experts, weighted and summed over them; zero where a patch was dropped.

    Args:
        x: the map ``[B, C, H, W]`` that was routed.
        routing: who goes where.
        experts: the experts' weights.
        patch_size: S.
        border: what a convolution sees beyond its patch's edge (design, section 2).
        dispatch: ``"sorted"`` or ``"static"``.

    Returns:
        Patches ``[N, C_out, S, S]``, channels-last in memory.
    """
    # On the meta device there are no counts to sort by, only shapes.
    layout = _StaticSlots if dispatch == "static" or x.is_meta else _SortedSlots
    slots = layout(x, routing, patch_size)
    size = (x.shape[2], x.shape[3])
    patches = slots.take(x, margin=0 if border == "zero" else 1)
    hidden = slots.convolve(patches, experts.conv1, padding=1 if border == "zero" else 0)
    hidden = experts.activate(slots.normalise(hidden, experts.norm1))
    if border == "exchange":
        hidden_map = merge_patches(slots.put(hidden), routing.grid, size)
        hidden = slots.take(hidden_map, margin=1)
    out = slots.convolve(hidden, experts.conv2, padding=0 if border == "exchange" else 1)
    out = slots.normalise(out, experts.norm2)
    return slots.put(out * slots.weight[:, None, None, None].to(out.dtype))


class _Slots(ABC):
    """Where the patches of a batch lie while their experts work on them.

    ``slots_padded`` and ``pairs_dropped`` say whether the indices below may point beyond the end, at a row of zeros.

    Attributes:
        patch_of_slot: ``[T, 1]`` int64; N for a slot that is padding.
        slot_of_pair: ``[N, k]`` int64; T for a pair that was dropped.
        weight: ``[T]``, the factor of the slot's output; 0 for padding.
        real: ``[T, 1, S, S]`` bool, False for cells that are padding; None where every cell is real.
    """

    patch_of_slot: Tensor
    slot_of_pair: Tensor
    weight: Tensor
    real: Tensor | None
    slots_padded: bool
    pairs_dropped: bool

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def take(self, x: Tensor, margin: int) -> Tensor:
        """The patch of each slot with its surroundings, ``[T, C, S + 2m, S + 2m]``, from a map ``[B, C, H, W]``."""
        windows = _Windows.apply(x, self.patch_size, margin)
        rows = _Gather.apply(
            windows.flatten(1), self.patch_of_slot, self.slot_of_pair, self.slots_padded, self.pairs_dropped
        )
        return rows.view(-1, *windows.shape[1:]).permute(0, 3, 1, 2)

    def put(self, batch: Tensor) -> Tensor:
        """Slots ``[T, C, S, S]`` summed into patches ``[N, C, S, S]``; zeros for a patch without a slot."""
        pixels_last = batch.permute(0, 2, 3, 1)
        rows = _Gather.apply(
            pixels_last.flatten(1), self.slot_of_pair, self.patch_of_slot, self.pairs_dropped, self.slots_padded
        )
        return rows.view(-1, *pixels_last.shape[1:]).permute(0, 3, 1, 2)

    @abstractmethod
    def convolve(self, batch: Tensor, conv: StackedConv2d, padding: int) -> Tensor:
        """Each slot through its expert's convolution."""

    @abstractmethod
    def normalise(self, batch: Tensor, norm: StackedNorm) -> Tensor:
        """Each slot through its expert's normalisation."""


class _SortedSlots(_Slots):
    """The kept pairs sorted by expert, nothing else."""

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        super().__init__(patch_size)
        counts: list[int] = routing.kept_load.tolist()  # the one synchronisation with the host
        # Where an intervention drops everything, an empty batch through one expert keeps shapes and gradients.
        self.experts = [e for e, count in enumerate(counts) if count] or [0]
        self.counts = [counts[e] for e in self.experts]
        total = sum(counts)
        order = routing.pair_order
        pairs = order[:total]
        rank = torch.arange(routing.choice.numel(), device=x.device).clamp(max=total)
        self.patch_of_slot = (pairs // routing.top_k).unsqueeze(1)
        self.slot_of_pair = torch.empty_like(rank).scatter_(0, order, rank).view_as(routing.choice)
        self.slots_padded = False
        self.pairs_dropped = total < routing.choice.numel()
        self.weight = routing.choice_weight.flatten()[pairs]
        self.expert_of_slot = routing.choice.flatten()[pairs]
        cells = real_cells(x, patch_size)
        self.real = None if cells is None else cells[self.patch_of_slot[:, 0]]

    def convolve(self, batch: Tensor, conv: StackedConv2d, padding: int) -> Tensor:
        weights = conv.weight.unbind(0)
        batches = batch.split(self.counts)
        return torch.cat([F.conv2d(x, weights[e], padding=padding) for x, e in zip(batches, self.experts, strict=True)])

    def normalise(self, batch: Tensor, norm: StackedNorm) -> Tensor:
        if self.real is not None:
            return norm.forward_slots(batch, self.expert_of_slot, self.real)
        return torch.cat(norm.forward_experts(list(batch.split(self.counts)), self.experts))


class _StaticSlots(_Slots):
    """Blocks of b slots, each of one expert: ``ceil(N*k/b) + E`` of them suffice for every routing."""

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        super().__init__(patch_size)
        num_pairs, num_experts = routing.choice.numel(), routing.num_experts
        # A quarter of an expert's fair share bounds the padding by a quarter of the work.
        block = max(1, num_pairs // (4 * num_experts))
        self.num_blocks = -(-num_pairs // block) + num_experts
        num_slots = self.num_blocks * block

        load = routing.kept_load
        last_block = ((load + block - 1) // block).cumsum(0)
        first_slot = (last_block * block).roll(1).index_fill(0, load.new_zeros(1), 0)
        first_rank = load.cumsum(0) - load
        pair = routing.pair_order
        expert = routing.choice.flatten()[pair]
        rank = torch.arange(num_pairs, device=x.device)
        slot = torch.where(routing.kept.flatten()[pair], first_slot[expert] + rank - first_rank[expert], num_slots)
        block_index = torch.arange(self.num_blocks, device=x.device)
        self.expert_of_block = torch.searchsorted(last_block, block_index, right=True).clamp(max=num_experts - 1)
        self.expert_of_slot = self.expert_of_block.repeat_interleave(block, output_size=num_slots)
        self.slot_of_pair = torch.empty_like(slot).scatter_(0, pair, slot).view_as(routing.choice)
        # Dropped pairs all write to one place beyond the end, which is cut off.
        pair_of_slot = slot.new_full((num_slots + 1,), num_pairs).scatter_(0, slot, pair)[:num_slots]
        self.patch_of_slot = (pair_of_slot // routing.top_k).unsqueeze(1)
        self.slots_padded = True
        self.pairs_dropped = True
        self.weight = F.pad(routing.choice_weight.flatten(), (0, 1))[pair_of_slot]
        filled = (pair_of_slot < num_pairs)[:, None, None, None]
        cells = real_cells(x, patch_size)
        if cells is None:
            self.real = filled.expand(-1, 1, patch_size, patch_size)
        else:
            self.real = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, 1))[self.patch_of_slot[:, 0]]

    def convolve(self, batch: Tensor, conv: StackedConv2d, padding: int) -> Tensor:
        # One grouped convolution: block g of the channels is convolved with the kernel of the block's expert.
        weight = conv.weight.index_select(0, self.expert_of_block).flatten(0, 1)
        blocks = batch.unflatten(0, (self.num_blocks, -1)).transpose(0, 1).flatten(1, 2)
        if self.patch_size == 1:
            # torch's own convolution takes the strides of axes of one element literally and refuses its own gradient.
            blocks = blocks.clone(memory_format=torch.contiguous_format)
        out = F.conv2d(blocks, weight, padding=padding, groups=self.num_blocks)
        return out.unflatten(1, (self.num_blocks, -1)).transpose(0, 1).flatten(0, 1)

    def normalise(self, batch: Tensor, norm: StackedNorm) -> Tensor:
        assert self.real is not None
        return norm.forward_slots(batch, self.expert_of_slot, self.real)


def real_cells(x: Tensor, patch_size: int) -> Tensor | None:
    """``[N, 1, S, S]`` bool, which cells of each patch lie on the map; None if all do."""
    batch, _, height, width = x.shape
    if height % patch_size == 0 and width % patch_size == 0:
        return None
    cells, _ = split_map(x.new_ones((1, 1, height, width), dtype=torch.bool), patch_size)
    return cells.repeat(batch, 1, 1, 1)


class _Gather(torch.autograd.Function):
    """``out[m] = sum_j rows[index[m, j]]``, a missing row (index ``len(rows)``) counting as zeros.

    Its adjoint is the same function with the inverse index, so that neither direction scatters: on a CPU, adding rows
    by index costs up to five times as much as gathering them.
    """

    @staticmethod
    def forward(rows: Tensor, index: Tensor, inverse: Tensor, has_missing: bool, inverse_has_missing: bool) -> Tensor:
        if has_missing:
            rows = F.pad(rows, (0, 0, 0, 1))
        first, *others = index.unbind(1)
        out = rows.index_select(0, first)
        for column in others:
            out += rows.index_select(0, column)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, inverse, ctx.has_missing, ctx.inverse_has_missing = inputs
        ctx.save_for_backward(index, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        index, inverse = ctx.saved_tensors
        grad = _Gather.apply(grads[0], inverse, index, ctx.inverse_has_missing, ctx.has_missing)
        return grad, None, None, None, None


class _Windows(torch.autograd.Function):
    """Every patch with its margin, ``[N, S + 2m, S + 2m, C]`` in memory order, from a map ``[B, C, H, W]``."""

    @staticmethod
    def forward(x: Tensor, patch_size: int, margin: int) -> Tensor:
        side = patch_size + 2 * margin
        windows = patch_windows(x, patch_size, margin).permute(0, 1, 2, 4, 5, 3)
        return windows.reshape(-1, side, side, x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.patch_size, ctx.margin = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Unwindows.apply(grads[0], ctx.shape, ctx.patch_size, ctx.margin), None, None


class _Unwindows(torch.autograd.Function):
    """The adjoint of `_Windows`: sums the windows into the map."""

    @staticmethod
    def forward(windows: Tensor, shape: torch.Size, patch_size: int, margin: int) -> Tensor:
        return _fold_windows(windows, shape, patch_size, margin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.patch_size, ctx.margin = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Windows.apply(grads[0], ctx.patch_size, ctx.margin), None, None, None


def _fold_windows(windows: Tensor, shape: torch.Size, patch_size: int, margin: int) -> Tensor:
    batch, channels, height, width = shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    side = patch_size + 2 * margin
    cells = windows.reshape(batch, rows, columns, side, side, channels)
    if margin:
        cells = _fold_axis(_fold_axis(cells, 1, patch_size, margin), 2, patch_size, margin)
    return merge_patches(cells.flatten(0, 2).permute(0, 3, 1, 2), Grid(batch, rows, columns), (height, width))


def _fold_axis(cells: Tensor, axis: int, patch_size: int, margin: int) -> Tensor:
    """Give each patch what its neighbours' margins hold of it along one axis, and cut its own margins off.

    Plain slices: an in-place sum into a strided view of the map, which would do all at once, loses the elements between
    the strides when `torch.compile` makes it functional.
    """
    inside = axis + 2
    folded = cells.narrow(inside, margin, patch_size).clone()
    count = cells.shape[axis]
    if count > 1:
        before, after = folded.narrow(axis, 0, count - 1), folded.narrow(axis, 1, count - 1)
        before.narrow(inside, patch_size - margin, margin).add_(
            cells.narrow(axis, 1, count - 1).narrow(inside, 0, margin)
        )
        after.narrow(inside, 0, margin).add_(
            cells.narrow(axis, 0, count - 1).narrow(inside, margin + patch_size, margin)
        )
    return folded
