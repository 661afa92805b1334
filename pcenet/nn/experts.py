"""E double-convolution blocks with their weights stacked on a leading axis.

Stacking gives every parameter a gradient in every step, zeros for an idle expert, so that distributed training never
waits for one. Axes: E experts, T slots (patches in the order in which experts take them), C channels, S patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, check_choice, is_number
from pcenet.nn.processes import sum_over_processes

Norm = Literal["batch", "group"]


NORM_EPS = 1e-5
NORM_MOMENTUM = 0.1


def group_count(channels: int) -> int:
    """Groups of ``norm="group"``: ``gcd(channels, 8)``."""
    return math.gcd(channels, 8)


def double_conv(
    in_channels: int,
    out_channels: int,
    *,
    hidden_channels: int | None = None,
    dropout: float = 0.0,
    norm: Norm = "batch",
) -> nn.Sequential:
    """One expert as ordinary modules, and the dense twin of a whole layer: ``Conv3x3 -> Norm -> GELU -> Dropout ->
    Conv3x3 -> Norm`` with padding 1. The arguments are those of `ConvExperts`, and so are the errors."""
    check_choice("norm", norm, get_args(Norm))
    hidden_channels = out_channels if hidden_channels is None else hidden_channels

    def normalisation(channels: int) -> nn.Module:
        if norm == "batch":
            return nn.BatchNorm2d(channels, NORM_EPS, NORM_MOMENTUM)
        return nn.GroupNorm(group_count(channels), channels, NORM_EPS)

    return nn.Sequential(
        nn.Conv2d(in_channels, hidden_channels, 3, padding=1, bias=False),
        normalisation(hidden_channels),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Conv2d(hidden_channels, out_channels, 3, padding=1, bias=False),
        normalisation(out_channels),
    )


class _Stacked(nn.Module):
    """Holds weights with a leading axis E.

    `.to(memory_format=torch.channels_last)` is refused by a tensor of five axes; experts and output channels taken
    together are an ordinary convolution's weight, and every slice gets the format that it would have alone.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply_to_slices(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.ndim < 5 else fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(apply_to_slices, recurse)


class StackedConv2d(_Stacked):
    """The weights of E convolutions without bias, ``[E, C_out, C_in, 3, 3]``, initialised like `torch.nn.Conv2d`."""

    def __init__(self, num_experts: int, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels, kernel_size, kernel_size))
        for expert_weight in self.weight.detach().unbind(0):
            _init_like_conv2d(expert_weight)

    @torch.no_grad()
    def assign(self, expert: int, weight: Tensor) -> None:
        """Give one expert the weight ``[C_out, C_in, 3, 3]``."""
        self.weight[expert].copy_(weight)


