"""The operators in plain PyTorch: right on every device and in every type, twice differentiable, exportable.

No shape depends on the routing. Each expert's patches fill whole blocks of b slots, ``ceil(N/b) + E`` blocks in all,
and every block is convolved with its expert's kernel. Axes as in `pcenet.ops.functional`; G blocks, T = G*b slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this side a convolution is a matrix product of what each pixel reads: libraries' convolutions of so little fall
# to a third of their speed.
MATRIX_SIDE = 2


class Affine(NamedTuple):
    """``residual + gate * act(x * scale + shift)`` of a map x; of a patch that is nobody's, the residual alone.

    Attributes:
        scale: ``[E, C]``; None: 1.
        shift: ``[E, C]``; None: 0.
        gelu: whether act is GELU, or the identity.
        gate: ``[N]``; None: 1.
        residual: ``[B, C, H, W]``; None: 0.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    gelu: bool = False
    gate: Tensor | None = None
    residual: Tensor | None = None


class Slots(NamedTuple):
    """Blocks of slots, each of one expert.

    Attributes:
        patch: ``[T]`` int64, the patch in each slot; any patch where a slot is not filled.
        expert: ``[G]`` int64, the expert of each block.
        of_patch: ``[N]`` int64, the slot of each patch; T for a patch that nobody serves.
    """

    patch: Tensor
    expert: Tensor
    of_patch: Tensor


