"""The PCE layer: extract -> route -> experts -> combine -> merge."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, check_choice
from pcenet.nn.experts import Border, ConvExperts, run_choices
from pcenet.nn.patches import PatchExtractor, check_grid, check_map
from pcenet.nn.perceptron import GateInput
from pcenet.nn.routing import Balancing, Gate, Router, Routing


class PCELayer(nn.Module):
    """A double convolution whose weights are chosen patch by patch; a drop-in module for any convolutional network.

    The map is cut into patches; the router picks ``top_k`` of the experts for each, from its content and its position;
    each expert convolves its own patches, at the multiply-adds of one dense block; the outputs are weighted and put
    back in place, and the shortcut is added: ``y = shortcut(x) + merge(g_i * f_e(x_i))``.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        patch_size: S, patch side in pixels of the map. Any H and W will do: the map is padded and cropped.
        num_experts: E.
        hidden_channels: channels inside an expert; None: ``out_channels``.
        top_k: k, experts per patch.
        capacity_factor: in training, an expert serves ``ceil(capacity_factor * N * k / E)`` patches at most, the others
            are dropped, those of the lowest gate values, and carried by the shortcut; None drops nothing.
        eval_capacity_factor: the same at evaluation; None, the default, makes predictions independent of their batch.
        border: what a convolution sees beyond its patch's edge: ``"zero"`` zeros, ``"halo"`` the neighbours' pixels in
            the first convolution, ``"exchange"`` the neighbours in both.
        gate: ``"prob"`` scales an expert's output by its probability, ``"straight_through"`` by 1 (normalised over the
            chosen for k > 1) with the probability's gradient, ``"affinity"`` by its probability as it is before the
            balancing bias, which then decides who is chosen and nothing else.
        gate_input: what the router's perceptron sees: ``"pixels"``, the ``"flat"`` patch, or its ``"position"`` alone;
            see `Router`.
        num_bands: K, bands of the position features (8K channels).
        router_hidden: width of the router's perceptron; None: see `Router`.
        balancing: what keeps the loads even beside the balance loss: ``"batch"``, a bias per expert, or ``"none"``; see
            `Router`.
        dropout: inside the experts.
        shared_kernel: experts are differences from kernels that they share, see `ConvExperts`.
        shortcut: add the input to the output, through a 1x1 convolution where the widths differ.

    Attributes:
        extractor: makes the enriched patches that the router is a perceptron of. A router for ``"flat"`` has one of its
            own; one for ``"pixels"`` computes the same without building them.

    Raises:
        ValueError: where an argument breaks its rule, naming it; for an input that is no ``[B, in_channels, H, W]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        patch_size: int,
        num_experts: int = 4,
        hidden_channels: int | None = None,
        top_k: int = 1,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        border: Border = "halo",
        gate: Gate = "prob",
        gate_input: GateInput = "pixels",
        num_bands: int = 4,
        router_hidden: int | None = None,
        balancing: Balancing = "batch",
        dropout: float = 0.0,
        shared_kernel: bool = True,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        check_choice("border", border, get_args(Border))
        if router_hidden is not None:
            check_at_least(1, router_hidden=router_hidden)
        self.in_channels = in_channels
        self.border: Border = border
        self.experts = ConvExperts(
            in_channels,
            out_channels,
            num_experts,
            hidden_channels=hidden_channels,
            dropout=dropout,
            shared_kernel=shared_kernel,
        )
        self.extractor = PatchExtractor(patch_size, num_bands)
        self.router = Router(
            in_channels,
            patch_size,
            num_experts,
            hidden=router_hidden,
            top_k=top_k,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            gate=gate,
            gate_input=gate_input,
            num_bands=num_bands,
            balancing=balancing,
        )
        self.shortcut: nn.Module | None
        if not shortcut:
            self.shortcut = None
        elif in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_channels, H, W]``, to which ``residual`` of that shape is added."""
        return self.forward_with_routing(x, residual)[0]

    def forward_with_routing(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The output and the `Routing` that led to it."""
        check_map(x, self.in_channels)
        routing = self.router(x)
        return self.forward_given_routing(x, routing, residual), routing

    def forward_given_routing(self, x: Tensor, routing: Routing, residual: Tensor | None = None) -> Tensor:
        """The output under a given routing, for interventions and for comparing implementations.

        Raises:
            ValueError: for a routing of another map's grid.
        """
        patch_size = self.extractor.patch_size
        check_grid(x, patch_size, routing.grid)
        if self.shortcut is not None:
            carried: Tensor = self.shortcut(x)
            residual = carried if residual is None else residual + carried

        def run(x: Tensor, expert: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
            return self.experts(x, expert, patch_size, self.border, gate, residual)

        return run_choices(run, x, routing, residual)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return f"border={self.border!r}"
