"""The Triton backend: operators on a GPU, registered under the schemas of the compiled library.

Nothing waits for the GPU: how many programs there are follows from shapes, whose patches a program has is looked up on
the device. Results do not depend on which program ends first. Under ``TRITON_INTERPRET=1`` the kernels compute on the
processor, one program after another in numpy, which is how they are tested where there is no GPU.

Maps are float32, bfloat16 or float16, ``[B, H, W, C]``, contiguous; everything else is float32. Axes as in
`pcenet.ops.functional`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.ops import schemas
from pcenet.ops.gpu import kernels

PIXELS = 64  # that one program computes at least, and in one go
WARPS = 4  # with 8, Inductor's convolutions of this kind were miscompiled (pytorch/pytorch#173068)
SAMPLED = 64  # pixels, at least, whose mean tells where the values of a map lie
PROGRAMS = 512  # that keep a large GPU busy: sums with few results are split into as many


class Map(NamedTuple):
    """The sizes of a map of pixels, cut into patches."""

    batch: int
    height: int
    width: int
    channels: int
    rows: int
    columns: int

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.batch * self.height * self.width

    @property
    def patches(self) -> int:
        """Of all images, N."""
        return self.batch * self.rows * self.columns


def map_of(x: Tensor, side: int) -> Map:
    """Sizes of ``[B, H, W, C]``.

    Raises:
        ValueError: where the numbers of pixels, or of cells of patches with a margin, pass 2**31: some are int32.
    """
    batch, height, width, channels = x.shape
    found = Map(batch, height, width, channels, -(-height // side), -(-width // side))
    cells = found.patches * (side + 2) ** 2
    if cells >= 2**31:
        raise ValueError(f"a map of {found.pixels} pixels in {side}x{side} patches is too large: make batches smaller")
    return found


def check_expert(expert: Tensor, grid: Map) -> None:
    """Raise a ``ValueError`` where kernels would read other memory than they should."""
    if expert.dtype != torch.int64 or not expert.is_contiguous() or expert.shape != (grid.patches,):
        raise ValueError(
            f"expert must be a contiguous int64 tensor [{grid.patches}], one number for each patch, not"
            f" {tuple(expert.shape)} of {expert.dtype}"
        )


class Blocks(NamedTuple):
    """Patches sorted by expert, into blocks of slots; nobody's come last.

    Attributes:
        patches: ``[G * slots]`` int32, -1 where a slot is empty.
        experts: ``[G]`` int32, E for nobody.
        first: ``[E + 1]`` int32, where each expert's blocks begin, and nobody's.
        slots: of each block.
    """

    patches: Tensor
    experts: Tensor
    first: Tensor
    slots: int


def blocks_of(expert: Tensor, num_experts: int, slots: int) -> Blocks:
    """Sort patches by their ``expert`` ``[N]``, without looking at it from the processor."""
    count = -(-expert.shape[0] // slots) + num_experts + 1
    number = torch.arange(count * slots, device=expert.device)
    owner, order = torch.where(expert < 0, num_experts, expert).sort(stable=True)
    rank = torch.searchsorted(owner, number[: num_experts + 2])  # where each owner's patches begin, and the next one's
    first = F.pad(((rank.diff() + slots - 1) // slots).cumsum(0), (1, 0))  # and its blocks
    experts = torch.searchsorted(first[1:], number[:count], right=True).clamp(max=num_experts)
    place = number.view(count, slots) + (rank[:-1] - first[:-1] * slots)[experts, None]
    patches = torch.where(place < rank[1:][experts, None], order[place.clamp(max=len(order) - 1)], -1)
    return Blocks(patches.flatten().int(), experts.int(), first[:-1].int(), slots)


def tile(channels: int) -> int:
    """Channels that a program computes: a power of two, as Triton has it, and of at least 16, as products have it."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))


def tiles(channels: int) -> int:
    """How many programs share out the channels."""
    return -(-channels // tile(channels))


def precision() -> str:
    """How numbers in float32 are multiplied: torch's own switch for convolutions says so."""
    switch: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined] # made by a module in its place
    return "tf32" if switch == "tf32" else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel where x is."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, **constants, num_warps=WARPS)