def fill_slots(expert: Tensor, num_experts: int, block: int | None = None) -> Slots:
    """Sort patches into slots, ``block`` to a block, by their ``expert`` ``[N]``."""
    num_patches = expert.shape[0]
    if block is None:  # a quarter of an expert's fair share bounds what is padded by a quarter of the work
        block = max(1, num_patches // (4 * num_experts))
    blocks = -(-num_patches // block) + num_experts
    patches = torch.arange(num_patches, device=expert.device)
    load = expert.new_zeros(num_experts + 1).scatter_add(0, expert + 1, torch.ones_like(expert))[1:]
    last_block = ((load + block - 1) // block).cumsum(0)
    order = torch.argsort(torch.where(expert < 0, num_experts, expert), stable=True)
    own = expert[order]
    first_slot = F.pad(last_block * block, (1, 0))[own.clamp(min=0)]
    first_rank = F.pad(load.cumsum(0), (1, 0))[own.clamp(min=0)]
    slot = torch.where(own < 0, blocks * block, first_slot + patches - first_rank)
    # Patches of nobody all write to one place beyond the end, which is cut off.
    patch = order.new_zeros(blocks * block + 1).scatter(0, slot, order)[:-1]
    of_block = (torch.arange(blocks, device=expert.device)[:, None] >= last_block).sum(1).clamp(max=num_experts - 1)
    return Slots(patch, of_block, slot.scatter(0, order, slot))


def patch_conv2d(
    x: Tensor, weight: Tensor, base: Tensor | None, expert: Tensor, patch_size: int, neighbours: bool
) -> Tensor:
    """See `pcenet.ops.patch_conv2d`."""
    side, kernel = patch_size, weight.shape[-1]
    weight = (weight if base is None else weight + base).to(x.dtype)
    slots = fill_slots(expert, len(weight))
    by_block = weight.index_select(0, slots.expert)
    blocks = by_block.shape[0]
    if side <= MATRIX_SIDE or kernel == 1:
        read = _gather(x, slots.patch, side, _taps(side, kernel, neighbours, x.device), kernel // 2)
        product = read.reshape(blocks, -1, kernel**2 * x.shape[1]) @ by_block.permute(0, 3, 4, 2, 1).flatten(1, 3)
        pixels = product.view(slots.patch.shape[0], side * side, -1)
    else:
        margin = kernel // 2 if neighbours else 0
        cells = _square(side + 2 * margin, x.device)
        windows = _gather(x, slots.patch, side, cells, margin).unflatten(1, (side + 2 * margin, -1)).permute(0, 3, 1, 2)
        # One grouped convolution: group g of the channels is convolved with block g's kernel.
        grouped = windows.unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1, 2)
        out = F.conv2d(grouped, by_block.flatten(0, 1), padding=kernel // 2 - margin, groups=blocks)
        pixels = out.unflatten(1, (blocks, -1)).transpose(0, 1).permute(0, 1, 3, 4, 2).flatten(0, 1).flatten(1, 2)
    patches = F.pad(pixels.flatten(1), (0, 0, 0, 1)).index_select(0, slots.of_patch)
    return merge(patches.view(-1, side * side, pixels.shape[2]), x, side)


def _square(side: int, device: torch.device) -> Tensor:
    """Rows and columns ``[side**2, 2]`` of a square's cells."""
    return torch.cartesian_prod(*[torch.arange(side, device=device)] * 2)


def _taps(side: int, kernel: int, neighbours: bool, device: torch.device) -> Tensor:
    """What each pixel of a patch reads, ``[S**2 * K**2, 2]``: rows and columns of the patch with its margin; -1 for
    what lies beyond the patch, without neighbours."""
    cells = (_square(side, device)[:, None] + _square(kernel, device)).flatten(0, 1)
    inside = ((cells >= kernel // 2) & (cells < side + kernel // 2)).all(1, keepdim=True)
    return cells if neighbours else torch.where(inside, cells, -1)


def _gather(x: Tensor, patch: Tensor, side: int, cells: Tensor, margin: int) -> Tensor:
    """Pixels of patches, ``[T, cells, C]``: those of the patches with a margin around them that ``cells``
    ``[cells, 2]`` names, zeros for -1 and beyond the map."""
    _, _, height, width = x.shape
    rows, columns = grid_of(x, side)
    # One more row at the top: a cell of -1 reads the first pixel, which is zero.
    padded = F.pad(x, (margin, margin + columns * side - width, margin + 1, margin + rows * side - height))
    pixels = padded.permute(0, 2, 3, 1)
    line = pixels.shape[2]
    image, row, column = patch // (rows * columns), patch // columns % rows, patch % columns
    corner = image * (pixels.shape[1] * line) + (row * side + 1) * line + column * side
    own = cells[:, 0] * line + cells[:, 1]
    index = torch.where(cells[:, 0] < 0, 0, corner[:, None] + own)
    return pixels.flatten(0, 2).index_select(0, index.flatten()).view(patch.shape[0], len(cells), -1)


def grid_of(x: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches that cover a map."""
    return -(-x.shape[2] // patch_size), -(-x.shape[3] // patch_size)


def merge(patches: Tensor, x: Tensor, side: int) -> Tensor:
    """Patches ``[N, S**2, D]`` as a map ``[B, D, H, W]`` of the size of x, channels-last."""
    rows, columns = grid_of(x, side)
    cells = patches.view(x.shape[0], rows, columns, side, side, -1).transpose(2, 3)
    pixels = cells.reshape(x.shape[0], rows * side, columns * side, -1)[:, : x.shape[2], : x.shape[3]]
    return pixels.permute(0, 3, 1, 2)


def spread(per_patch: Tensor, x: Tensor, side: int) -> Tensor:
    """``[N, D]`` or ``[N]`` as a map ``[B, D, H, W]``, every pixel with what its patch has."""
    rows, columns = grid_of(x, side)
    lines = per_patch.view(x.shape[0], rows, 1, columns, 1, -1).expand(-1, -1, side, -1, side, -1)
    pixels = lines.reshape(x.shape[0], rows * side, columns * side, -1)
    return pixels[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)


def patch_affine(
    x: Tensor,
    expert: Tensor,
    patch_size: int,
    scale: Tensor | None,
    shift: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """See `pcenet.ops.patch_affine`."""
    dtype, out = x.dtype, x
    for parameter, by in ((scale, torch.mul), (shift, torch.add)):
        if parameter is not None:
            # Nobody's patches have an expert of their own, of zeros.
            own = F.pad(parameter, (0, 0, 1, 0)).index_select(0, expert + 1)
            out = by(out, spread(own, x, patch_size))
    if gelu:
        out = F.gelu(out)
    if scale is None:
        served = (expert >= 0).to(dtype)
        gate = served if gate is None else gate * served
    if gate is not None:
        out = out * spread(gate, x, patch_size)
    out = out.to(dtype)
    return out if residual is None else residual + out


def expert_moments(x: Tensor, expert: Tensor, patch_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `pcenet.ops.expert_moments`."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))

    def total(pixels: Tensor) -> Tensor:
        """Sums of a map over each expert's patches, ``[E, C]``."""
        by_patch = F.avg_pool2d(_whole(pixels, patch_size), patch_size, divisor_override=1)
        sums = by_patch.permute(0, 2, 3, 1).flatten(0, 2)
        return sums.new_zeros(num_experts + 1, sums.shape[1]).index_add(0, expert + 1, sums)[1:]

    count = total(values.new_ones(1, 1, *x.shape[2:]).expand(x.shape[0], -1, -1, -1))
    mean = total(values) / count.clamp(min=1)
    centred = values - spread(F.pad(mean, (0, 0, 1, 0)).index_select(0, expert + 1), x, patch_size)
    return count[:, 0], mean, total(centred.square()) / count.clamp(min=1)


def _whole(x: Tensor, side: int) -> Tensor:
    rows, columns = grid_of(x, side)
    return F.pad(x, (0, columns * side - x.shape[3], 0, rows * side - x.shape[2]))


class Standard(NamedTuple):
    """What standardises each expert's pixels: the factor and the mean, ``[E, C]``; and what share a pixel has of them,
    ``[E, 1]``, 0 where they are running statistics."""

    rstd: Tensor
    mean: Tensor
    share: Tensor


Moments = tuple[Tensor, Tensor, Tensor]
Total = Callable[[Tensor], Tensor]


def standardise(
    moments: Moments, running_mean: Tensor, running_var: Tensor, eps: float, total: Total | None
) -> tuple[Standard, Moments]:
    """By the moments of each expert's pixels, or by running ones for an expert of fewer than 2; and the moments, of all
    processes where there is a total."""
    if total is not None:
        moments = _total_moments(*moments, total)
    count, mean, variance = moments
    enough = (count >= 2)[:, None]
    mean = torch.where(enough, mean, running_mean.to(mean.dtype))
    variance = torch.where(enough, variance, running_var.to(variance.dtype))
    share = torch.where(enough, count.clamp(min=1).reciprocal()[:, None], 0.0)
    return Standard(torch.rsqrt(variance + eps), mean, share), moments


def _total_moments(count: Tensor, mean: Tensor, variance: Tensor, total: Total) -> Moments:
    """Moments of the values of all processes: first the means, then squares around the common one."""
    own = torch.cat((count[:, None], mean * count[:, None]), dim=1)
    everybody = total(own)
    all_count, all_mean = everybody[:, 0], everybody[:, 1:] / everybody[:, :1].clamp(min=1)
    squares = total((variance + (mean - all_mean).square()) * count[:, None])
    return all_count, all_mean, squares / all_count.clamp(min=1)[:, None]


def expert_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert: Tensor,
    patch_size: int,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    *statistics: Any,
) -> tuple[Tensor, Moments]:
    """See `pcenet.ops.expert_norm`; ``statistics`` is what `standardise` needs beside moments."""
    (rstd, mean, _), moments = standardise(expert_moments(x, expert, patch_size, len(weight)), *statistics)
    scale = rstd * weight
    return patch_affine(x, expert, patch_size, scale, bias - mean * scale, gelu, gate, residual), moments


def patch_perceptron(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, patch_size: int) -> Tensor:
    """See `pcenet.ops.patch_perceptron`."""
    content, position = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
    lines = F.linear(rows, position, bias)[:, None] + F.linear(columns, position)
    hidden = F.gelu(F.linear(x.permute(0, 2, 3, 1), content) + lines)
    return _patch_means(hidden, x, patch_size)


def _patch_means(pixels: Tensor, x: Tensor, side: int) -> Tensor:
    """Pixels ``[B, H, W, D]`` to the means over each patch's real ones, ``[N, D]``."""
    (rows, columns), (batch, height, width, channels) = grid_of(x, side), pixels.shape
    below, right = rows * side - height, columns * side - width
    if not (isinstance(below, int) and isinstance(right, int) and below == right == 0):
        pixels = F.pad(pixels, (0, 0, 0, right, 0, below))
    # Rows first: long stretches of memory are added.
    lines = pixels.reshape(batch * rows, side, columns * side * channels).sum(1)
    total = lines.view(batch, rows, columns, side, channels).sum(3)
    counts = [(size - torch.arange(0, size, side, device=x.device)).clamp(max=side) for size in (height, width)]
    return (total / (counts[0][:, None] * counts[1])[..., None]).flatten(0, 2)
