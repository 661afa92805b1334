"""Running experts on their patches: the only file that handles indices.

Axes: B images of H x W, N patches, k experts per patch, T slots (one per kept pair of patch and expert, in the order
in which the experts take them, perhaps with padding between), E experts, C channels, S patch side.

Maps and batches are handled as rows of C numbers, one per pixel, and all that moves between a map and the experts'
batches moves by gathering whole rows, gradients too: on a CPU, adding rows by index costs up to five times as much.
A row of zeros at the end stands for everything that is not there.

Both implementations follow the same steps; they differ in how slots are laid out and in how a batch of slots is
convolved and normalised. ``"sorted"`` needs the experts' counts on the host, once per forward pass, and gives each
expert a batch of its own. ``"static"`` has no shape that depends on the routing: each expert's slots are padded to
whole blocks of b, and all blocks are one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn.experts import ConvExperts, StackedNorm
from pcenet.nn.kernels import Kernel, make_kernel
from pcenet.nn.patches import merge_patches, split_map
from pcenet.nn.routing import Routing

Border = Literal["zero", "halo", "exchange"]
Dispatch = Literal["sorted", "static"]

# Libraries prepare a kernel for every new size of a batch, and routing would make new sizes in every step. Batches are
# therefore padded to multiples of this part of an expert's fair share, 3 % of the work on average.
_SIZES_PER_SHARE = 16


def run_experts(
    x: Tensor, routing: Routing, experts: ConvExperts, *, patch_size: int, border: Border, dispatch: Dispatch
) -> Tensor:
    """Each patch through its experts, weighted, summed over them and put back in place.

    Args:
        x: the map ``[B, C, H, W]`` that was routed.
        routing: who goes where.
        experts: the experts' weights.
        patch_size: S.
        border: what a convolution sees beyond its patch's edge (design, section 2).
        dispatch: ``"sorted"`` or ``"static"``.

    Returns:
        The map ``[B, C_out, H, W]``, channels-last in memory, zero where a patch was dropped.
    """
    # On the meta device there are no counts to sort by, only shapes.
    run = _run_static if dispatch == "static" or x.is_meta else _run_sorted
    return run(x, routing, experts, patch_size, border)


def _run_static(x: Tensor, routing: Routing, experts: ConvExperts, patch_size: int, border: Border) -> Tensor:
    return _run(_StaticSlots(x, routing, patch_size), x, routing, experts, border)


@torch.compiler.disable(reason="batches whose sizes change from step to step would be compiled again in each")
def _run_sorted(x: Tensor, routing: Routing, experts: ConvExperts, patch_size: int, border: Border) -> Tensor:
    return _run(_SortedSlots(x, routing, patch_size), x, routing, experts, border)


def _run(slots: _Slots, x: Tensor, routing: Routing, experts: ConvExperts, border: Border) -> Tensor:
    side = slots.patch_size
    kernel = make_kernel(_autocast(experts.conv1.weight), side, margin=0 if border == "zero" else 1)
    hidden = slots.convolve_map(_rows_of_map(_autocast(x)), kernel)
    hidden = [experts.activate(batch) for batch in slots.normalise(hidden, experts.norm1)]
    kernel = make_kernel(_autocast(experts.conv2.weight), side, margin=1 if border == "exchange" else 0)
    if border == "exchange":
        out = slots.convolve_map(slots.put(hidden), kernel)
    else:
        out = slots.convolve(hidden, kernel)
    patches = slots.combine(slots.normalise(out, experts.norm2))
    return merge_patches(patches, routing.grid, (x.shape[2], x.shape[3]))


def _autocast(x: Tensor) -> Tensor:
    """Cast once, before the gather, which then moves half the bytes; inside it, autocast would see every batch."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


