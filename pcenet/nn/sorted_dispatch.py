"""Dispatch without padding: each expert's patches are one batch, and the experts take turns.

An expert gathers its patches' pixels, does all of its work on them and writes its pixels back into the map before the
next one starts, forwards and backwards: its batch stays in the cache, and nothing of the map's size is made but the
map. To that end the pass through all experts is one node of autograd's graph, which holds a small graph per expert.

Axes as in `pcenet.nn.dispatch`; n_e patches of expert e, R rows of a map (see `pcenet.nn.windows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from pcenet.nn.experts import ConvExperts
from pcenet.nn.kernels import Kernel
from pcenet.nn.routing import Routing
from pcenet.nn.windows import append_zeros, make_windows, map_to_rows, real_cells

# Libraries prepare a kernel for every new size of a batch, and routing would make new sizes in every step. Batches are
# therefore padded to multiples of this part of an expert's fair share, 3 % of the work on average.
_SIZES_PER_SHARE = 16


def run_sorted(x: Tensor, routing: Routing, experts: ConvExperts, first: Kernel, second: Kernel) -> Tensor:
    """See `pcenet.nn.dispatch.run_experts`; ``first`` and ``second`` are the experts' convolutions."""
    norm1, norm2 = experts.norm1, experts.norm2

    def activated(hidden: Tensor, share: _Share, weight: Tensor, bias: Tensor) -> Tensor:
        return experts.activate(norm1.forward_expert(hidden, share.expert, weight, bias, share.real))

    def weighted(out: Tensor, share: _Share, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        out = norm2.forward_expert(out, share.expert, weight, bias, share.real)
        return out * gate[:, None, None, None].to(out.dtype)

    def block(
        hidden: Tensor, share: _Share, w1: Tensor, b1: Tensor, kernel: Tensor, w2: Tensor, b2: Tensor, gate: Tensor
    ) -> Tensor:
        hidden = activated(hidden, share, w1, b1)
        return weighted(_ConvolveBatch.apply(hidden, kernel, second, share.padded_count), share, w2, b2, gate)

    turns = _Turns(x, routing, first)
    gate = routing.choice_weight.flatten()[turns.pair_of_slot]
    rows = map_to_rows(x, zeros=turns.padded_map or first.margin > 0)
    if second.margin:
        rows = turns.run(rows, first, activated, [norm1.weight, norm1.bias], keep_zeros=True)
        rows = turns.run(rows, second, weighted, [norm2.weight, norm2.bias], gate)
    else:
        parameters = [norm1.weight, norm1.bias, second.weight, norm2.weight, norm2.bias]
        rows = turns.run(rows, first, block, parameters, gate)
    return rows.view(routing.grid.batch, *turns.size, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Share:
    """One expert's share of the patches.

    Attributes:
        expert: e.
        count: n_e, its patches.
        padded_count: patches in the batch that is convolved.
        writes: ``[n_e * S * S]``, the rows of the map that they are.
        real: ``[n_e, 1, S, S]`` bool, False for cells beyond the map; None where every cell is real.
    """

    expert: int
    count: int
    padded_count: int
    writes: Tensor
    real: Tensor | None


class _Turns:
    """Which patches each expert takes.

    Attributes:
        shares: one for each expert that has any patches.
        pair_of_slot: ``[T]`` int64, the kept pairs of patch and expert, sorted by expert.
        padded_map: whether patches have cells beyond the map.
        complete: whether every patch is taken exactly once.
    """

    def __init__(self, x: Tensor, routing: Routing, kernel: Kernel) -> None:
        patch_size = kernel.side
        self.grid, self.size, self.top_k = routing.grid, (x.shape[2], x.shape[3]), routing.top_k
        load = routing.kept_load
        loads: list[int] = load.tolist()  # the one synchronisation with the host
        # Where an intervention drops everything, an empty batch through one expert keeps shapes and gradients.
        experts = [e for e, count in enumerate(loads) if count] or [0]
        counts = [loads[e] for e in experts]
        total = sum(counts)
        self.pair_of_slot = routing.kept_pairs(total)
        patch_of_slot = self.pair_of_slot // self.top_k
        self.complete = self.top_k == 1 and total == routing.grid.patches
        cells = real_cells(x, patch_size)
        self.padded_map = cells is not None

        step = max(1, total // (len(loads) * _SIZES_PER_SHARE)) if kernel.prepares_sizes else 1
        padded_counts = [-(-count // step) * step for count in counts]
        # Padding repeats an expert's own last patch: whatever that holds, it reaches no other expert.
        padded_load = (load + step - 1) // step * step
        expert = torch.arange(len(loads), device=x.device)
        expert = expert.repeat_interleave(padded_load, output_size=sum(padded_counts))
        rank = torch.arange(len(expert), device=x.device) - (padded_load.cumsum(0) - padded_load)[expert]
        slot = torch.minimum(rank, load[expert] - 1) + (load.cumsum(0) - load)[expert]
        self._padded_patch = patch_of_slot[slot]

        writes = make_windows(self.grid, self.size, patch_size, taps=patch_size, device=x.device).rows(patch_of_slot)
        self.shares = [
            _Share(*fields)
            for fields in zip(
                experts,
                counts,
                padded_counts,
                [own.flatten() for own in writes.split(counts)],
                [None] * len(counts) if cells is None else cells[patch_of_slot].split(counts),
                strict=True,
            )
        ]

    def run(
        self,
        rows: Tensor,
        kernel: Kernel,
        body: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        gate: Tensor | None = None,
        *,
        keep_zeros: bool = False,
    ) -> Tensor:
        """Every expert's convolution of what its patches read of a map, then ``body``, summed into a map.

        Args:
            rows: ``[R, C]``, with a row of zeros where the kernel reads beyond the map.
            kernel: the experts' convolutions.
            body: ``body(convolved [n_e, D, S, S], share, *own parameters, own gate values) -> [n_e, F, S, S]``.
            parameters: ``[E, ...]`` each.
            gate: ``[T]``, a value for each slot.
            keep_zeros: put a row of zeros behind the output's rows, too.

        Returns:
            ``[B*H*W, F]``, or one row more.
        """
        reads = kernel.windows(self.grid, self.size, rows.device).rows(self._padded_patch)
        own_reads = reads.split([share.padded_count for share in self.shares])
        tensors = [rows, kernel.weight, *parameters] + ([] if gate is None else [gate])
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        job = _Job(kernel, self, own_reads, body, gate is not None, keep_zeros, tracked)
        return _TakeTurns.apply(job, *tensors)


@dataclass(frozen=True)
class _Job:
    """What all experts do in one pass, see `_Turns.run`; ``tracked`` says whether there will be a backward pass."""

    kernel: Kernel
    turns: _Turns
    reads: tuple[Tensor, ...]
    body: Callable[..., Tensor]
    gated: bool
    keep_zeros: bool
    tracked: bool

    def parts(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of each tensor every expert's own part: of stacked ones a slice, of the gate values (the last) a stretch."""
        shares = self.turns.shares
        stacked = tensors[:-1] if self.gated else tensors
        parts = [[tensor[share.expert] for tensor in stacked] for share in shares]
        if self.gated:
            for own, stretch in zip(parts, tensors[-1].split([share.count for share in shares]), strict=True):
                own.append(stretch)
        return parts


class _Source:
    """The map that experts read, and its gradient, which they sum in place, each in its turn.

    Attributes:
        rows: ``[R, C]``; None between the passes, so that autograd alone decides how long a map is kept.
        grad: ``[R, C]``; None where it is not needed.
        anchor: makes reading the map part of every expert's graph, whichever of its parameters are frozen.
    """

    def __init__(self, rows: Tensor, adds: bool) -> None:
        self.rows: Tensor | None = rows
        self.grad: Tensor | None = None
        self.anchor = torch.empty(0, requires_grad=True)
        self._adds = adds

    def take(self, index: Tensor) -> Tensor:
        """Windows ``[n, cells, C]`` by ``[n, cells]``."""
        assert self.rows is not None
        return self.rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    def give_back(self, index: Tensor, grad: Tensor) -> None:
        """Add the gradient of what was taken."""
        assert self.grad is not None
        _write(self.grad, index.flatten(), grad.flatten(0, 1), self._adds)


class _Saved:
    """What the experts' graphs keep for their backward passes. The node of all experts saves it, as if it were its own:
    autograd then frees it, and activation checkpointing, which computes a layer again for every backward pass that asks
    for something of it, does so once and not once for every expert.

    Attributes:
        tensors: empty between the passes.
    """

    def __init__(self) -> None:
        self.tensors: Sequence[Tensor] = ()

    def collect(self) -> saved_tensors_hooks:
        """A context in which graphs keep their tensors here."""
        self.tensors = collected = []

        def pack(tensor: Tensor) -> int:
            collected.append(tensor.detach())
            return len(collected) - 1

        return saved_tensors_hooks(pack, lambda index: self.tensors[index])


class _TakeTurns(torch.autograd.Function):
    """The pass of all experts, one after the other."""

    @staticmethod
    def forward(ctx: Any, job: _Job, rows: Tensor, *tensors: Tensor) -> Tensor:
        turns = job.turns
        source = _Source(rows, adds=job.kernel.margin > 0 or turns.top_k > 1)
        needed = ctx.needs_input_grad[2:]
        out, ctx.graphs, saved = rows, [], _Saved()
        pixels = turns.grid.batch * turns.size[0] * turns.size[1]
        collected = saved.collect()
        for share, reads, parts in zip(turns.shares, job.reads, job.parts(tensors), strict=True):
            leaves = [part.detach().requires_grad_(n and job.tracked) for part, n in zip(parts, needed, strict=True)]
            with torch.set_grad_enabled(job.tracked), collected:
                hidden = _ConvolveMap.apply(source.anchor, leaves[0], source, job.kernel, reads, share.count)
                patches = job.body(hidden, share, *leaves[1:])
            if out is rows:
                out = _blank(patches, (pixels + (job.keep_zeros or turns.padded_map), patches.shape[1]), turns.complete)
            _write(out, share.writes, patches.detach().permute(0, 2, 3, 1).flatten(0, 2), turns.top_k > 1)
            if job.tracked:
                ctx.graphs.append((leaves, get_gradient_edge(patches)))
        out[pixels:] = 0
        source.rows = None
        ctx.save_for_backward(rows, *tensors, *saved.tensors)
        saved.tensors = ()
        ctx.job, ctx.source, ctx.saved = job, source, saved
        return out if job.keep_zeros else out[:pixels]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        job, source, saved = ctx.job, ctx.source, ctx.saved
        rows, *kept = ctx.saved_tensors
        inputs = len(ctx.needs_input_grad) - 2
        tensors, saved.tensors = kept[:inputs], kept[inputs:]
        turns, side = job.turns, job.kernel.side
        if turns.padded_map and not job.keep_zeros:
            grad = append_zeros(grad, 1)
        source.rows = rows
        if ctx.needs_input_grad[1]:
            source.grad = _blank(rows, tuple(rows.shape), turns.complete and job.kernel.margin == 0)
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        for share, (leaves, edge), own_sums in zip(turns.shares, ctx.graphs, job.parts(sums), strict=True):
            own_grad = grad.index_select(0, share.writes).view(share.count, side, side, grad.shape[1])
            needed = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
            _, *found = torch.autograd.grad(
                [edge],
                [source.anchor, *(leaves[index] for index in needed)],
                [own_grad.permute(0, 3, 1, 2)],
                retain_graph=True,
                allow_unused=True,
            )
            for index, value in zip(needed, found, strict=True):
                own_sums[index].copy_(value)
        rows_grad, source.rows, source.grad, saved.tensors = source.grad, None, None, ()
        if rows_grad is not None:
            # What was read beyond the map is a constant, and cells beyond it were read here.
            rows_grad[turns.grid.batch * turns.size[0] * turns.size[1] :] = 0
        return None, rows_grad, *(s if n else None for s, n in zip(sums, ctx.needs_input_grad[2:], strict=True))


class _ConvolveMap(torch.autograd.Function):
    """An expert's convolution of the windows that its patches read, ``[n_e, D, S, S]``.

    The windows are gathered again in the backward pass: kept, they would be the largest tensors of a network with small
    patches.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weight: Tensor, source: _Source, kernel: Kernel, reads: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.source, ctx.kernel, ctx.reads = source, kernel, reads
        return kernel.apply(source.take(reads), weight)[:count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,), source, count = ctx.saved_tensors, ctx.source, len(grad)
        windows = source.take(ctx.reads)
        padded = _pad_batch(grad, len(windows))
        for_windows, for_weight = ctx.kernel.gradients(windows, weight, padded, source.grad is not None)
        if source.grad is not None:
            source.give_back(ctx.reads[:count], for_windows[:count])
        return None, for_weight, None, None, None, None


class _ConvolveBatch(torch.autograd.Function):
    """An expert's convolution of its own batch ``[n_e, C, S, S]``."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, weight: Tensor, kernel: Kernel, padded_count: int) -> Tensor:
        windows = _pad_batch(batch, padded_count).permute(0, 2, 3, 1).flatten(1, 2)
        ctx.kernel = kernel
        ctx.save_for_backward(windows, weight)
        return kernel.apply(windows, weight)[: len(batch)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        windows, weight = ctx.saved_tensors
        for_windows, for_weight = ctx.kernel.gradients(windows, weight, _pad_batch(grad, len(windows)), True)
        side = ctx.kernel.side
        return for_windows[: len(grad)].unflatten(1, (side, side)).permute(0, 3, 1, 2), for_weight, None, None


def _pad_batch(batch: Tensor, count: int) -> Tensor:
    """A batch ``[n, C, S, S]``, channels-last, with zeros up to ``count`` patches."""
    return append_zeros(batch.permute(0, 2, 3, 1), count - len(batch)).permute(0, 3, 1, 2)


def _blank(like: Tensor, shape: tuple[int, ...], complete: bool) -> Tensor:
    """Somewhere to write to: without values where all will be written, else zeros."""
    return like.new_empty(shape) if complete else like.new_zeros(shape)


def _write(rows: Tensor, index: Tensor, values: Tensor, adds: bool) -> None:
    if adds:
        rows.index_add_(0, index, values)
    else:
        rows.index_copy_(0, index, values)
