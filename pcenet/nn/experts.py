"""E double-convolution blocks with their weights stacked on a leading axis.

Stacking gives every parameter a gradient in every step, zeros for an idle expert, so that distributed training never
waits for one. Axes: E experts, T slots (patches in the order in which experts take them), C channels, S patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, check_choice, is_number
from pcenet.nn.processes import sum_over_processes
from pcenet.nn.transforms import check_follows

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


class _StackedConv(nn.Module):
    """Convolutions whose weights have a leading axis E; whoever runs them calls the module once in a pass for kernels.

    `.to(memory_format=torch.channels_last)` is refused by a tensor of five axes; experts and output channels taken
    together are an ordinary convolution's weight, and every slice gets the format that it would have alone.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply_to_slices(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.ndim < 5 else fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(apply_to_slices, recurse)


class StackedConv2d(_StackedConv):
    """The weights of E convolutions without bias, ``[E, C_out, C_in, 3, 3]``, initialised like `torch.nn.Conv2d`."""

    def __init__(self, num_experts: int, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels, kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights."""
        for expert_weight in self.weight.detach().unbind(0):
            _init_like_conv2d(expert_weight)

    def forward(self) -> Tensor:
        """The experts' kernels ``[E, C_out, C_in, 3, 3]``."""
        return self.weight

    @torch.no_grad()
    def assign(self, expert: int, weight: Tensor) -> None:
        """Give one expert the weight ``[C_out, C_in, 3, 3]``."""
        self.weight[expert].copy_(weight)


class SharedConv2d(_StackedConv):
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
        self.difference = nn.Parameter(torch.empty(num_experts, *self.shared.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new shared kernel, and no differences."""
        _init_like_conv2d(self.shared.detach())
        nn.init.zeros_(self.difference)

    def forward(self) -> Tensor:
        """The experts' kernels ``[E, C_out, C_in, 3, 3]``."""
        return self.shared + self.difference

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


def check_stored(module: nn.Module, name: str) -> None:
    """Raise a ``ValueError`` where a parameter of a module is computed from others, so that what is written to it would
    be lost."""
    if name not in module._parameters:
        raise ValueError(
            f"{name} of a {type(module).__name__} is computed (pruned, parametrised): make it permanent first, by "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
        )


class StackedNorm:
    """What both normalisations of experts, `StackedBatchNorm` and `StackedGroupNorm`, have in common.

    They are called with patches of one expert, which then brings its slices of the parameters, or of all at once.

    Attributes:
        weight: ``[E, C]``.
        bias: ``[E, C]``.
        eps: added to variances.
        kind: the name of the option that makes it.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    eps: float
    kind: ClassVar[Norm]

    def forward(
        self, x: Tensor, expert: Tensor | int, real: Tensor | None, own: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Normalise patches.

        Args:
            x: ``[T, C, S, S]``.
            expert: ``[T]`` int64, the expert of each; or one expert, whose patches these are.
            real: ``[T, 1, S, S]`` bool, False for cells that are padding, which enter no statistics; None, for one
                expert, where every cell is real.
            own: for one expert its slices ``[C]`` of weight and bias, which autograd then sees instead of the whole.
        """
        if not isinstance(expert, int):
            assert real is not None
            return self._normalise_slots(x, expert, real, self.weight, self.bias, slice(None))
        weight, bias = (self.weight[expert], self.bias[expert]) if own is None else own
        if real is None:
            return self._normalise_whole(x, expert, weight, bias)
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self._normalise_slots(x, first, real, weight[None], bias[None], slice(expert, expert + 1))

    def _normalise_whole(self, x: Tensor, expert: int, weight: Tensor, bias: Tensor) -> Tensor:
        """One expert's patches without padding."""
        raise NotImplementedError  # each kind of normalisation has its own

    def _normalise_slots(
        self, x: Tensor, expert: Tensor, real: Tensor, weight: Tensor, bias: Tensor, experts: slice
    ) -> Tensor:
        """Patches of some of the experts, of which ``weight`` and ``bias`` are the parameters and by whose places among
        them ``expert`` counts, without a shape that depends on the routing."""
        # Sums and counts over many cells: a network that is itself in bfloat16 would stop counting at 256.
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        normalised = self._standardised(x.to(dtype), real.to(dtype), expert, weight, experts)
        return (normalised * _per_slot(weight, expert) + _per_slot(bias, expert)).to(x.dtype)

    def _standardised(self, values: Tensor, mask: Tensor, expert: Tensor, weight: Tensor, experts: slice) -> Tensor:
        """To mean 0 and variance 1; ``mask`` is 1 for the cells that are real, else 0."""
        raise NotImplementedError  # likewise

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return f"num_experts={len(self.weight)}, channels={self.weight.shape[1]}, eps={self.eps}"


class StackedBatchNorm(StackedNorm, nn.BatchNorm2d):  # type: ignore[misc] # torch's forward knows no experts
    """E batch normalisations with parameters and statistics ``[E, C]``.

    To whatever freezes, resets, renews or averages batch normalisations it is one: ``training``,
    ``track_running_stats``, ``momentum`` (None, the cumulative mean, too) and ``eps`` mean what they mean in
    `torch.nn.BatchNorm2d`, expert by expert; ``num_batches_tracked`` is ``[E]``, the batches in which an expert had
    patches. Batch statistics are those of the expert's own patches. An expert with fewer than 2 values per channel uses
    its running statistics and leaves them (design, section 2, "Few patches"); where it has none, mean 0 and variance 1.

    Attributes:
        synchronised: whether batch statistics are those of the expert's patches in all processes that train together;
            see `pcenet.nn.synchronise`.
    """

    kind = "batch"

    def __init__(self, num_experts: int, channels: int) -> None:
        nn.BatchNorm2d.__init__(self, channels, NORM_EPS, NORM_MOMENTUM)
        self.synchronised = False
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        self.running_mean = torch.zeros(num_experts, channels)
        self.running_var = torch.ones(num_experts, channels)
        self.num_batches_tracked = torch.zeros(num_experts, dtype=torch.int64)

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    @property
    def _follows_batch(self) -> bool:
        return self.training and self.track_running_stats and self.running_mean is not None

    def _running(self, experts: slice | int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance of some of the experts, of which ``weight`` is the parameter."""
        if self.running_mean is None or self.running_var is None:
            return torch.zeros_like(weight), torch.ones_like(weight)
        return self.running_mean[experts], self.running_var[experts]

    def _normalise_whole(self, x: Tensor, expert: int, weight: Tensor, bias: Tensor) -> Tensor:
        of_batch = self._uses_batch and x.numel() // x.shape[1] >= 2
        if of_batch and not self._follows_batch:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        mean, variance = self._running(expert, weight)
        factor = 0.0 if self.momentum is None else self.momentum
        if of_batch and self.num_batches_tracked is not None:
            count = self.num_batches_tracked[expert].add_(1)
            if self.momentum is None:
                factor = 1 / int(count)
        return F.batch_norm(x, mean, variance, weight, bias, training=of_batch, momentum=factor, eps=self.eps)

    def _standardised(self, values: Tensor, mask: Tensor, expert: Tensor, weight: Tensor, experts: slice) -> Tensor:
        mean, variance = self._running(experts, weight)
        if self._uses_batch:
            count, batch_mean, batch_variance = _batch_moments(values, mask, expert, len(weight), self.synchronised)
            enough = count >= 2
            if self._follows_batch:
                self._follow(mean, variance, experts, count, batch_mean, batch_variance)
            mean = torch.where(enough, batch_mean, mean)
            variance = torch.where(enough, batch_variance, variance)
        scale = torch.rsqrt(variance + self.eps)
        return (values - _per_slot(mean, expert)) * _per_slot(scale, expert)

    @torch.no_grad()
    def _follow(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        experts: slice,
        count: Tensor,
        mean: Tensor,
        variance: Tensor,
    ) -> None:
        """Move running statistics towards those of a batch, where it has 2 values of an expert or more."""
        check_follows(
            running_mean,
            mean,
            "running statistics",
            "call eval() on the batch normalisations, or torch.func.replace_all_batch_norm_modules_ on the network",
        )
        enough = count >= 2
        factor: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            batches = self.num_batches_tracked[experts].add_(enough[:, 0])
            if self.momentum is None:
                factor = batches.clamp(min=1).to(running_mean.dtype).reciprocal()[:, None]
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(torch.where(enough, running.lerp(batch.to(running.dtype), factor), running))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        # As torch's own, which would fill in a count of one expert: files of before it was counted have none.
        counted, mean = f"{prefix}num_batches_tracked", state_dict.get(f"{prefix}running_mean")
        old = local_metadata.get("version") in (None, 1)
        if old and mean is not None and counted not in state_dict and self.num_batches_tracked is not None:
            state_dict[counted] = torch.zeros_like(self.num_batches_tracked, device=mean.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


class StackedGroupNorm(StackedNorm, nn.GroupNorm):  # type: ignore[misc] # torch's forward knows no experts
    """E group normalisations with parameters ``[E, C]``; each patch is normalised by itself."""

    kind = "group"

    def __init__(self, num_experts: int, channels: int) -> None:
        nn.GroupNorm.__init__(self, group_count(channels), channels, NORM_EPS)
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))

    def _normalise_whole(self, x: Tensor, expert: int, weight: Tensor, bias: Tensor) -> Tensor:
        # not F.group_norm, which refuses an expert's single value per group
        return torch.group_norm(x, self.num_groups, weight.to(x.dtype), bias.to(x.dtype), self.eps)

    def _standardised(self, values: Tensor, mask: Tensor, expert: Tensor, weight: Tensor, experts: slice) -> Tensor:
        grouped: Tensor = values.unflatten(1, (self.num_groups, -1))
        cells = mask.unsqueeze(1)
        count = (cells.sum((2, 3, 4), keepdim=True) * grouped.shape[2]).clamp(min=1)
        centred = grouped - (grouped * cells).sum((2, 3, 4), keepdim=True) / count
        variance = (centred.square() * cells).sum((2, 3, 4), keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)


def make_norm(kind: Norm, num_experts: int, channels: int) -> StackedBatchNorm | StackedGroupNorm:
    """The normalisations of E experts."""
    return (StackedBatchNorm if kind == "batch" else StackedGroupNorm)(num_experts, channels)


def takes_turns(experts: ConvExperts) -> bool:
    """Whether experts may run one by one: not where somebody looks at their dropout or has exchanged it, which then
    makes a mask and sees no activations."""
    drop = experts.drop
    plain = type(drop) is nn.Dropout and not drop._forward_hooks and not drop._forward_pre_hooks
    return plain and _takes_turns(experts.norm1) and _takes_turns(experts.norm2)


def _takes_turns(norm: nn.Module) -> bool:
    """Whether a normalisation may be called expert by expert, with slices of parameters that are read before: not one
    that needs all slots at once, whose parameters are computed (pruning, hooks) or that another module wraps."""
    stacked = isinstance(norm, StackedBatchNorm | StackedGroupNorm)
    return stacked and {"weight", "bias"} <= norm._parameters.keys() and not getattr(norm, "synchronised", False)


def _batch_moments(
    values: Tensor, mask: Tensor, expert: Tensor, num_experts: int, synchronised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance ``[E, C]`` of the cells that ``mask`` marks, of all processes where ``synchronised``."""

    def expert_sum(per_slot: Tensor) -> Tensor:
        total = per_slot.new_zeros(num_experts, per_slot.shape[1]).index_add(0, expert, per_slot)
        return sum_over_processes(total) if synchronised else total

    count = expert_sum(mask.sum((2, 3)))
    mean = expert_sum((values * mask).sum((2, 3))) / count.clamp(min=1)
    centred = (values - _per_slot(mean, expert)) * mask
    return count, mean, expert_sum(centred.square().sum((2, 3))) / count.clamp(min=1)


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
        conv = SharedConv2d if shared_kernel else StackedConv2d
        self.conv1 = conv(num_experts, in_channels, hidden_channels)
        self.norm1 = make_norm(norm, num_experts, hidden_channels)
        self.drop = nn.Dropout(dropout)
        self.conv2 = conv(num_experts, hidden_channels, out_channels)
        self.norm2 = make_norm(norm, num_experts, out_channels)

    @property
    def dropout(self) -> float:
        """Probability of dropping an activation."""
        return self.drop.p

    def activate(self, x: Tensor) -> Tensor:
        """What lies between the first normalisation and the second convolution: GELU and dropout."""
        dropped: Tensor = self.drop(F.gelu(x))
        return dropped

    def keep_mask(self, x: Tensor) -> Tensor | None:
        """The factors that dropout multiplies activations like x by, 0 or ``1 / (1 - p)``; None where it does not."""
        return self.drop(torch.ones_like(x)) if self.drop.training and self.drop.p else None

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
        if old is None or any(isinstance(part, _StackedConv | StackedNorm) for part in new.modules()):
            return new
        if isinstance(old, StackedBatchNorm) and isinstance(new, nn.SyncBatchNorm):
            if new.process_group is not None and new.process_group is not torch.distributed.group.WORLD:
                raise ValueError(
                    f"process_group: the statistics of {name}, of {self.num_experts} experts, are synchronised by all "
                    "processes or none; leave it out"
                )
            old.synchronised = True
            return old
        if isinstance(old, _StackedConv | StackedNorm):
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
        block = double_conv(
            in_channels, second.shape[1], hidden_channels=hidden_channels, dropout=self.dropout, norm=self.norm1.kind
        )
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
        self._check_expert(expert)
        ours, theirs = self._tensors_of(expert), block.state_dict()
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
        for conv in (self.conv1, self.conv2):
            check_stored(conv, "difference" if isinstance(conv, SharedConv2d) else "weight")
        for norm in (self.norm1, self.norm2):
            check_stored(norm, "weight")
            check_stored(norm, "bias")
        self.conv1.assign(expert, theirs["0.weight"])
        self.conv2.assign(expert, theirs["4.weight"])
        with torch.no_grad():
            for name, tensor in ours.items():
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
