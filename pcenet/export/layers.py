"""PCE layers in a network that no longer learns; see `pcenet.export.evaluation`."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.export.convolving import TileConv, Tiles, tile_of
from pcenet.export.routing import Choice, FixedRouter
from pcenet.nn import PCEConv2d, PCELayer
from pcenet.nn.experts import StackedBatchNorm, check_stored


class FixedLayer(nn.Module):
    """A `PCELayer` for evaluation, or the residual block around one.

    Args:
        layer: the layer that it computes the same as.
        name: of the layer in its network.
        patches: that one of its experts serves on average; inf where that is open.
        residual: whether the input is added, as by a residual block; a layer with a shortcut adds its own.

    Attributes:
        router: its `FixedRouter`.
    """

    def __init__(self, layer: PCELayer, name: str, patches: float, residual: bool = False) -> None:
        super().__init__()
        experts = layer.experts
        self.name, self.border, self.patch_size = name, layer.border, layer.extractor.patch_size
        self.tile = tile_of(self.patch_size, 3, patches)
        self.router = FixedRouter(layer.router)
        self.conv1 = _folded(experts.conv1(), experts.norm1, self.tile)
        self.conv2 = _folded(experts.conv2(), experts.norm2, self.tile)
        self.residual = residual or isinstance(layer.shortcut, nn.Identity)
        self.shortcut = None if isinstance(layer.shortcut, nn.Identity) else layer.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C_out, H, W]``."""
        pixels = x.permute(0, 2, 3, 1)
        choice: Choice = self.router(pixels)
        tiles = Tiles(choice, (x.shape[2], x.shape[3]), self.patch_size, self.tile, 3)
        reads = tiles.reads(own=self.border == "zero")
        hidden = F.gelu(self.conv1(tiles.rows_of_map(pixels), reads, tiles))
        if self.border == "halo":
            reads = tiles.reads(own=True)
        out = tiles.to_map(self.conv2(hidden, tiles.reads_of_output(reads), tiles))
        if self.residual:
            out = pixels + out
        out = out.permute(0, 3, 1, 2)
        return out if self.shortcut is None else self.shortcut(x) + out


class FixedConv2d(nn.Module):
    """A `PCEConv2d` for evaluation.

    Args:
        layer: the layer that it computes the same as.
        name: of the layer in its network.
        patches: that one of its experts serves on average; inf where that is open.
        leader: of which layer it uses the routing; None: of its own router.

    Attributes:
        router: its `FixedRouter`; None for a follower.
    """

    def __init__(self, layer: PCEConv2d, name: str, patches: float, leader: FixedConv2d | None) -> None:
        super().__init__()
        self.name, self.patch_size, self.kernel_size = name, layer.patch_size, layer.kernel_size[0]
        weight = layer.kernels().detach()
        bias = weight.new_zeros(weight.shape[:2]) if layer.bias is None else layer.bias
        self.conv = TileConv(weight, bias, tile_of(self.patch_size, self.kernel_size, patches))
        self.router = None if layer.router is None else FixedRouter(layer.router)
        self._handed: _Handed = _Handed() if leader is None else leader._handed

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C_out, H, W]``."""
        pixels = x.permute(0, 2, 3, 1)
        if self.router is not None:
            self._handed.choice = self.router(pixels)
        choice = self._handed.choice
        assert choice is not None
        tiles = Tiles(choice, (x.shape[2], x.shape[3]), self.patch_size, self.conv.tile, self.kernel_size)
        out = self.conv(tiles.rows_of_map(pixels), tiles.reads(own=False), tiles)
        return tiles.to_map(out).permute(0, 3, 1, 2)


def routed_layers(form: nn.Module) -> Iterator[tuple[str, FixedRouter]]:
    """The routers of a network in evaluation form, each under its layer's name in the network that it was made from."""
    for module in form.modules():
        if isinstance(module, FixedLayer | FixedConv2d) and module.router is not None:
            yield module.name, module.router


class _Handed:
    """Where a leader leaves its routing for those that follow it."""

    choice: Choice | None = None


def _folded(weight: Tensor, norm: StackedBatchNorm, tile: int) -> TileConv:
    """Convolutions ``[E, D, C, 3, 3]`` with the normalisation that follows, by its running statistics."""
    weight = weight.detach()
    check_stored(norm, "weight")
    check_stored(norm, "bias")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("batch normalisations without running statistics have no evaluation form: renew them first")
    scale = (norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()).detach()
    bias = norm.bias.detach().double() - norm.running_mean.double() * scale
    return TileConv((weight.double() * scale[:, :, None, None, None]).to(weight.dtype), bias.to(weight.dtype), tile)
