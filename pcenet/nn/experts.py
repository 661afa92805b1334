"""E double-convolution blocks with their weights stacked on a leading axis.

Stacking gives every parameter a gradient in every step, zeros for an idle expert, so that distributed training never
waits for one. Axes: E experts, B images, C channels, H x W the map, N patches, k experts per patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, check_follows, is_number, is_plain
from pcenet.nn.processes import sum_over_processes
from pcenet.nn.routing import Routing
from pcenet.ops import Affine, ConvNorm, Normed, affine_of, expert_block, expert_norm, patch_affine, patch_conv2d

Border = Literal["zero", "halo", "exchange"]
NORM_EPS = 1e-5
NORM_MOMENTUM = 0.1


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


def kernel_parts(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The experts' kernels ``[E, ...]``, and what is added to each, which an operator does with those in use alone."""
    if isinstance(conv, SharedConv2d) and is_plain(conv, SharedConv2d) and "shared" in conv._parameters:
        return conv.difference, conv.shared
    kernels: Tensor = conv()
    return kernels, None


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


class StackedBatchNorm(nn.BatchNorm2d):
    """E batch normalisations with parameters and statistics ``[E, C]``, and what follows them: activation, gate, sum.

    To whatever freezes, resets, renews or averages batch normalisations it is one: ``training``,
    ``track_running_stats``, ``momentum`` (None, the cumulative mean, too) and ``eps`` mean what they mean in
    `torch.nn.BatchNorm2d`, expert by expert; ``num_batches_tracked`` is ``[E]``, the batches in which an expert had
    patches. Batch statistics are those of the expert's own patches. An expert with fewer than 2 values per channel uses
    its running statistics and leaves them; where it has none, mean 0 and variance 1.

    Attributes:
        synchronised: whether batch statistics are those of the expert's patches in all processes that train together;
            see `pcenet.nn.synchronise`.
    """

    def __init__(self, num_experts: int, channels: int) -> None:
        super().__init__(channels, NORM_EPS, NORM_MOMENTUM)
        self.synchronised = False
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        self.running_mean = torch.zeros(num_experts, channels)
        self.running_var = torch.ones(num_experts, channels)
        self.num_batches_tracked = torch.zeros(num_experts, dtype=torch.int64)

    @property
    def uses_batch(self) -> bool:
        """Whether it normalises by the statistics of the batch."""
        return self.training or self.running_mean is None

    @property
    def by_running(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, bias, mean and variance ``[E, C]`` of a normalisation by running statistics."""
        return self.weight, self.bias, *self._running()

    def forward(  # type: ignore[override] # torch's knows no experts
        self,
        x: Tensor,
        expert: Tensor,
        patch_size: int,
        gelu: bool = False,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalise a map ``[B, C, H, W]``, each patch by its expert's parameters and statistics.

        Args:
            x: the map.
            expert: ``[N]`` int64, whose each patch is, -1 for nobody's.
            patch_size: S.
            gelu: whether an activation follows, as in `pcenet.ops.Affine`; so are the next two.
            gate: ``[N]``.
            residual: ``[B, C, H, W]``.
        """
        if not self.uses_batch:
            affine = Affine(*affine_of(*self.by_running, self.eps), gelu, gate, residual)
            return patch_affine(x, expert, patch_size, affine)
        places, total = (expert, patch_size), sum_over_processes if self.synchronised else None
        then: dict[str, Any] = {"gelu": gelu, "gate": gate, "residual": residual, "total": total}
        normed = expert_norm(x, self.weight, self.bias, *places, self._running(), self.eps, **then)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._follow(normed)
        return normed.out

    def _running(self) -> tuple[Tensor, Tensor]:
        if self.running_mean is None or self.running_var is None:
            return torch.zeros_like(self.weight), torch.ones_like(self.weight)
        return self.running_mean, self.running_var

    @torch.no_grad()
    def _follow(self, normed: Normed) -> None:
        """Move running statistics towards those of a batch, where it has 2 values of an expert or more."""
        assert self.running_mean is not None
        assert self.running_var is not None
        way_out = (
            "call eval() on the batch normalisations, or torch.func.replace_all_batch_norm_modules_ on the network"
        )
        check_follows(self.running_mean, normed.mean, "running statistics", way_out)
        enough, count = (normed.number >= 2)[:, None], normed.number[:, None]
        factor: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            batches = self.num_batches_tracked.add_(enough[:, 0])
            if self.momentum is None:
                factor = batches.clamp(min=1).to(self.running_mean.dtype).reciprocal()[:, None]
        unbiased = normed.variance * (count / (count - 1).clamp(min=1))
        for running, batch in ((self.running_mean, normed.mean), (self.running_var, unbiased)):
            running.copy_(torch.where(enough, running.lerp(batch.to(running.dtype), factor), running))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        # As torch's own, which would fill in a count of one expert: files of before it was counted have none.
        counted, mean = f"{prefix}num_batches_tracked", state_dict.get(f"{prefix}running_mean")
        old = local_metadata.get("version") in (None, 1)
        if old and mean is not None and counted not in state_dict and self.num_batches_tracked is not None:
            state_dict[counted] = torch.zeros_like(self.num_batches_tracked, device=mean.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return f"num_experts={len(self.weight)}, channels={self.weight.shape[1]}, eps={self.eps}"


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
        norms = all(is_plain(norm, StackedBatchNorm) and not norm.uses_batch for norm in (self.norm1, self.norm2))
        return norms and is_plain(self.drop, nn.Dropout) and not (self.drop.training and self.drop.p)

    @property
    def dropout(self) -> float:
        """Probability of dropping an activation."""
        return self.drop.p

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
        if old is None or any(isinstance(part, _StackedConv | StackedBatchNorm) for part in new.modules()):
            return new
        if isinstance(old, StackedBatchNorm) and isinstance(new, nn.SyncBatchNorm):
            if new.process_group is not None and new.process_group is not torch.distributed.group.WORLD:
                raise ValueError(
                    f"process_group: the statistics of {name}, of {self.num_experts} experts, are synchronised by all "
                    "processes or none; leave it out"
                )
            old.synchronised = True
            return old
        if isinstance(old, _StackedConv | StackedBatchNorm):
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
        block = double_conv(in_channels, second.shape[1], hidden_channels=hidden_channels, dropout=self.dropout)
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
