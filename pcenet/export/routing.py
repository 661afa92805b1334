"""Routing in a network that no longer learns: which expert serves which patch, in operators that exporters know.

Axes: B images, N patches, k experts per patch, R = N * k pairs of patch and expert, E experts, S patch side, T side of
the tiles into which a convolution cuts patches, q = S / T tiles on each axis of a patch, M = R * q**2 tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn import Grid, Router
from pcenet.nn.experts import check_stored
from pcenet.nn.fourier import fourier_features, position_map
from pcenet.nn.patches import split_map
from pcenet.nn.perceptron import HiddenLayer


@dataclass(frozen=True)
class Choice:
    """Who goes where.

    Attributes:
        expert: ``[N, k]`` int64, best first.
        weight: ``[N, k]``, the factors of the experts' outputs; None where all are 1.
        order: ``[R]`` int64, the pairs (patch * k + choice) sorted by expert.
        owner: ``[R]`` int64, the expert of each pair in that order.
        rank: ``[R]`` int64, the place of each pair in that order.
        loads: ``[E]`` int64, pairs of each expert.
        grid: how the patches lie.
    """

    expert: Tensor
    weight: Tensor | None
    order: Tensor
    owner: Tensor
    rank: Tensor
    loads: Tensor
    grid: Grid

    @property
    def patch(self) -> Tensor:
        """``[R]``: the patch of each pair, in their order."""
        top_k = self.expert.shape[1]
        return self.order if top_k == 1 else self.order // top_k


class FixedRouter(nn.Module):
    """A router for evaluation alone: nothing is dropped, the balancing bias is part of the perceptron's.

    Args:
        router: the router that it computes the same as.

    Attributes:
        bias: ``[E]``, of the logits; whoever raises one expert's sends all patches to it.

    Raises:
        ValueError: for a router that drops patches at evaluation, or whose layers were pruned, parametrised or wrapped.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        if router.eval_capacity_factor is not None:
            raise ValueError(
                f"eval_capacity_factor={router.eval_capacity_factor}: a network in evaluation form drops nothing; load "
                "it with eval_capacity_factor=None"
            )
        for name, kind in (("hidden", HiddenLayer), ("logits", nn.Linear)):
            part = getattr(router, name)
            if not isinstance(part, kind):
                raise ValueError(
                    f"a router's {name} layer is a {type(part).__name__}, whose weights an evaluation form cannot take "
                    f"over: merge it into a {kind.__name__} first"
                )
            check_stored(part, "weight")
            check_stored(part, "bias")
        self.patch_size, self.num_experts, self.top_k = router.patch_size, router.num_experts, router.top_k
        self.gate, self.gate_input, self.num_bands = router.gate, router.gate_input, router.num_bands
        self.temperature = router.temperature
        weight = router.hidden.weight.detach()
        content, position = weight[:, : router.in_channels], weight[:, router.in_channels :]
        assert router.hidden.bias is not None
        # Rows of pixels are multiplied from the left; a flat patch is its pixels one after the other, channels last.
        self.content = _fixed(content.permute(2, 3, 1, 0).flatten(0, 2))
        self.position = _fixed(position)
        self.hidden_bias = _fixed(router.hidden.bias)
        self.weight = _fixed(router.logits.weight)
        bias = router.logits.bias.detach()
        self.centring = 0.0
        if router.expert_bias is not None and router.centring is not None:
            self.centring = float(router.centring)
            bias = bias * (1 - self.centring) + router.expert_bias
        self.bias = _fixed(bias)

    def forward(self, pixels: Tensor) -> Choice:
        """Route the patches of a map with its channels last, ``[B, H, W, C]``."""
        batch, height, width, _ = pixels.shape
        side = self.patch_size
        grid = Grid(batch, -(-height // side), -(-width // side))
        hidden = self._from_pixels(pixels, grid) if self.gate_input == "pixels" else self._from_flat(pixels, grid)
        if self.centring:  # the logits are linear in what is centred here
            of_image = hidden.view(batch, grid.rows * grid.columns, -1)
            hidden = (of_image - self.centring * of_image.mean(1, keepdim=True)).flatten(0, 1)
        return choose(F.linear(hidden, self.weight, self.bias), grid, self.top_k, self.gate, self.temperature)

    def _from_pixels(self, pixels: Tensor, grid: Grid) -> Tensor:
        height, width = pixels.shape[1:3]
        by_axis = self.position[:, :, 0, 0].unflatten(1, (2, 2, 2 * self.num_bands))
        lines = []
        for axis, (cells, size) in enumerate(((grid.rows, height), (grid.columns, width))):
            pixel = torch.arange(size, device=pixels.device)
            places = ((pixel // self.patch_size, cells), (pixel % self.patch_size, self.patch_size))
            centres = torch.stack([(2 * cell.to(pixels.dtype) + 1) / count - 1 for cell, count in places], dim=1)
            features = fourier_features(centres, self.num_bands).flatten(1)
            lines.append(F.linear(features, by_axis[:, :, axis].flatten(1), None if axis else self.hidden_bias))
        hidden = F.gelu(torch.matmul(pixels, self.content) + (lines[0][:, None] + lines[1]))
        return _patch_means(hidden, grid, self.patch_size)

    def _from_flat(self, pixels: Tensor, grid: Grid) -> Tensor:
        hidden = F.linear(_flat_patches(pixels.permute(0, 3, 1, 2), self.patch_size), self.content.T, self.hidden_bias)
        if self.num_bands:
            positions = position_map(
                grid.rows, grid.columns, self.patch_size, self.num_bands, dtype=pixels.dtype, device=pixels.device
            )
            weight = self.position.permute(0, 2, 3, 1).flatten(1)
            position = F.linear(_flat_patches(positions, self.patch_size), weight)
            hidden = (hidden.view(grid.batch, -1, hidden.shape[1]) + position).flatten(0, 1)
        return F.gelu(hidden)


def choose(logits: Tensor, grid: Grid, top_k: int, gate: str, temperature: float) -> Choice:
    """The choice by logits ``[N, E]``, as `pcenet.nn.route` makes it where nothing is dropped."""
    num_experts = logits.shape[1]
    expert = logits.argmax(1, keepdim=True) if top_k == 1 else logits.topk(top_k, dim=1).indices
    weight = None
    if gate == "prob" or top_k > 1:
        probs = (logits if temperature == 1 else logits / temperature).softmax(1)
        weight = probs.amax(1, keepdim=True) if top_k == 1 else probs.gather(1, expert)
        if gate != "prob":
            weight = weight / weight.sum(1, keepdim=True)
    pairs = expert.flatten()
    owner, order = torch.sort(pairs, stable=True)
    rank = order.scatter(0, order, torch.arange(order.shape[0], device=order.device))
    experts = torch.arange(num_experts, device=pairs.device)
    loads = (pairs == experts[:, None]).sum(1)
    return Choice(expert, weight, order, owner, rank, loads, grid)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=False)


def _flat_patches(x: Tensor, side: int) -> Tensor:
    """``[B, C, H, W]`` to ``[N, S * S * C]``."""
    return split_map(x, side)[0].permute(0, 2, 3, 1).flatten(1)


def _patch_means(x: Tensor, grid: Grid, side: int) -> Tensor:
    """``[B, H, W, C]`` to the means over each patch's real pixels, ``[N, C]``."""
    batch, height, width, channels = x.shape
    if side == 1:
        return x.reshape(grid.patches, channels)
    below, right = grid.rows * side - height, grid.columns * side - width
    whole = isinstance(height, int) and isinstance(width, int) and below == 0 and right == 0
    if not whole:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    # Rows first: long stretches of memory are added.
    rows = x.reshape(batch * grid.rows, side, grid.columns * side * channels).sum(1)
    total = rows.reshape(grid.patches, side, channels).sum(1)
    if whole:
        return total / side**2

    def real(patches: int, size: int) -> Tensor:
        return (size - torch.arange(patches, device=x.device) * side).clamp(max=side)

    counts = real(grid.rows, height)[:, None] * real(grid.columns, width)
    return (total.view(batch, -1, channels) / counts.flatten()[:, None]).flatten(0, 1)
