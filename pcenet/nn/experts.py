"""E double-convolution blocks with their weights stacked on a leading axis.

Axes: E experts, B images, C channels, H x W the map, N patches, k experts per patch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, is_number, is_plain
from pcenet.nn.routing import Routing
from pcenet.nn.stacked import (
    NORM_EPS,
    NORM_MOMENTUM,
    SharedConv2d,
    StackedBatchNorm,
    StackedConv,
    StackedConv2d,
    check_stored,
    kernel_parts,
)
from pcenet.ops import ConvNorm, expert_block, patch_conv2d

Border = Literal["zero", "halo", "exchange"]


def double_conv(
    in_channels: int, out_channels: int, *, hidden_channels: int | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """One expert as ordinary modules, and the dense twin of a whole layer: ``Conv3x3 -> BatchNorm -> GELU -> Dropout ->
    Conv3x3 -> BatchNorm`` with padding 1. The arguments are those of `ConvExperts`."""
    hidden_channels = out_channels if hidden_channels is None else hidden_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden_channels, NORM_EPS, NORM_MOMENTUM),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Conv2d(hidden_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, NORM_EPS, NORM_MOMENTUM),
    )


def run_choices(
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    routing: Routing,
    residual: Tensor | None = None,
) -> Tensor:
    """What experts make of a map under a routing, summed over each patch's k choices.

    Args:
        run: ``run(x [k*B, C, H, W], expert [k*N], gate [k*N], residual) -> [k*B, D, H, W]``: each choice has a map of
            its own.
        x: ``[B, C, H, W]``.
        routing: who goes where.
        residual: ``[B, D, H, W]``, added; None: 0.
    """
    expert, gate = routing.by_choice
    if routing.top_k == 1:
        return run(x, expert, gate, residual)
    # Not x.repeat, which would give up channels-last.
    out = run(torch.cat([x] * routing.top_k), expert, gate, None).unflatten(0, (routing.top_k, -1)).sum(0)
    return out if residual is None else residual + out


class ConvExperts(nn.Module):
    """E experts ``Conv3x3 -> BatchNorm -> GELU -> Dropout -> Conv3x3 -> BatchNorm``, no skip inside, no bias.

    Args:
        in_channels: channels of a patch.
        out_channels: channels of the output.
        num_experts: E.
        hidden_channels: channels between the convolutions; None: ``out_channels``.
        dropout: probability of dropping an activation between GELU and the second convolution.
        shared_kernel: each convolution is the sum of a kernel that all experts share and the expert's own difference
            from it, see `SharedConv2d`; False: the experts have nothing in common.

    Raises:
        ValueError: where an argument breaks its rule.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_experts: int,
        *,
        hidden_channels: int | None = None,
        dropout: float = 0.0,
        shared_kernel: bool = False,
    ) -> None:
        super().__init__()
        hidden_channels = out_channels if hidden_channels is None else hidden_channels
        check_at_least(
            1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_experts=num_experts,
            hidden_channels=hidden_channels,
        )
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} must be a number in [0, 1)")
        self.num_experts = num_experts
        conv = SharedConv2d if shared_kernel else StackedConv2d
        self.conv1 = conv(num_experts, in_channels, hidden_channels)
        self.norm1 = StackedBatchNorm(num_experts, hidden_channels)
        self.drop = nn.Dropout(dropout)
        self.conv2 = conv(num_experts, hidden_channels, out_channels)
        self.norm2 = StackedBatchNorm(num_experts, out_channels)

    def forward(
        self,
        x: Tensor,
        expert: Tensor,
        patch_size: int,
        border: Border,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Each patch of a map through its expert: ``residual + gate * f_e(x)``.

        Args:
            x: ``[B, C, H, W]``.
            expert: ``[N]`` int64, whose each patch is, -1 for nobody's, which gets zeros.
            patch_size: S.
            border: what a convolution sees beyond its patch's edge.
            gate: ``[N]``; None: 1.
            residual: ``[B, C_out, H, W]``; None: 0.

        Returns:
            ``[B, C_out, H, W]``, channels-last in memory.
        """
        places = (expert, patch_size)
        (weight1, base1), (weight2, base2) = kernel_parts(self.conv1), kernel_parts(self.conv2)
        first, second = border != "zero", border == "exchange"
        if self._is_affine():  # no statistics, nobody who looks
            block = (
                ConvNorm(weight1, base1, first, self.norm1.by_running, self.norm1.eps),
                ConvNorm(weight2, base2, second, self.norm2.by_running, self.norm2.eps),
            )
            return expert_block(x, expert, patch_size, *block, gate, residual)
        hidden = self.drop(self.norm1(patch_conv2d(x, weight1, *places, first, base=base1), *places, True))
        hidden = patch_conv2d(hidden, weight2, *places, second, base=base2)
        return self.norm2(hidden, *places, False, gate, residual)

    def _is_affine(self) -> bool:
        """Whether all that follows the convolutions is a scale, a shift and GELU."""
        for norm in (self.norm1, self.norm2):
            if not is_plain(norm, StackedBatchNorm) or norm.uses_batch:
                return False
        drop = self.drop
        return is_plain(drop, nn.Dropout) and not (drop.training and drop.p)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch's, by which tools exchange parts, see ``_fitting``."""
        super().add_module(name, module if module is None else self._fitting(name, module))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._fitting(name, value) if isinstance(value, nn.Module) else value)

    def _fitting(self, name: str, new: nn.Module) -> nn.Module:
        """What becomes of a part for which a tool has another one.

        `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, and timm's, put a normalisation of one expert there: the part
        stays, and its statistics are synchronised.
        """
        old = self.__dict__.get("_modules", {}).get(name)
        if old is None or any(isinstance(part, StackedConv | StackedBatchNorm) for part in new.modules()):
            return new
        if isinstance(old, StackedBatchNorm) and isinstance(new, nn.SyncBatchNorm):
            if new.process_group is not None and new.process_group is not torch.distributed.group.WORLD:
                raise ValueError(
                    f"process_group: the statistics of {name}, of {self.num_experts} experts, are synchronised by all "
                    "processes or none; leave it out"
                )
            old.synchronised = True
            return old
        if isinstance(old, StackedConv | StackedBatchNorm):
            raise ValueError(
                f"{name} is a {type(old).__name__} of {self.num_experts} experts, and no {type(new).__name__} can take "
                "its place: put one of its kind there, or a module that wraps it; to freeze it, call eval() and "
                "requires_grad_(False) on it"
            )
        return new

    def to_sequential(self, expert: int) -> nn.Sequential:
        """A copy of one expert as ordinary modules, both convolutions with padding 1 whatever the layer's border is."""
        self._check_expert(expert)
        first, second = self.conv1(), self.conv2()
        _, hidden_channels, in_channels, _, _ = first.shape
        block = double_conv(in_channels, second.shape[1], hidden_channels=hidden_channels)
        block[3] = copy.deepcopy(self.drop)
        block.to(first.device, first.dtype).train(self.training)
        for place, norm in ((1, self.norm1), (5, self.norm2)):
            for setting in ("eps", "momentum"):
                if hasattr(norm, setting):
                    setattr(block[place], setting, getattr(norm, setting))
        with torch.no_grad():
            for name, ours in self._tensors_of(expert).items():
                block.get_submodule(name[0]).state_dict()[name[2:]].copy_(ours)
        return block

    def from_sequential(self, expert: int, block: nn.Sequential) -> None:
        """Take the weights and statistics of a block laid out as `to_sequential` makes it into one expert.

        Raises:
            ValueError: if there is no such expert, or a tensor of the block is missing or has another shape; for
                experts that have been pruned or parametrised.
        """
        own = self.to_sequential(expert)
        own[3] = nn.Identity()  # what stands in the place of dropout is no expert's own
        theirs = {name: tensor for name, tensor in block.state_dict().items() if not name.startswith("3.")}
        try:
            own.load_state_dict(theirs)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"block does not fit expert {expert}; build it like to_sequential({expert}): {why}"
            ) from error
        theirs = own.state_dict()  # whole: of counts of batches, which a block may lack, the expert's own
        for conv in (self.conv1, self.conv2):
            check_stored(conv, "difference" if isinstance(conv, SharedConv2d) else "weight")
        for norm in (self.norm1, self.norm2):
            check_stored(norm, "weight")
            check_stored(norm, "bias")
        self.conv1.assign(expert, theirs["0.weight"])
        self.conv2.assign(expert, theirs["4.weight"])
        with torch.no_grad():
            for name, tensor in self._tensors_of(expert).items():
                tensor.copy_(theirs[name])

    def _tensors_of(self, expert: int) -> dict[str, Tensor]:
        """Its weights, and views of its other tensors, under the names that they have in `to_sequential`."""
        tensors = {"0.weight": self.conv1()[expert].detach().clone(), "4.weight": self.conv2()[expert].detach().clone()}
        for index, norm in (("1", self.norm1), ("5", self.norm2)):
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                stacked = getattr(norm, name, None)
                if stacked is not None:
                    tensors[f"{index}.{name}"] = stacked[expert].detach()
        return tensors

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert={expert} must lie between 0 and {self.num_experts - 1}")
