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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from pcenet.nn.experts import ConvExperts
from pcenet.nn.kernels import Kernel
from pcenet.nn.routing import Routing
from pcenet.nn.windows import append_zeros, make_windows, map_to_rows, real_cells


def run_sorted(x: Tensor, routing: Routing, experts: ConvExperts, first: Kernel, second: Kernel) -> Tensor:
    """See `pcenet.nn.dispatch.run_experts`; ``first`` and ``second`` are the experts' convolutions."""
    norm1, norm2 = experts.norm1, experts.norm2

    def normalised(hidden: Tensor, share: _Share, weight: Tensor, bias: Tensor) -> Tensor:
        normal: Tensor = norm1(hidden, share.expert, share.real, (weight, bias))
        return normal

    def activated(hidden: Tensor, share: _Share, weight: Tensor, bias: Tensor) -> Tensor:
        return experts.activate(normalised(hidden, share, weight, bias))

    def weighted(out: Tensor, share: _Share, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return _times(norm2(out, share.expert, share.real, (weight, bias)), gate)

    def block(
        hidden: Tensor, share: _Share, w1: Tensor, b1: Tensor, kernel: Tensor, w2: Tensor, b2: Tensor, gate: Tensor
    ) -> Tensor:
        hidden = normalised(hidden, share, w1, b1)
        hidden = _ActivateAndConvolve.apply(hidden, kernel, experts.keep_mask(hidden), second)
        return weighted(hidden, share, w2, b2, gate)

    turns = _Turns(x, routing, first.side)
    gate = turns.gate(routing)
    rows = map_to_rows(x)
    if second.margin:
        rows = turns.run(rows, first, activated, [norm1.weight, norm1.bias])
        rows = turns.run(rows, second, weighted, [norm2.weight, norm2.bias], gate)
    else:
        parameters = [norm1.weight, norm1.bias, second.weight, norm2.weight, norm2.bias]
        rows = turns.run(rows, first, block, parameters, gate)
    return turns.as_map(rows)


def convolve_sorted(x: Tensor, routing: Routing, kernel: Kernel, bias: Tensor | None) -> Tensor:
    """See `pcenet.nn.dispatch.run_convolution`; ``kernel`` is the experts' convolution."""

    def weighted(out: Tensor, share: _Share, *own: Tensor) -> Tensor:
        *own_bias, gate = own
        if own_bias:
            out = out + own_bias[0][:, None, None].to(out.dtype)
        return _times(out, gate)

    turns = _Turns(x, routing, kernel.side)
    parameters = [] if bias is None else [bias]
    return turns.as_map(turns.run(map_to_rows(x), kernel, weighted, parameters, turns.gate(routing)))


def _times(out: Tensor, gate: Tensor) -> Tensor:
    """Patches ``[n_e, F, S, S]``, each times its gate value."""
    return out * gate[:, None, None, None].to(out.dtype)


@dataclass(frozen=True)
class _Share:
    """One expert's share of the patches.

    Attributes:
        expert: e.
        count: n_e, its patches.
        writes: ``[n_e, S * S / run_length]``, the runs of the map that they are.
        real: ``[n_e, 1, S, S]`` bool, False for cells beyond the map; None where every cell is real.
    """

    expert: int
    count: int
    writes: Tensor
    real: Tensor | None


class _Turns:
    """Which patches each expert takes.

    Attributes:
        shares: one for each expert that has any patches.
        pair_of_slot: ``[T]`` int64, the kept pairs of patch and expert, sorted by expert.
        padded_map: whether patches have cells beyond the map.
        run_length: pixels of a patch that lie side by side in the map and are moved at once: S, or 1 for a padded map.
        complete: whether every patch is taken exactly once.
    """

    def __init__(self, x: Tensor, routing: Routing, patch_size: int) -> None:
        self.grid, self.size, self.top_k = routing.grid, (x.shape[2], x.shape[3]), routing.top_k
        load = routing.kept_load
        loads: list[int] = load.tolist()  # the one synchronisation with the host
        # Where an intervention drops everything, an empty batch through one expert keeps shapes and gradients.
        experts = [e for e, count in enumerate(loads) if count] or [0]
        counts = [loads[e] for e in experts]
        total = sum(counts)
        self.pair_of_slot = routing.kept_pairs(total)
        self._patch_of_slot = self.pair_of_slot // self.top_k
        self.complete = self.top_k == 1 and total == routing.grid.patches
        cells = real_cells(x, patch_size)
        self.padded_map = cells is not None

        self.run_length = 1 if self.padded_map else patch_size
        windows = make_windows(self.grid, self.size, patch_size, taps=patch_size, device=x.device)
        writes = windows.rows(self._patch_of_slot)[:, :: self.run_length] // self.run_length
        self.shares = [
            _Share(*fields)
            for fields in zip(
                experts,
                counts,
                writes.split(counts),
                [None] * len(counts) if cells is None else cells[self._patch_of_slot].split(counts),
                strict=True,
            )
        ]

    def gate(self, routing: Routing) -> Tensor:
        """``[T]``, the factor of each slot's output."""
        return routing.choice_weight.flatten()[self.pair_of_slot]

    def as_map(self, rows: Tensor) -> Tensor:
        """``[R, F]`` to ``[B, F, H, W]``."""
        return rows.view(self.grid.batch, *self.size, -1).permute(0, 3, 1, 2)

    def run(
        self,
        rows: Tensor,
        kernel: Kernel,
        body: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        gate: Tensor | None = None,
    ) -> Tensor:
        """Every expert's convolution of what its patches read of a map, then ``body``, summed into a map.

        Args:
            rows: ``[R, C]``, one for each pixel.
            kernel: the experts' convolutions.
            body: ``body(convolved [n_e, D, S, S], share, *own parameters, own gate values) -> [n_e, F, S, S]``.
            parameters: ``[E, ...]`` each.
            gate: ``[T]``, a value for each slot.

        Returns:
            ``[R, F]``.
        """
        own_reads = [share.writes for share in self.shares]
        if kernel.margin:
            reads = kernel.windows(self.grid, self.size, rows.device).rows(self._patch_of_slot)
            own_reads = list(reads.split([share.count for share in self.shares]))
        tensors = [rows, kernel.weight, *parameters] + ([] if gate is None else [gate])
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        job = _Job(kernel, self, own_reads, body, gate is not None, tracked)
        return _TakeTurns.apply(job, *tensors)


@dataclass(frozen=True)
class _Job:
    """What all experts do in one pass, see `_Turns.run`; ``tracked`` says whether there will be a backward pass."""

    kernel: Kernel
    turns: _Turns
    reads: list[Tensor]
    body: Callable[..., Tensor]
    gated: bool
    tracked: bool

    def with_zeros(self, rows: Tensor) -> Tensor:
        """Rows of a map as the kernel reads them: with zeros behind, where it reads beyond the map."""
        return append_zeros(rows) if self.kernel.margin or self.turns.padded_map else rows

    def parts(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Of each tensor every expert's own part: of stacked ones a slice, of the gate values (the last) a stretch."""
        shares = self.turns.shares
        stacked = tensors[:-1] if self.gated else tensors
        columns: list[Sequence[Tensor]] = []
        for tensor in stacked:
            slices = tensor.unbind(0)
            columns.append([slices[share.expert] for share in shares])
        if self.gated:
            columns.append(tensors[-1].split([share.count for share in shares]))
        return list(zip(*columns, strict=True))


class _Source:
    """The map that experts read, and its gradient, which they sum in place, each in its turn.

    Attributes:
        rows: ``[R, C]``; None between the passes, so that autograd alone decides how long a map is kept.
        grad: ``[R, C]``; None where it is not needed.
        anchor: makes reading the map part of every expert's graph, whichever of its parameters are frozen.
    """

    def __init__(self, job: _Job) -> None:
        self.rows: Tensor | None = None
        self.grad: Tensor | None = None
        self.anchor = torch.empty(0, requires_grad=True)
        # Windows with a margin overlap, and a patch may be several experts'.
        self._adds = job.kernel.margin > 0 or job.turns.top_k > 1
        self._run_length = 1 if job.kernel.margin else job.turns.run_length

    def take(self, index: Tensor) -> Tensor:
        """Windows ``[n, cells, C]``, by the runs ``[n, cells / run_length]`` that they are."""
        assert self.rows is not None
        return _read(self.rows, index, self._run_length)

    def give_back(self, index: Tensor, grad: Tensor) -> None:
        """Add the gradient of what was taken."""
        assert self.grad is not None
        _write(self.grad, index, grad, self._run_length, self._adds)


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
        source = _Source(job)
        source.rows = job.with_zeros(rows)
        needed = ctx.needs_input_grad[2:]
        out, ctx.graphs, saved = rows, [], _Saved()
        collected = saved.collect()
        for share, reads, parts in zip(turns.shares, job.reads, job.parts(tensors), strict=True):
            leaves = [part.detach() for part in parts]
            if job.tracked:
                for leaf, need in zip(leaves, needed, strict=True):
                    leaf.requires_grad_(need)
                with torch.enable_grad(), collected:
                    hidden = _ConvolveMap.apply(source.anchor, leaves[0], source, job.kernel, reads)
                    # Views: of what modules get, their hooks (those of torch's FlopCounterMode) ask whether a backward
                    # pass will reach it, which autograd does not answer for leaves.
                    patches = job.body(hidden, share, *(leaf.view_as(leaf) for leaf in leaves[1:]))
                ctx.graphs.append((leaves, get_gradient_edge(patches)))
            else:
                hidden = job.kernel.apply(source.take(reads), leaves[0])
                patches = job.body(hidden, share, *leaves[1:])
            if out is rows:
                # Cells beyond the map are written behind its rows.
                out = _blank(patches, (len(rows) + turns.padded_map, patches.shape[1]), turns.complete)
            pixels = patches.detach().permute(0, 2, 3, 1).flatten(1, 2)
            _write(out, share.writes, pixels, turns.run_length, turns.top_k > 1)
        source.rows = None
        ctx.save_for_backward(rows, *tensors, *saved.tensors)
        saved.tensors = ()
        ctx.job, ctx.source, ctx.saved = job, source, saved
        # Cut off, not sliced: a function of one's own may not return a view if what follows works in place.
        return out.resize_(len(rows), out.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = _TakeTurns._gradients(ctx, grad)
        if not torch.is_grad_enabled():
            return found
        # Somebody may want gradients of these.
        return tuple(None if g is None else _Last.apply(g.requires_grad_()) for g in found)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        job, source, saved = ctx.job, ctx.source, ctx.saved
        rows, *kept = ctx.saved_tensors
        inputs = len(ctx.needs_input_grad) - 2
        tensors, saved.tensors = kept[:inputs], kept[inputs:]
        turns, side = job.turns, job.kernel.side
        if turns.padded_map:
            grad = append_zeros(grad)
        source.rows = job.with_zeros(rows)
        if ctx.needs_input_grad[1]:
            source.grad = _blank(rows, tuple(source.rows.shape), turns.complete and job.kernel.margin == 0)
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        for share, (leaves, edge), own_sums in zip(turns.shares, ctx.graphs, job.parts(sums), strict=True):
            own_grad = _read(grad, share.writes, turns.run_length).unflatten(1, (side, side))
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
            rows_grad = rows_grad[: len(rows)]
        return None, rows_grad, *(s if n else None for s, n in zip(sums, ctx.needs_input_grad[2:], strict=True))


class _Last(torch.autograd.Function):
    """The identity for a gradient of which there is none."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("dispatch='sorted' has no gradients of gradients: give the PCE layers dispatch='static'")


class _ConvolveMap(torch.autograd.Function):
    """An expert's convolution of the windows that its patches read, ``[n_e, D, S, S]``.

    The windows are gathered again in the backward pass: kept, they would be the largest tensors of a network with small
    patches.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: Tensor, source: _Source, kernel: Kernel, reads: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.source, ctx.kernel, ctx.reads = source, kernel, reads
        return kernel.apply(source.take(reads), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,), source = ctx.saved_tensors, ctx.source
        needed = source.grad is not None
        for_windows, for_weight = ctx.kernel.gradients(source.take(ctx.reads), weight, grad, needed)
        if needed:
            source.give_back(ctx.reads, for_windows)
        return None, for_weight, None, None, None


class _ActivateAndConvolve(torch.autograd.Function):
    """What lies between an expert's normalisations: GELU, dropout by a mask of factors, and the second convolution of
    its own batch ``[n_e, C, S, S]``. The activation is computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, weight: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(batch, weight, mask)
        return kernel.apply(_activated_windows(batch, mask), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        batch, weight, mask = ctx.saved_tensors
        for_windows, for_weight = ctx.kernel.gradients(_activated_windows(batch, mask), weight, grad, True)
        for_batch = for_windows.unflatten(1, batch.shape[2:]).permute(0, 3, 1, 2)
        if mask is not None:
            for_batch = for_batch * mask
        return torch.ops.aten.gelu_backward(for_batch, batch), for_weight, None, None


def _activated_windows(batch: Tensor, mask: Tensor | None) -> Tensor:
    activated = F.gelu(batch) if mask is None else F.gelu(batch) * mask
    return activated.permute(0, 2, 3, 1).flatten(1, 2)


def _blank(like: Tensor, shape: tuple[int, ...], complete: bool) -> Tensor:
    """Somewhere to write to: without values where all will be written, else zeros."""
    return like.new_empty(shape) if complete else like.new_zeros(shape)


def _read(rows: Tensor, index: Tensor, run_length: int) -> Tensor:
    """``[n, cells, C]`` from ``[R, C]`` by the runs of rows ``[n, cells / run_length]``."""
    runs = rows.reshape(-1, run_length * rows.shape[1]).index_select(0, index.flatten())
    return runs.view(len(index), index.shape[1] * run_length, rows.shape[1])


def _write(rows: Tensor, index: Tensor, values: Tensor, run_length: int, adds: bool) -> None:
    """The converse of `_read`: put ``[n, cells, C]`` there, or add it."""
    runs = rows.view(-1, run_length * rows.shape[1])
    values = values.reshape(-1, runs.shape[1])
    if adds:
        runs.index_add_(0, index.flatten(), values)
    else:
        runs.index_copy_(0, index.flatten(), values)