def _rows_of_map(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B*H*W + 1, C]``, the last row zeros."""
    return F.pad(x.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))


def _rows_of_batches(batches: list[Tensor], dims: int) -> Tensor:
    """Batches ``[n_e, C, S, S]`` as rows of a pixel (``dims`` = 3) or of a patch (1) each, and one of zeros."""
    rows = [batch.permute(0, 2, 3, 1).flatten(0, dims - 1).flatten(1) for batch in batches]
    return torch.cat([*rows, rows[0].new_zeros(1, rows[0].shape[1])])


class _Slots(ABC):
    """Where the patches of a batch lie while their experts work on them.

    Attributes:
        patch_of_slot: ``[T]`` int64; N for a slot that is padding.
        slot_of_pair: ``[N, k]`` int64; T for a pair that was dropped.
        real: ``[T, 1, S, S]`` bool, False for cells that are padding; None where every cell is real.
    """

    patch_of_slot: Tensor
    slot_of_pair: Tensor
    real: Tensor | None

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        self.patch_size = patch_size
        self.grid = routing.grid
        self.size = (x.shape[2], x.shape[3])
        self.pair_weight = torch.where(routing.kept, routing.choice_weight, 0)

    def put(self, batches: list[Tensor]) -> Tensor:
        """Slots into rows of a map, ``[B*H*W + 1, C]``, zeros where a patch has no slot; one slot per patch (k = 1)."""
        window = _Window(self, side=self.patch_size, spots=1, taps=self.patch_size, margin=0)
        rows = _rows_of_batches(batches, dims=3)
        nothing = self.slot_of_pair.new_full((1,), len(rows) - 1)
        row_of_pixel = torch.cat((window.rows_of_pixels().clamp(max=len(rows) - 1), nothing))
        pixel_of_row = F.pad(window.pixels_of(self.patch_of_slot).flatten(), (0, 1), value=window.outside)
        return _Gather.apply(rows, row_of_pixel, pixel_of_row)

    def combine(self, batches: list[Tensor]) -> Tensor:
        """Slots times their weights, summed into patches ``[N, C, S, S]``."""
        rows = _rows_of_batches(batches, dims=1)
        patches = _Combine.apply(rows, self.pair_weight.to(rows.dtype), self.slot_of_pair, self.patch_of_slot)
        return patches.view(len(patches), self.patch_size, self.patch_size, -1).permute(0, 3, 1, 2)

    @abstractmethod
    def convolve_map(self, rows: Tensor, kernel: Kernel) -> list[Tensor]:
        """Each slot's window of a map, given as rows, through its expert's convolution."""

    @abstractmethod
    def convolve(self, batches: list[Tensor], kernel: Kernel) -> list[Tensor]:
        """Each slot through its expert's convolution."""

    @abstractmethod
    def normalise(self, batches: list[Tensor], norm: StackedNorm) -> list[Tensor]:
        """Each slot through its expert's normalisation."""


class _SortedSlots(_Slots):
    """The kept pairs sorted by expert, a batch for each expert that has any."""

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        super().__init__(x, routing, patch_size)
        load = routing.kept_load
        counts: list[int] = load.tolist()  # the one synchronisation with the host
        # Where an intervention drops everything, an empty batch through one expert keeps shapes and gradients.
        self.experts = [e for e, count in enumerate(counts) if count] or [0]
        self.counts = [counts[e] for e in self.experts]
        total = sum(counts)
        order = routing.pair_order
        rank = torch.arange(routing.choice.numel(), device=x.device).clamp(max=total)
        self.patch_of_slot = order[:total] // routing.top_k
        self.slot_of_pair = torch.empty_like(rank).scatter_(0, order, rank).view_as(routing.choice)
        self.expert_of_slot = routing.choice.flatten()[order[:total]]
        cells = real_cells(x, patch_size)
        self.real = None if cells is None else cells[self.patch_of_slot]

        step = max(1, total // (len(counts) * _SIZES_PER_SHARE))
        self.padded_counts = [-(-count // step) * step for count in self.counts]
        # Padding repeats an expert's own last patch: whatever it holds, it reaches no other expert.
        padded_load = (load + step - 1) // step * step
        expert = torch.arange(len(counts), device=x.device)
        expert = expert.repeat_interleave(padded_load, output_size=sum(self.padded_counts))
        rank = torch.arange(len(expert), device=x.device) - (padded_load.cumsum(0) - padded_load)[expert]
        self.padded_patch = self.patch_of_slot[torch.minimum(rank, load[expert] - 1) + (load.cumsum(0) - load)[expert]]

    def convolve_map(self, rows: Tensor, kernel: Kernel) -> list[Tensor]:
        return list(_ConvolveMap.apply(rows, kernel.weight, kernel, self))

    def convolve(self, batches: list[Tensor], kernel: Kernel) -> list[Tensor]:
        weights = kernel.weight.unbind(0)
        outputs = []
        for batch, e, padded in zip(batches, self.experts, self.padded_counts, strict=True):
            windows = F.pad(batch.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 0, 0, 0, padded - len(batch)))
            outputs.append(kernel.apply(windows, weights[e])[: len(batch)])
        return outputs

    def normalise(self, batches: list[Tensor], norm: StackedNorm) -> list[Tensor]:
        if self.real is not None:
            return list(norm.forward_slots(torch.cat(batches), self.expert_of_slot, self.real).split(self.counts))
        return norm.forward_experts(batches, self.experts)


class _StaticSlots(_Slots):
    """Blocks of b slots, each of one expert: ``ceil(N*k/b) + E`` of them suffice for every routing."""

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        super().__init__(x, routing, patch_size)
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
        block_index = torch.arange(num_blocks, device=x.device)
        self.expert_of_block = torch.searchsorted(last_block, block_index, right=True).clamp(max=num_experts - 1)
        self.expert_of_slot = self.expert_of_block.repeat_interleave(block, output_size=num_slots)
        self.slot_of_pair = torch.empty_like(slot).scatter_(0, pair, slot).view_as(routing.choice)
        # Dropped pairs all write to one place beyond the end, which is cut off.
        pair_of_slot = slot.new_full((num_slots + 1,), num_pairs).scatter_(0, slot, pair)[:num_slots]
        self.patch_of_slot = pair_of_slot // routing.top_k
        cells = real_cells(x, patch_size)
        if cells is None:
            self.real = (pair_of_slot < num_pairs)[:, None, None, None].expand(-1, 1, patch_size, patch_size)
        else:
            self.real = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, 1))[self.patch_of_slot]

    def convolve_map(self, rows: Tensor, kernel: Kernel) -> list[Tensor]:
        window = _Window.of(kernel, self)
        index = window.pixels_of(self.patch_of_slot)
        taken = _TakeWindows.apply(rows, index, *window.adjoint())
        return [kernel.apply_blocks(taken, kernel.weight.index_select(0, self.expert_of_block))]

    def convolve(self, batches: list[Tensor], kernel: Kernel) -> list[Tensor]:
        windows = batches[0].permute(0, 2, 3, 1).flatten(1, 2)
        return [kernel.apply_blocks(windows, kernel.weight.index_select(0, self.expert_of_block))]

    def normalise(self, batches: list[Tensor], norm: StackedNorm) -> list[Tensor]:
        assert self.real is not None
        return [norm.forward_slots(batches[0], self.expert_of_slot, self.real)]


