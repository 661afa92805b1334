"""One convolution with E kernels, of which each patch gets its own: a drop-in for `torch.nn.Conv2d`."""

from __future__ import annotations

import math
import threading
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pcenet.nn.checks import check_at_least, is_number
from pcenet.nn.experts import run_choices
from pcenet.nn.patches import check_grid, check_map
from pcenet.nn.routing import Router, Routing
from pcenet.nn.stacked import SharedConv2d, StackedConv2d, kernel_parts
from pcenet.ops import Affine, patch_conv2d

KERNEL_SIZES = (1, 3)
# Where a layer's router differs from `Router`: the layer starts as the convolution that it replaces.
ROUTER_DEFAULTS: dict[str, Any] = {"gate": "straight_through", "capacity_factor": None}


class PCEConv2d(nn.Module):
    """A convolution whose kernel is chosen patch by patch; a drop-in for `torch.nn.Conv2d` of stride 1 that keeps size.

    The map is cut into patches, the router picks a kernel for each, and every pixel is computed by its patch's kernel
    from the true pixels around it, beyond the patch's edge too: ``y = merge(g_i * (w_e * x + b_e))``. There is no seam
    and no shortcut; equal kernels under ``gate="straight_through"`` are an ordinary convolution. `PCELayer` under
    ``border="exchange"`` is two of these with normalisation and activation between.

    A layer either has a router or follows another one. A follower uses the routing that its leader has just made, so
    that the patches of a residual block keep their expert through all of its convolutions; it must run after its
    leader, on a map of the same size. (The leader hands the `Routing` over and the follower takes it, in each thread
    for itself: after a whole forward pass nothing is kept.)

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        kernel_size: 3 or 1.
        stride: 1; this and the next four are there for the sake of `torch.nn.Conv2d`, whose other values are refused.
        padding: what keeps the map's size; None is that.
        dilation: 1.
        groups: 1.
        bias: whether each kernel has a bias.
        padding_mode: ``"zeros"``.
        patch_size: S, patch side in pixels of the map. Any H and W will do.
        num_experts: E.
        router: the layer to follow; None: this layer has a router of its own.
        shared_kernel: kernels are differences from one that they share, see `SharedConv2d`.
        router_options: those of `Router` (``gate``, ``gate_input``, ``balancing``, ``top_k`` ...). Unlike there, the
            gate is ``"straight_through"`` by default, and ``capacity_factor`` is None: there is no shortcut that could
            carry a patch that is dropped, which gets zeros.

    Attributes:
        kernels: the weights, `SharedConv2d` or `StackedConv2d`.
        bias: ``[E, out_channels]`` or None.
        router: the `Router`; None for a follower.

    Raises:
        ValueError: where an argument breaks its rule, or does not go with the leader; for an input that is no map ``[B,
            in_channels, H, W]``, or of another grid than the leader's; if a follower runs without its leader.
        TypeError: for an option that `Router` does not have.
    """

    bias: nn.Parameter | None
    router: Router | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        patch_size: int,
        num_experts: int = 4,
        router: PCEConv2d | None = None,
        shared_kernel: bool = True,
        **router_options: Any,
    ) -> None:
        super().__init__()
        if reason := unfit(kernel_size, stride, padding, dilation, groups, padding_mode):
            raise ValueError(f"{reason}; take nn.Conv2d for such a convolution")
        check_at_least(1, in_channels=in_channels, out_channels=out_channels, patch_size=patch_size)
        check_at_least(1, num_experts=num_experts)
        size = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (size, size)
        self.patch_size = patch_size
        self.num_experts = num_experts
        conv = SharedConv2d if shared_kernel else StackedConv2d
        self.kernels = conv(num_experts, in_channels, out_channels, size)
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        self._reset_bias()
        self._handed: _HandOver | None = None  # shared by a leader and those that follow it
        self._place = 0
        if router is None:
            self.router = Router(in_channels, patch_size, num_experts, **(ROUTER_DEFAULTS | router_options))
        else:
            self.router = None
            self._follow(router, router_options)

    def _follow(self, other: PCEConv2d, router_options: dict[str, Any]) -> None:
        if router_options:
            raise ValueError(
                f"{', '.join(sorted(router_options))}: no effect on a layer that follows another one's router; give it "
                "to that layer"
            )
        if not isinstance(other, PCEConv2d):
            raise ValueError(f"router must be the PCEConv2d to follow, not a {type(other).__name__}")
        for name in ("patch_size", "num_experts"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"{name}={ours} must be the leader's, {theirs}: both use one routing")
        if other.router is None:
            raise ValueError("router must be a layer with a router of its own, not one that follows another")
        if other._handed is None:
            other._handed = _HandOver()
        self._handed, self._place = other._handed, other._handed.followers
        self._handed.followers += 1

    def follows(self, other: PCEConv2d) -> bool:
        """Whether this layer uses the routing of another one."""
        return self.router is None and other.router is not None and self._handed is other._handed

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_channels, H, W]``."""
        return self.forward_with_routing(x)[0]

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        """The output and the `Routing` that led to it."""
        check_map(x, self.in_channels)
        routing: Routing
        if self.router is None:
            routing = self._take_handed()
        else:
            routing = self.router(x)
            if self._handed is not None:
                self._handed.leave(routing)
        return self.forward_given_routing(x, routing), routing

    def _take_handed(self) -> Routing:
        routing = None if self._handed is None else self._handed.take(self._place)
        if routing is None:
            raise ValueError("this layer uses another one's routing, and that one has not run before it in this pass")
        return routing

    def forward_given_routing(self, x: Tensor, routing: Routing) -> Tensor:
        """The output under a given routing.

        Raises:
            ValueError: for a routing of another map's grid.
        """
        check_grid(x, self.patch_size, routing.grid)
        weight, base = kernel_parts(self.kernels)

        def run(x: Tensor, expert: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
            then = Affine(shift=self.bias, gate=gate, residual=residual)
            return patch_conv2d(x, weight, expert, self.patch_size, base=base, then=then)

        return run_choices(run, x, routing)

    def reset_parameters(self) -> None:
        """New weights, and a new router where it is this layer's own."""
        self.kernels.reset_parameters()
        self._reset_bias()
        if self.router is not None:
            self.router.reset_parameters()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] ** 2)  # nn.Conv2d's
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, perturbation: float = 0.0, **options: Any) -> Self:
        """A layer whose experts all start as copies of a convolution; under the default gate it computes the same.

        Args:
            conv: the convolution. It is copied, and stays as it is.
            perturbation: standard deviation of normal noise on each expert's kernel, by that of the kernel's values.
                The experts need none to part: they see different patches.
            options: ``patch_size`` and the others of this class.

        Raises:
            ValueError: for a convolution that no such layer can stand for; says why.
        """
        if reason := why_not(conv):
            raise ValueError(f"{reason}; leave this convolution as it is")
        if not is_number(perturbation) or not 0 <= perturbation < math.inf:
            raise ValueError(f"perturbation={perturbation!r} must be a number, and at least 0")
        layer = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], bias=conv.bias is not None, **options).to(
            conv.weight.device, conv.weight.dtype
        )
        with torch.no_grad():
            spread = conv.weight.std(correction=0) * perturbation
            if isinstance(layer.kernels, SharedConv2d):
                layer.kernels.shared.copy_(conv.weight)
            for expert in range(layer.num_experts):
                noise = torch.randn_like(conv.weight) * spread if perturbation else 0
                layer.kernels.assign(expert, conv.weight + noise)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias.expand_as(layer.bias))
        return layer.train(conv.training)

    @torch.no_grad()
    def to_conv2d(self, expert: int) -> nn.Conv2d:
        """A copy of one expert as an ordinary convolution.

        Raises:
            ValueError: if there is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert={expert} must lie between 0 and {self.num_experts - 1}")
        weight = self.kernels()[expert]
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=self.kernel_size[0] // 2,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        conv.weight.copy_(weight)
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias[expert])
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        role = ", follows another layer's router" if self.router is None else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}, "
            f"patch_size={self.patch_size}, num_experts={self.num_experts}{role}"
        )


class _HandOver:
    """Where a leader leaves its routing, in each thread anew, for layers that each take it once.

    Attributes:
        followers: how many.
    """

    def __init__(self, followers: int = 0) -> None:
        self.followers = followers
        self._local = threading.local()

    def leave(self, routing: Routing) -> None:
        """For every follower; what was not taken before is forgotten."""
        self._local.routings = dict.fromkeys(range(self.followers), routing)

    def take(self, place: int) -> Routing | None:
        """What was left for one of them; None where that was nothing."""
        routings: dict[int, Routing] = getattr(self._local, "routings", {})
        return routings.pop(place, None)

    def __reduce__(self) -> tuple[type[_HandOver], tuple[int]]:
        """What a copy or a pickle takes: not a routing that nobody has taken, which has a graph."""
        return _HandOver, (self.followers,)


def unfit(kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: Any) -> str | None:
    """What of a convolution's arguments `PCEConv2d` cannot do, with its value and the rule; None where it can.

    They are those of `torch.nn.Conv2d`; ``padding`` may be None.
    """

    def is_twice(value: Any, number: int) -> bool:
        return value == number or (isinstance(value, tuple | list) and tuple(value) == (number, number))

    size = next((size for size in KERNEL_SIZES if is_twice(kernel_size, size)), None)
    if size is None:
        return f"kernel_size={kernel_size} is neither 3 nor 1"
    if not is_twice(stride, 1):
        return f"stride={stride} is not 1"
    if not is_twice(dilation, 1):
        return f"dilation={dilation} is not 1"
    if groups != 1:
        return f"groups={groups} is not 1"
    if padding_mode != "zeros":
        return f"padding_mode={padding_mode!r} is not 'zeros'"
    keeps_size = padding is None or padding == "same" or (padding == "valid" and size == 1)
    if not keeps_size and not is_twice(padding, size // 2):
        return f"padding={padding} does not keep the map's size"
    return None


def why_not(conv: nn.Module) -> str | None:
    """Why no `PCEConv2d` can stand for a module; None where one can.

    A subclass of `torch.nn.Conv2d` may compute something else, and so does one whose weight is computed (weight
    normalisation, pruning) or that has hooks.
    """
    if is_parametrized(conv):
        return "its weight is parametrised"
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, not a plain Conv2d"
    if not isinstance(conv._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    hooks = (conv._forward_pre_hooks, conv._forward_hooks, conv._backward_pre_hooks, conv._backward_hooks)
    if any(hooks):
        return "it has hooks"
    return unfit(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)


def leaders_of(model: nn.Module) -> dict[PCEConv2d, PCEConv2d]:
    """The layers of a network that follow another one of it, and that one."""
    layers = [module for module in model.modules() if isinstance(module, PCEConv2d)]
    return {layer: leader for leader in layers for layer in layers if layer.follows(leader)}