class SharedConv2d(_Stacked):
    """As `StackedConv2d`, but the experts share a kernel: expert e has ``shared + difference[e]``.

    All patches train the shared kernel, whoever serves them: what is common to experts, of which each sees a part of
    the data, is learnt from all of it. Differences start at zero, and weight decay draws them there.

    Attributes:
        shared: ``[C_out, C_in, 3, 3]``, initialised like `torch.nn.Conv2d`.
        difference: ``[E, C_out, C_in, 3, 3]``.
    """

    def __init__(self, num_experts: int, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        _init_like_conv2d(self.shared.detach())
        self.difference = nn.Parameter(torch.zeros(num_experts, *self.shared.shape))

    @property
    def weight(self) -> Tensor:
        """The experts' kernels ``[E, C_out, C_in, 3, 3]``, differentiable; a new tensor, so `assign` changes them."""
        return self.shared + self.difference

    @torch.no_grad()
    def assign(self, expert: int, weight: Tensor) -> None:
        """Give one expert the weight ``[C_out, C_in, 3, 3]``, by its difference from what is shared."""
        self.difference[expert].copy_(weight.to(self.shared) - self.shared)


def _init_like_conv2d(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class StackedNorm(nn.Module):
    """E normalisations, batch or group, with parameters and statistics ``[E, C]``.

    Batch statistics are those of the expert's own patches. An expert with fewer than 2 values per channel uses its
    running statistics and leaves them (design, section 2, "Few patches").

    Attributes:
        synchronised: whether they are those of its patches in all processes that train together, which `forward_slots`
            alone can give; see `pcenet.nn.synchronise`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_experts: int, channels: int, kind: Norm) -> None:
        super().__init__()
        self.kind = kind
        self.groups = group_count(channels)
        self.synchronised = False
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        if kind == "batch":
            self.register_buffer("running_mean", torch.zeros(num_experts, channels))
            self.register_buffer("running_var", torch.ones(num_experts, channels))

    def forward_expert(self, x: Tensor, expert: int, weight: Tensor, bias: Tensor, real: Tensor | None) -> Tensor:
        """Normalise one expert's own batch.

        Args:
            x: ``[n_e, C, S, S]``.
            expert: e.
            weight: ``[C]``, its slice of the parameter.
            bias: ``[C]``, likewise.
            real: ``[n_e, 1, S, S]`` bool, False for cells that are padding; None where every cell is real.
        """
        if real is not None:
            first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            return self._forward_real(x, first, real, weight[None], bias[None], slice(expert, expert + 1))
        if self.kind == "group":
            # not F.group_norm, which refuses an expert's single value per group
            return torch.group_norm(x, self.groups, weight.to(x.dtype), bias.to(x.dtype), NORM_EPS)
        return F.batch_norm(
            x,
            self.running_mean[expert],
            self.running_var[expert],
            weight,
            bias,
            training=self.training and x.numel() // x.shape[1] >= 2,
            momentum=NORM_MOMENTUM,
            eps=NORM_EPS,
        )

    def forward_slots(self, x: Tensor, expert: Tensor, real: Tensor) -> Tensor:
        """Normalise slots of several experts at once, without a shape that depends on the routing.

        Args:
            x: ``[T, C, S, S]``.
            expert: ``[T]`` int64, the expert of each slot.
            real: ``[T, 1, S, S]`` bool, False for cells that are padding; they enter no statistics.
        """
        return self._forward_real(x, expert, real, self.weight, self.bias, slice(None))

    def _forward_real(
        self, x: Tensor, expert: Tensor, real: Tensor, weight: Tensor, bias: Tensor, experts: slice
    ) -> Tensor:
        """`forward_slots` for some of the experts, of which ``weight`` and ``bias`` are the parameters."""
        # Sums and counts over many cells: a network that is itself in bfloat16 would stop counting at 256.
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        values, mask = x.to(dtype), real.to(dtype)
        if self.kind == "group":
            normalised = self._group_normalised(values, mask)
        else:
            mean, variance = self.running_mean[experts], self.running_var[experts]
            if self.training:
                mean, variance = _batch_moments(values, mask, expert, mean, variance, self.synchronised)
            scale = torch.rsqrt(variance + NORM_EPS)
            normalised = (values - _per_slot(mean, expert)) * _per_slot(scale, expert)
        return (normalised * _per_slot(weight, expert) + _per_slot(bias, expert)).to(x.dtype)

    def _group_normalised(self, values: Tensor, mask: Tensor) -> Tensor:
        grouped: Tensor = values.unflatten(1, (self.groups, -1))
        weight = mask.unsqueeze(1)
        count = (weight.sum((2, 3, 4), keepdim=True) * grouped.shape[2]).clamp(min=1)
        centred = grouped - (grouped * weight).sum((2, 3, 4), keepdim=True) / count
        variance = (centred.square() * weight).sum((2, 3, 4), keepdim=True) / count
        return (centred * torch.rsqrt(variance + NORM_EPS)).flatten(1, 2)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module\'s settings."""
        return f"num_experts={len(self.weight)}, channels={self.weight.shape[1]}, kind={self.kind!r}"


def _batch_moments(
    values: Tensor, mask: Tensor, expert: Tensor, running_mean: Tensor, running_var: Tensor, synchronised: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[E, C]`` of the cells that ``mask`` marks, of all processes where ``synchronised``; the
    running ones ``[E, C]`` then follow. For an expert with fewer than 2 values they are the running ones, which stay.
    """

    def expert_sum(per_slot: Tensor) -> Tensor:
        total = per_slot.new_zeros(len(running_mean), per_slot.shape[1]).index_add(0, expert, per_slot)
        return sum_over_processes(total) if synchronised else total

    count = expert_sum(mask.sum((2, 3)))
    mean = expert_sum((values * mask).sum((2, 3))) / count.clamp(min=1)
    centred = (values - _per_slot(mean, expert)) * mask
    variance = expert_sum(centred.square().sum((2, 3))) / count.clamp(min=1)
    enough = count >= 2
    with torch.no_grad():
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(torch.where(enough, running.lerp(batch.to(running.dtype), NORM_MOMENTUM), running))
    return torch.where(enough, mean, running_mean), torch.where(enough, variance, running_var)


def _per_slot(per_expert: Tensor, expert: Tensor) -> Tensor:
    """``[E, C]`` to ``[T, C, 1, 1]``."""
    return per_expert.index_select(0, expert)[:, :, None, None]


class ConvExperts(nn.Module):
    """E experts ``Conv3x3 -> Norm -> GELU -> Dropout -> Conv3x3 -> Norm``, no skip inside, no bias (design, section 1).

    The module holds the weights; ``pcenet.nn.dispatch`` runs each expert on its patches.

    Args:
        in_channels: channels of a patch.
        out_channels: channels of the output.
        num_experts: E.
        hidden_channels: channels between the convolutions; None: ``out_channels``.
        dropout: probability of dropping an activation between GELU and the second convolution.
        norm: ``"batch"`` (own statistics per expert) or ``"group"`` (``gcd(channels, 8)`` groups, per patch).
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
        norm: Norm = "batch",
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
        check_choice("norm", norm, get_args(Norm))
        self.num_experts = num_experts
        self.dropout = dropout
        conv = SharedConv2d if shared_kernel else StackedConv2d
        self.conv1 = conv(num_experts, in_channels, hidden_channels)
        self.norm1 = StackedNorm(num_experts, hidden_channels, norm)
        self.conv2 = conv(num_experts, hidden_channels, out_channels)
        self.norm2 = StackedNorm(num_experts, out_channels, norm)

    def activate(self, x: Tensor) -> Tensor:
        """What lies between the first normalisation and the second convolution: GELU and dropout."""
        return F.dropout(F.gelu(x), self.dropout, self.training)

    def keep_mask(self, x: Tensor) -> Tensor | None:
        """The factors that dropout multiplies activations like x by, 0 or ``1 / (1 - p)``; None where it does not."""
        if not (self.training and self.dropout):
            return None
        return F.dropout(torch.ones_like(x), self.dropout)

    def to_sequential(self, expert: int) -> nn.Sequential:
        """A copy of one expert as ordinary modules, both convolutions with padding 1 whatever the layer's border is."""
        self._check_expert(expert)
        _, hidden_channels, in_channels, _, _ = self.conv1.weight.shape
        out_channels = self.conv2.weight.shape[1]
        block = double_conv(
            in_channels, out_channels, hidden_channels=hidden_channels, dropout=self.dropout, norm=self.norm1.kind
        )
        block.to(self.conv1.weight.device, self.conv1.weight.dtype).train(self.training)
        with torch.no_grad():
            for name, ours in self._tensors_of(expert).items():
                block.get_submodule(name[0]).state_dict()[name[2:]].copy_(ours)
        return block

    def from_sequential(self, expert: int, block: nn.Sequential) -> None:
        """Take the weights and statistics of a block laid out as `to_sequential` makes it into one expert.

        Raises:
            ValueError: if there is no such expert, or a tensor of the block is missing or has another shape.
        """
        self._check_expert(expert)
        ours = self._tensors_of(expert)
        theirs = {name: t for name, t in block.state_dict().items() if not name.endswith("num_batches_tracked")}
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"block does not fit expert {expert}: it has the tensors {sorted(theirs)} where {sorted(ours)} are "
                f"expected; build the block like to_sequential({expert})"
            )
        for name, tensor in ours.items():
            if tensor.shape != theirs[name].shape:
                raise ValueError(
                    f"block does not fit expert {expert}: found a tensor of shape {tuple(theirs[name].shape)} where "
                    f"{tuple(tensor.shape)} is expected; build the block like to_sequential({expert})"
                )
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
        self.conv1.assign(expert, theirs["0.weight"])
        self.conv2.assign(expert, theirs["4.weight"])

    def _tensors_of(self, expert: int) -> dict[str, Tensor]:
        """Its weights, and views of its other tensors, under the names that they have in `to_sequential`."""
        tensors = {"0.weight": self.conv1.weight[expert].detach().clone()}
        tensors["4.weight"] = self.conv2.weight[expert].detach().clone()
        for index, norm in (("1", self.norm1), ("5", self.norm2)):
            tensors |= {f"{index}.{name}": tensor[expert] for name, tensor in norm.state_dict().items()}
        return tensors

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert={expert} must lie between 0 and {self.num_experts - 1}")