def real_cells(x: Tensor, patch_size: int) -> Tensor | None:
    """``[N, 1, S, S]`` bool, which cells of each patch lie on the map; None if all do."""
    batch, _, height, width = x.shape
    if height % patch_size == 0 and width % patch_size == 0:
        return None
    cells, _ = split_map(x.new_ones((1, 1, height, width), dtype=torch.bool), patch_size)
    return cells.repeat(batch, 1, 1, 1)


class _Window:
    """Which pixels of a map each patch reads, and which windows each pixel was read into."""

    def __init__(self, slots: _Slots, *, side: int, spots: int, taps: int, margin: int) -> None:
        self.slots = slots
        self.cells = (spots * taps) ** 2
        height, width = slots.size
        self.outside = slots.grid.batch * height * width  # the row of zeros

        def axis(patches: int, size: int) -> tuple[Tensor, int]:
            """Pixels ``[patches, spots, taps]`` along an axis, and how many of them lie on the map."""
            first = [start + spot - margin for start in range(0, patches * side, side) for spot in range(spots)]
            on_map = sum(min(size, start + taps) - max(0, start) for start in first if start < size)
            starts = torch.tensor(first, device=slots.slot_of_pair.device).view(patches, spots, 1)
            return starts + torch.arange(taps, device=starts.device), on_map

        rows, rows_on_map = axis(slots.grid.rows, height)
        columns, columns_on_map = axis(slots.grid.columns, width)
        on_map = ((rows >= 0) & (rows < height))[:, None, :, None, :, None] & ((columns >= 0) & (columns < width))[
            None, :, None, :, None, :
        ]
        pixels = (rows * width)[:, None, :, None, :, None] + columns[None, :, None, :, None, :]
        # ``[P, cells]``
        self.pixels = torch.where(on_map, pixels, self.outside).flatten(2).flatten(0, 1)
        self.count_on_map = rows_on_map * columns_on_map

    @classmethod
    def of(cls, kernel: Kernel, slots: _Slots) -> _Window:
        return cls(slots, side=kernel.side, spots=kernel.spots, taps=kernel.taps, margin=kernel.margin)

    def pixels_of(self, patch: Tensor) -> Tensor:
        """``[n, cells]``: the rows of a map that patches ``[n]`` read; a patch of number N reads zeros."""
        patches_per_image = len(self.pixels)
        pixels_per_image = self.slots.size[0] * self.slots.size[1]
        image = patch // patches_per_image
        return (self.pixels[patch % patches_per_image] + (image * pixels_per_image)[:, None]).clamp(max=self.outside)

    def rows_of_pixels(self) -> Tensor:
        """``[B*H*W]``: where each pixel lies among the cells of all slots, for windows that do not overlap (k = 1)."""
        return self.adjoint()[0]

    def adjoint(self) -> tuple[Tensor, Tensor]:
        """For `_sum_rows`: the cells of all slots that each pixel was read into, then nothing for the row of zeros."""
        grid, slot_of_pair = self.slots.grid, self.slots.slot_of_pair
        flat = self.pixels.flatten()
        pixel, order = flat.sort(stable=True)
        order = order[: self.count_on_map]
        patch, cell = order // self.cells, order % self.cells
        slot = slot_of_pair.view(grid.batch, len(self.pixels), -1)[:, patch]
        num_slots = len(self.slots.patch_of_slot)
        rows = (slot * self.cells + cell[:, None]).clamp(max=num_slots * self.cells)
        pixels_per_image = self.slots.size[0] * self.slots.size[1]
        starts = torch.searchsorted(pixel, torch.arange(pixels_per_image, device=flat.device))
        image = torch.arange(grid.batch, device=flat.device)[:, None] * self.count_on_map
        offsets = F.pad((starts + image).flatten(), (0, 1), value=grid.batch * self.count_on_map)
        return rows.flatten(), offsets * slot_of_pair.shape[1]


