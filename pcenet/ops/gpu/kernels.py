"""The Triton kernels: what a single program computes. `pcenet.ops.gpu` decides how many programs run, and on what.

Axes as in `pcenet.ops.functional`; maps are pixels ``[B, H, W, C]``. Patches lie in blocks of slots, each block of one
expert (`pcenet.ops.gpu.Blocks`); E as a block's expert means nobody. Everything is summed in float32, in one order.

Places that are masked are computed as all others are, and never read: put elsewhere, they would hide from the
compiler that channels lie side by side, and each would be read alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(y):
    """The exact one, by the error function."""
    return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))


@triton.jit
def gelu_slope(y):
    """Its derivative."""
    return 0.5 * (1 + tl.erf(y * 0.7071067811865476)) + y * tl.exp(-0.5 * y * y) * 0.3989422804014327


@triton.jit
def corner_of(patch, side, rows, columns):
    """A patch's image, int64 as are the places made of it, which pass 2**31; its first row and column on the map."""
    image = patch // (rows * columns)
    return image.to(tl.int64), (patch // columns) % rows * side, patch % columns * side


@triton.jit
def cell_of(tile, patches, block, SLOTS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile of a block's cells, OUT x OUT for each slot, the patch, -1 where there is none, and row and column."""
    number = tile * ROWS + tl.arange(0, ROWS)
    slot, cell = number // (OUT * OUT), number % (OUT * OUT)
    there = slot < SLOTS
    patch = tl.load(patches + tl.where(there, block * SLOTS + slot, 0), mask=there, other=-1)
    return patch, cell // OUT, cell % OUT


@triton.jit
def own(table, expert, channel, channels, otherwise: tl.constexpr):
    """What an expert, or each of several, has for each channel; a constant where there is no table."""
    if table is not None:
        inside = channel < channels
        values = tl.load(table + expert * channels + channel, mask=inside, other=0.0)
    else:
        values = otherwise
    return values


@triton.jit
def convolve(
    x, weight, out, patches, experts, scale, shift, gate, residual, height, width, channels, outs, rows, columns,
    num_experts, SIDE: tl.constexpr, KERNEL: tl.constexpr, NEIGHBOURS: tl.constexpr, MARGIN: tl.constexpr,
    GELU: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, INS: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of one block by a tile of output channels, and what follows the convolution.

    ``weight`` is ``[E, K*K, C, D]``. With a margin of 1, patches grow by a pixel on each side, into ``out``
    ``[N, (S+2)**2, D]``: what a patch alone, without neighbours, makes of the pixels around it.
    """
    SIZE: tl.constexpr = SIDE + 2 * MARGIN
    TILES: tl.constexpr = (SLOTS * SIZE * SIZE + ROWS - 1) // ROWS
    block = tl.program_id(0) // TILES
    patch, row, column = cell_of(tl.program_id(0) % TILES, patches, block, SLOTS, SIZE, ROWS)
    expert = tl.load(experts + block).to(tl.int64)
    out_channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    image, top, left = corner_of(patch, SIDE, rows, columns)
    y, x_ = top + row - MARGIN, left + column - MARGIN
    sums = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    if expert < num_experts:  # of nobody's patches there is nothing to sum
        for tap in range(KERNEL * KERNEL):
            dy = tap // KERNEL - KERNEL // 2
            dx = tap % KERNEL - KERNEL // 2
            reads = (patch >= 0) & (y + dy >= 0) & (y + dy < height) & (x_ + dx >= 0) & (x_ + dx < width)
            if not NEIGHBOURS:
                reads &= (y + dy >= top) & (y + dy < top + SIDE) & (x_ + dx >= left) & (x_ + dx < left + SIDE)
            start = ((image * height + y + dy) * width + x_ + dx) * channels
            for first in range(0, channels, INS):
                channel = first + tl.arange(0, INS)
                mask = reads[:, None] & (channel < channels)[None, :]
                values = tl.load(x + (start[:, None] + channel[None, :]), mask=mask, other=0.0)
                mask = (channel < channels)[:, None] & (out_channel < outs)[None, :]
                at = ((expert * KERNEL * KERNEL + tap) * channels + channel[:, None]) * outs + out_channel[None, :]
                kernel = tl.load(weight + at, mask=mask, other=0.0)
                sums = tl.dot(values, kernel, sums, input_precision=PRECISION)
    writes = (patch >= 0)[:, None] & (out_channel < outs)[None, :]
    if MARGIN:
        pixel = patch.to(tl.int64) * (SIZE * SIZE) + row * SIZE + column
    else:
        writes &= ((y < height) & (x_ < width))[:, None]
        pixel = (image * height + y) * width + x_
    at = pixel[:, None] * outs + out_channel[None, :]
    table = tl.minimum(expert, num_experts - 1)
    sums = sums * own(scale, table, out_channel, outs, 1.0) + own(shift, table, out_channel, outs, 0.0)
    if GELU:
        sums = gelu(sums)
    if gate is not None:
        sums *= tl.load(gate + tl.maximum(patch, 0))[:, None]
    sums = tl.where(expert < num_experts, sums, 0.0)
    if residual is not None:
        sums += tl.load(residual + at, mask=writes, other=0.0).to(tl.float32)
    tl.store(out + at, sums, mask=writes)


@triton.jit
def fold(
    windows, out, pixels, height, width, channels, rows, columns, SIDE: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    """Each pixel's sum of what the up to nine patches around it made of it: ``[N, (S+2)**2, C]`` to a map."""
    SIZE: tl.constexpr = SIDE + 2
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    image, y, x = pixel // (height * width), pixel // width % height, pixel % width
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    sums = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    for near in tl.static_range(9):
        row, column = y // SIDE + near // 3 - 1, x // SIDE + near % 3 - 1
        down, right = y - row * SIDE + 1, x - column * SIDE + 1
        covers = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        covers &= (down >= 0) & (down < SIZE) & (right >= 0) & (right < SIZE)
        cell = ((image * rows + row) * columns + column) * (SIZE * SIZE) + down * SIZE + right
        mask = inside & covers[:, None]
        at = cell[:, None] * channels + channel[None, :]
        sums += tl.load(windows + at, mask=mask, other=0.0).to(tl.float32)
    at = pixel[:, None] * channels + channel[None, :]
    tl.store(out + at, sums, mask=inside)


@triton.jit
def convolve_weight(
    grad, x, out, patches, first_blocks, height, width, channels, outs, rows, columns, num_experts,
    SIDE: tl.constexpr, KERNEL: tl.constexpr, NEIGHBOURS: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """The gradient for one tap of an expert's weight, by tiles of channels, over every SPLITS-th of its blocks.

    ``out`` is ``[SPLITS, E, D, K*K, C]``; ``first_blocks`` ``[E + 1]`` says where each expert's blocks begin.
    """
    TILES: tl.constexpr = (SLOTS * SIDE * SIDE + ROWS - 1) // ROWS
    expert, tap = tl.program_id(0) // (KERNEL * KERNEL), tl.program_id(0) % (KERNEL * KERNEL)
    split, tiles = tl.program_id(1) % SPLITS, tl.program_id(1) // SPLITS
    in_tiles = (channels + INS - 1) // INS
    channel = tiles % in_tiles * INS + tl.arange(0, INS)
    out_channel = tiles // in_tiles * OUTS + tl.arange(0, OUTS)
    dy, dx = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
    sums = tl.zeros((OUTS, INS), dtype=tl.float32)
    last = tl.load(first_blocks + expert + 1)
    for block in range(tl.load(first_blocks + expert) + split, last, SPLITS):
        for tile in range(TILES):
            patch, row, column = cell_of(tile, patches, block, SLOTS, SIDE, ROWS)
            image, top, left = corner_of(patch, SIDE, rows, columns)
            y, x_ = top + row, left + column
            there = (patch >= 0) & (y < height) & (x_ < width)
            mask = there[:, None] & (out_channel < outs)[None, :]
            at = ((image * height + y) * width + x_)[:, None] * outs + out_channel[None, :]
            grads = tl.load(grad + at, mask=mask, other=0.0)
            reads = there & (y + dy >= 0) & (y + dy < height) & (x_ + dx >= 0) & (x_ + dx < width)
            if not NEIGHBOURS:
                reads &= (row + dy >= 0) & (row + dy < SIDE) & (column + dx >= 0) & (column + dx < SIDE)
            mask = reads[:, None] & (channel < channels)[None, :]
            at = ((image * height + y + dy) * width + x_ + dx)[:, None] * channels + channel[None, :]
            values = tl.load(x + at, mask=mask, other=0.0)
            sums = tl.dot(tl.trans(grads), values, sums, input_precision=PRECISION)
    mask = (out_channel < outs)[:, None] & (channel < channels)[None, :]
    at = ((split * num_experts + expert).to(tl.int64) * outs + out_channel[:, None]) * (KERNEL * KERNEL) + tap
    tl.store(out + at * channels + channel[None, :], sums, mask=mask)


@triton.jit
def tile_of_map(experts, pixels, height, width, channels, rows, columns, side, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """A program's pixels and channels: where they are, which there are, and whose patch each pixel is in."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    image, y, x = pixel // (height * width), pixel // width % height, pixel % width
    patch = tl.where(pixel < pixels, (image * rows + y // side) * columns + x // side, 0)
    expert = tl.load(experts + patch)[:, None]
    at = pixel[:, None] * channels + channel[None, :]
    return at, mask, patch, expert, channel[None, :]


@triton.jit
def affine(
    x, out, experts, scale, shift, gate, residual, pixels, height, width, channels, rows, columns,
    SIDE: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """``residual + gate * act(x * scale + shift)`` of a tile of a map; of what is nobody's, the residual."""
    at, mask, patch, expert, channel = tile_of_map(
        experts, pixels, height, width, channels, rows, columns, SIDE, ROWS, OUTS
    )
    table = tl.maximum(expert, 0)
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y = y * own(scale, table, channel, channels, 1.0) + own(shift, table, channel, channels, 0.0)
    if GELU:
        y = gelu(y)
    if gate is not None:
        y *= tl.load(gate + patch)[:, None]
    y = tl.where(expert >= 0, y, 0.0)
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=mask)


@triton.jit
def affine_input_grad(
    grad, x, out, experts, scale, shift, gate, slope, offset, pixels, height, width, channels, rows, columns,
    SIDE: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """The gradient for a tile of the map, and what statistics add to it, ``x * slope + offset``."""
    at, mask, patch, expert, channel = tile_of_map(
        experts, pixels, height, width, channels, rows, columns, SIDE, ROWS, OUTS
    )
    table = tl.maximum(expert, 0)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    factor = own(scale, table, channel, channels, 1.0)
    if GELU:
        g *= gelu_slope(value * factor + own(shift, table, channel, channels, 0.0))
    if gate is not None:
        g *= tl.load(gate + patch)[:, None]
    g = g * factor + (value * own(slope, table, channel, channels, 0.0) + own(offset, table, channel, channels, 0.0))
    tl.store(out + at, tl.where(expert >= 0, g, 0.0), mask=mask)


@triton.jit
def cells_of_patch(patch, first, height, width, rows, columns, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Some of a patch's pixels, and which of them there are."""
    image, top, left = corner_of(patch, SIDE, rows, columns)
    cell = first + tl.arange(0, ROWS)
    y, x = top + cell // SIDE, left + cell % SIDE
    return ((image * height + y) * width + x), (cell < SIDE * SIDE) & (y < height) & (x < width)


@triton.jit
def patch_moments(
    x, out, origin, height, width, channels, rows, columns, SIDE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr
):
    """Of one patch, by channel, the sum and the squared distances from its mean: ``out`` ``[N, 2, C]``. Sums are of
    distances from ``origin`` ``[C]``, which leaves more digits where all values are far from zero."""
    patch = tl.program_id(0)
    channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    start = tl.load(origin + channel, mask=channel < channels, other=0.0)
    sums, number = tl.zeros((OUTS,), dtype=tl.float32), 0
    for first in range(0, SIDE * SIDE, ROWS):
        pixel, there = cells_of_patch(patch, first, height, width, rows, columns, SIDE, ROWS)
        mask = there[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        distance = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - start[None, :]
        sums += tl.sum(tl.where(mask, distance, 0.0), 0)
        number += tl.sum(there.to(tl.int32), 0)
    mean, squares = sums / number, tl.zeros((OUTS,), dtype=tl.float32)
    for first in range(0, SIDE * SIDE, ROWS):
        pixel, there = cells_of_patch(patch, first, height, width, rows, columns, SIDE, ROWS)
        mask = there[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        distance = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - start[None, :] - mean[None, :]
        squares += tl.sum(tl.where(mask, distance * distance, 0.0), 0)
    at = patch.to(tl.int64) * 2 * channels + channel
    tl.store(out + at, sums, mask=channel < channels)
    tl.store(out + at + channels, squares, mask=channel < channels)


@triton.jit
def affine_sums(
    grad, x, out, out_gate, experts, scale, shift, gate, centre, height, width, channels, rows, columns,
    SIDE: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """Of one patch, by channel, the sum of g, the gradient before the affine map, and of ``g * (x - centre)``:
    ``out`` ``[N, 2, C]``; and the gradient for its gate, by tiles of channels: ``out_gate`` ``[N, tiles]``."""
    patch = tl.program_id(0)
    channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    expert = tl.load(experts + patch)
    table = tl.maximum(expert, 0)
    factor, term = own(scale, table, channel, channels, 1.0), own(shift, table, channel, channels, 0.0)
    middle = own(centre, table, channel, channels, 0.0)
    plain, centred = tl.zeros((OUTS,), dtype=tl.float32), tl.zeros((OUTS,), dtype=tl.float32)
    for_gate = tl.zeros((OUTS,), dtype=tl.float32)
    for first in range(0, tl.where(expert >= 0, SIDE * SIDE, 0), ROWS):
        pixel, there = cells_of_patch(patch, first, height, width, rows, columns, SIDE, ROWS)
        mask = there[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        y = value * factor + term
        if GELU:
            for_gate += tl.sum(g * gelu(y), 0)
            g *= gelu_slope(y)
        else:
            for_gate += tl.sum(g * y, 0)
        plain += tl.sum(g, 0)
        centred += tl.sum(g * (value - middle), 0)
    if gate is not None:
        own_gate = tl.load(gate + patch)
        plain *= own_gate
        centred *= own_gate
    at = patch.to(tl.int64) * 2 * channels + channel
    tl.store(out + at, plain, mask=channel < channels)
    tl.store(out + at + channels, centred, mask=channel < channels)
    tl.store(out_gate + patch * tl.num_programs(1) + tl.program_id(1), tl.sum(for_gate, 0))


@triton.jit
def sum_by_expert(
    values, out, patches, first_blocks, columns, num_experts, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    """Sums over every SPLITS-th stretch of an expert's patches, a block each: ``[N, V]`` to ``[SPLITS, E, V]``."""
    expert, split = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    sums = tl.zeros((OUTS,), dtype=tl.float32)
    last = tl.load(first_blocks + expert + 1)
    for first in range(tl.load(first_blocks + expert) + split * ROWS, last, SPLITS * ROWS):
        slot = first + tl.arange(0, ROWS)
        patch = tl.load(patches + tl.where(slot < last, slot, 0), mask=slot < last, other=-1)
        mask = (patch >= 0)[:, None] & (column < columns)[None, :]
        at = patch.to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.sum(tl.load(values + at, mask=mask, other=0.0), 0)
    tl.store(out + (split * num_experts + expert) * columns + column, sums, mask=column < columns)