def _convolve(
    x: Tensor, packed: Tensor, expert: Tensor, side: int, neighbours: bool, margin: int, then: tuple[Any, ...]
) -> Tensor:
    """A convolution with weights ``[E, K*K, C, D]``; with a margin, patch by patch, ``[N, (S+2)**2, D]``."""
    scale, shift, gelu, gate, residual = then
    experts, taps, channels, outs = packed.shape
    grid = map_of(x, side)
    check_expert(expert, grid)
    size = side + 2 * margin
    blocks = blocks_of(expert, experts, max(1, PIXELS // size**2))
    shape = (grid.patches, size * size, outs) if margin else (*x.shape[:3], outs)
    out = x.new_empty(shape, dtype=schemas.map_type(x, residual))
    programs = blocks.experts.shape[0] * -(-blocks.slots * size * size // PIXELS)
    pointers = (packed, out, blocks.patches, blocks.experts, scale, shift, gate, residual)
    sizes = (grid.height, grid.width, channels, outs, grid.rows, grid.columns, experts)
    launch(
        kernels.convolve, (programs, tiles(outs)), x, *pointers, *sizes, SIDE=side, KERNEL=3 if taps == 9 else 1,
        NEIGHBOURS=neighbours, MARGIN=margin, GELU=gelu, SLOTS=blocks.slots, PRECISION=precision(), ROWS=PIXELS,
        INS=min(32, tile(channels)), OUTS=tile(outs),
    )  # fmt: skip
    return out


def _packed(weight: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[E, D, C, K, K]`` as ``[E, K*K, C, D]``, in the map's type."""
    whole = (weight if base is None else weight + base).to(dtype)
    return whole.permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()


def patch_conv2d(
    x: Tensor, weight: Tensor, base: Tensor | None, expert: Tensor, side: int, neighbours: bool, *then: Any
) -> Tensor:
    """See `pcenet.ops.patch_conv2d`."""
    return _convolve(x, _packed(weight, base, x.dtype), expert, side, neighbours, 0, then)


def patch_conv2d_input_grad(
    grad: Tensor, weight: Tensor, base: Tensor | None, expert: Tensor, side: int, neighbours: bool
) -> Tensor:
    """The gradient is a convolution too, with the kernel turned round.

    With neighbours a patch's expert also has to do with pixels around it: each patch writes a map of its own, one pixel
    wider on each side, and each pixel adds up what it finds, in one order.
    """
    turned = _packed(weight, base, grad.dtype).flip(1).transpose(2, 3).contiguous()
    margin = 1 if neighbours and weight.shape[-1] == 3 else 0
    alone = _convolve(grad, turned, expert, side, False, margin, (None, None, False, None, None))
    if not margin:
        return alone
    channels, grid = turned.shape[3], map_of(grad, side)
    out = grad.new_empty((*grad.shape[:3], channels))
    sizes = (grid.pixels, grid.height, grid.width, channels, grid.rows, grid.columns)
    launch(kernels.fold, (-(-grid.pixels // PIXELS), tiles(channels)), alone, out, *sizes, SIDE=side, ROWS=PIXELS,
           OUTS=tile(channels))  # fmt: skip
    return out


def splits_of(programs: int, most: int) -> int:
    """Into how many parts each of so many sums is split."""
    return max(1, min(PROGRAMS // max(programs, 1), most))


def patch_conv2d_weight_grad(
    grad: Tensor, x: Tensor, expert: Tensor, side: int, neighbours: bool, experts: int, kernel: int
) -> Tensor:
    """Taps last but one, ``[E, D, K, K, C]``, in float32."""
    channels, outs = x.shape[3], grad.shape[3]
    grid, taps = map_of(x, side), kernel**2
    check_expert(expert, grid)
    blocks = blocks_of(expert, experts, max(1, PIXELS // side**2))
    in_tiles = tiles(channels) * tiles(outs)
    splits = splits_of(experts * taps * in_tiles, blocks.experts.shape[0] // experts)
    out = x.new_empty((splits, experts, outs, kernel, kernel, channels), dtype=torch.float32)
    sizes = (grid.height, grid.width, channels, outs, grid.rows, grid.columns, experts)
    launch(
        kernels.convolve_weight, (experts * taps, in_tiles * splits), grad, x, out, blocks.patches, blocks.first,
        *sizes, SIDE=side, KERNEL=kernel, NEIGHBOURS=neighbours, SLOTS=blocks.slots, SPLITS=splits,
        PRECISION=precision(), ROWS=PIXELS, INS=tile(channels), OUTS=tile(outs),
    )  # fmt: skip
    return out.sum(0)


def _on_map(
    kernel: Any, maps: tuple[Tensor, ...], out: Tensor, expert: Tensor, side: int, gelu: bool, *parts: Any
) -> None:
    """A kernel that computes each pixel by itself."""
    grid = map_of(out, side)
    check_expert(expert, grid)
    sizes = (grid.pixels, grid.height, grid.width, grid.channels, grid.rows, grid.columns)
    programs = (-(-grid.pixels // PIXELS), tiles(grid.channels))
    launch(kernel, programs, *maps, out, expert, *parts, *sizes, SIDE=side, GELU=gelu, ROWS=PIXELS,
           OUTS=tile(grid.channels))  # fmt: skip


def patch_affine(
    x: Tensor, expert: Tensor, side: int, scale: Any, shift: Any, gelu: bool, gate: Any, residual: Any
) -> Tensor:
    """See `pcenet.ops.patch_affine`."""
    out = torch.empty_like(x, dtype=schemas.map_type(x, residual))
    _on_map(kernels.affine, (x,), out, expert, side, gelu, scale, shift, gate, residual)
    return out


def patch_affine_input_grad(
    grad: Tensor, x: Tensor, expert: Tensor, side: int, scale: Any, shift: Any, gelu: bool, *more: Any
) -> Tensor:
    """The gradient for x, and what statistics add to it: ``more`` is gate, slope and offset."""
    out = torch.empty_like(x)
    _on_map(kernels.affine_input_grad, (grad, x), out, expert, side, gelu, scale, shift, *more)
    return out


def _in_patches(
    kernel: Any, maps: tuple[Tensor, ...], outs: tuple[Tensor, ...], side: int, *parts: Any, **constants: Any
) -> None:
    """A kernel with a program, or one for each tile of channels, for every patch."""
    grid = map_of(maps[0], side)
    sizes = (grid.height, grid.width, grid.channels, grid.rows, grid.columns)
    cells = min(PIXELS, max(16, 1 << (side * side - 1).bit_length()))
    programs = (grid.patches, tiles(grid.channels))
    launch(kernel, programs, *maps, *outs, *parts, *sizes, SIDE=side, **constants, ROWS=cells, OUTS=tile(grid.channels))


def _sum_by_expert(values: Tensor, blocks: Blocks, experts: int) -> Tensor:
    """Sums ``[E, ...]`` over each expert's patches of ``[N, ...]`` in float32, in one order."""
    columns = values[0].numel()
    stretches = -(-len(values) // PIXELS)
    splits = splits_of(experts * tiles(columns), -(-stretches // experts))
    out = values.new_empty((splits, experts, *values.shape[1:]))
    launch(kernels.sum_by_expert, (experts, tiles(columns), splits), values, out, blocks.patches, blocks.first, columns,
           experts, SPLITS=splits, ROWS=PIXELS, OUTS=tile(columns))  # fmt: skip
    return out.sum(0)


def expert_moments(x: Tensor, expert: Tensor, side: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `pcenet.ops.expert_moments`. (A pixel that is not finite may make all of them NaN.)

    Each patch has its own mean, from which its pixels' distances are squared; patches are merged by Chan's rule (Chan,
    Golub and LeVeque, 1983), and means are distances from the mean of some pixels, so that a large mean does not
    swallow a small variance.
    """
    grid = map_of(x, side)
    check_expert(expert, grid)
    blocks = blocks_of(expert, experts, 1)
    own = x.new_empty((grid.patches, 2, grid.channels), dtype=torch.float32)
    pixels = x.flatten(0, 2)
    origin = pixels[:: max(1, len(pixels) // SAMPLED)].float().mean(0)
    _in_patches(kernels.patch_moments, (x,), (own,), side, origin)
    # The pixels of each patch, fewer at the edges of a map.
    lines = [
        (size - torch.arange(0, size, side, device=x.device)).clamp(max=side) for size in (grid.height, grid.width)
    ]
    number = torch.outer(*lines).flatten().repeat(grid.batch)[:, None].float()
    sums, squares = own.unbind(1)
    total = _sum_by_expert(torch.cat((number, sums), dim=1), blocks, experts)
    count, mean = total[:, :1], total[:, 1:] / total[:, :1].clamp(min=1)
    away = sums / number - mean.index_select(0, expert.clamp(min=0))
    variance = _sum_by_expert(squares + number * away.square(), blocks, experts) / count.clamp(min=1)
    mean = torch.where(count > 0, mean + origin, 0.0)
    return count[:, 0].clone(), mean, variance


def patch_affine_sums(
    grad: Tensor, x: Tensor, expert: Tensor, side: int, experts: int, scale: Any, shift: Any, gelu: bool, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """By expert ``[E, C]`` the sums of g, the gradient before the affine map, and of ``g * (x - centre)``; by patch the
    gradient for its gate ``[N]``. ``more`` is gate and centre."""
    grid = map_of(x, side)
    check_expert(expert, grid)
    own = x.new_empty((grid.patches, 2, grid.channels), dtype=torch.float32)
    of_gate = x.new_empty((grid.patches, tiles(grid.channels)), dtype=torch.float32)
    _in_patches(kernels.affine_sums, (grad, x), (own, of_gate), side, expert, scale, shift, *more, GELU=gelu)
    plain, centred = _sum_by_expert(own, blocks_of(expert, experts, 1), experts).unbind(1)
    return plain.contiguous(), centred.contiguous(), of_gate.sum(1)


@functools.cache  # torch takes each once per process
def register(device: str) -> None:
    """Have the operators of a kind of device, ``"cuda"`` or, interpreted, ``"cpu"``, run here."""
    for name in schemas.OF_TRITON:
        torch.library.impl(f"pcenet::{name}", device, func=globals()[name])