def _sum_rows(rows: Tensor, items: Tensor, offsets: Tensor) -> Tensor:
    """``out[i]`` is the sum of the rows ``items[offsets[i]:offsets[i + 1]]``."""
    return F.embedding_bag(items, rows, offsets, mode="sum")


class _Gather(torch.autograd.Function):
    """``rows[index]``, where each row but the one of zeros is taken once at most: its adjoint gathers by ``inverse``."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, inverse = inputs
        ctx.save_for_backward(index, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        index, inverse = ctx.saved_tensors
        return _Gather.apply(grads[0], inverse, index), None, None


class _TakeWindows(torch.autograd.Function):
    """Rows of a map by ``index`` ``[T, cells]`` into windows ``[T, cells, C]``."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor, items: Tensor, offsets: Tensor) -> Tensor:
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, items, offsets = inputs
        ctx.save_for_backward(index, items, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, items, offsets = ctx.saved_tensors
        rows = F.pad(grads[0].flatten(0, 1), (0, 0, 0, 1))
        return _sum_rows(rows, items, offsets), None, None, None


class _ConvolveMap(torch.autograd.Function):
    """Each expert's convolution of the windows that its patches read, a batch ``[n_e, C, S, S]`` per expert.

    Windows are gathered expert by expert, while the cache holds them, and gathered again in the backward pass: kept,
    they would be the largest tensors of a network with small patches.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, kernel: Kernel, slots: _SortedSlots) -> tuple[Tensor, ...]:
        window = _Window.of(kernel, slots)
        ctx.indices = window.pixels_of(slots.padded_patch).split(slots.padded_counts)
        ctx.kernel, ctx.slots, ctx.window = kernel, slots, window
        ctx.save_for_backward(rows, weight)
        weights = weight.unbind(0)
        return tuple(
            kernel.apply(_take(rows, index), weights[e])[:count]
            for index, e, count in zip(ctx.indices, slots.experts, slots.counts, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight = ctx.saved_tensors
        kernel, slots = ctx.kernel, ctx.slots
        weights, weight_grad = weight.unbind(0), torch.zeros_like(weight)
        window_grads = []
        for grad, index, e in zip(grads, ctx.indices, slots.experts, strict=True):
            grad = grad.permute(0, 2, 3, 1)
            grad = F.pad(grad, (0, 0, 0, 0, 0, 0, 0, len(index) - len(grad))).permute(0, 3, 1, 2)
            for_windows, for_weight = kernel.gradients(
                _take(rows, index), weights[e], grad, needed=ctx.needs_input_grad[0]
            )
            weight_grad[e] = for_weight
            if ctx.needs_input_grad[0]:
                window_grads.append(for_windows[: slots.counts[len(window_grads)]].flatten(0, 1))
        if not window_grads:
            return None, weight_grad, None, None
        window_rows = torch.cat([*window_grads, rows.new_zeros(1, rows.shape[1])])
        return _sum_rows(window_rows, *ctx.window.adjoint()), weight_grad, None, None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


class _Combine(torch.autograd.Function):
    """Rows of slots, weighted and summed over the k slots of each patch; the row of zeros for a pair without slot."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, slot_of_pair: Tensor, patch_of_slot: Tensor) -> Tensor:
        return F.embedding_bag(slot_of_pair, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight, slot_of_pair, patch_of_slot = ctx.saved_tensors
        num_slots = len(patch_of_slot)
        # The weight of each slot, 0 for padding and for the row of zeros.
        slot_weight = weight.new_zeros(num_slots + 1).scatter_(0, slot_of_pair.flatten(), weight.flatten())
        patch = F.pad(patch_of_slot, (0, 1)).clamp(max=len(weight) - 1)
        grad = grads[0].index_select(0, patch)
        for_weight = (grad * rows).sum(1)[slot_of_pair]
        return grad.mul_(slot_weight[:, None]), for_weight, None, None
