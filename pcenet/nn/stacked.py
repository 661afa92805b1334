"""Convolutions and batch normalisations of E experts, their weights stacked on a leading axis.

Stacking gives every parameter a gradient in every step, zeros for an idle expert, so that distributed training never
waits for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from pcenet.nn.checks import check_follows, is_plain
from pcenet.nn.processes import sum_over_processes
from pcenet.ops import Affine, Normed, affine_of, expert_norm, patch_affine

NORM_EPS = 1e-5
NORM_MOMENTUM = 0.1


class StackedConv(nn.Module):
    """Convolutions whose weights have a leading axis E; whoever runs them calls the module once in a pass for kernels.

    `.to(memory_format=torch.channels_last)` is refused by a tensor of five axes; experts and output channels taken
    together are an ordinary convolution's weight, and every slice gets the format that it would have alone.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply_to_slices(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.ndim < 5 else fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(apply_to_slices, recurse)


class StackedConv2d(StackedConv):
    """The weights of E convolutions without bias, ``[E, C_out, C_in, 3, 3]``, initialised like `torch.nn.Conv2d`."""

    def __init__(self, num_experts: int, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels, kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights."""
        for expert_weight in self.weight.detach().unbind(0):
            nn.init.kaiming_uniform_(expert_weight, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """The experts' kernels ``[E, C_out, C_in, 3, 3]``."""
        return self.weight

    @torch.no_grad()
    def assign(self, expert: int, weight: Tensor) -> None:
        """Give one expert the weight ``[C_out, C_in, 3, 3]``."""
        self.weight[expert].copy_(weight)


class SharedConv2d(StackedConv):
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
        nn.init.kaiming_uniform_(self.shared.detach(), a=math.sqrt(5))
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
        mean, variance = self.running_mean, self.running_var
        if mean is None or variance is None:
            return torch.zeros_like(self.weight), torch.ones_like(self.weight)
        return mean, variance

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
