"""Which expert serves which patch: the record, the selection rules and the router.

Axes: N patches in the batch, E experts, k experts per patch (choices).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pcenet.nn.balancing import balancing_bias
from pcenet.nn.checks import check_at_least, check_choice, check_follows, is_number, is_plain, is_whole
from pcenet.nn.patches import Grid, grid_of
from pcenet.nn.perceptron import GateInput, HiddenLayer, LogitsLayer
from pcenet.nn.processes import gather_rows, process_count, sum_over_processes
from pcenet.ops import centred, library, patch_logits
from pcenet.ops.compiled import observed, tracked, without_autocast

Gate = Literal["prob", "affinity", "straight_through"]
Balancing = Literal["batch", "none"]
BIAS_MOMENTUM = 0.1  # BatchNorm's
LARGEST_FACTOR = 2**32  # of a capacity, which is still an integer of 64 bits then


@dataclass(frozen=True, eq=False)
class Routing:
    """Who goes where: the one currency between router, experts, losses, statistics and pictures.

    Patches are numbered row by row within an image, image by image. No shape depends on the data.

    Attributes:
        logits: ``[N, E]``, float32 or float64; what was routed by, a balancing bias included.
        probs: ``[N, E]``, their softmax, at the router's temperature.
        expert_ids: ``[N, k]`` int64, the chosen experts, best first.
        gates: ``[N, k]``, the factor of each chosen expert's output (differentiable).
        dispatch_mask: ``[N, k]`` bool, False where the choice was dropped for lack of capacity.
        capacity: the most choices that an expert serves, or None where nothing is dropped.
        grid: how the N patches lie, (images, rows, columns).
    """

    logits: Tensor
    probs: Tensor
    expert_ids: Tensor
    gates: Tensor
    dispatch_mask: Tensor
    capacity: int | None
    grid: Grid

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        """k."""
        return self.expert_ids.shape[1]

    @property
    def expert_counts(self) -> Tensor:
        """``[E]`` int64, choices per expert before dropping."""
        return expert_counts(self.expert_ids, self.num_experts)

    @property
    def dispatched_counts(self) -> Tensor:
        """``[E]`` int64, choices per expert after dropping."""
        return expert_counts(self.expert_ids, self.num_experts, self.dispatch_mask)

    @property
    def by_choice(self) -> tuple[Tensor, Tensor]:
        """The expert of each choice, int64 and -1 where dropped, and the factor of its output, ``[k * N]`` each. The
        best choices of all patches come first, then the second ones."""
        expert, gates = torch.where(self.dispatch_mask, self.expert_ids, -1), self.gates
        if self.top_k == 1:  # for a single image calls count
            return expert.flatten(), gates.flatten()
        return expert.T.flatten(), gates.T.flatten()


def expert_counts(choice: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Choices per expert, ``[E]`` int64, without a transfer to the host.

    Args:
        choice: ``[N, k]`` int64.
        num_experts: E.
        kept: ``[N, k]`` bool; where given, only these choices are counted.
    """
    ones = torch.ones_like(choice) if kept is None else kept.to(choice.dtype)
    return ones.new_zeros(num_experts).scatter_add(0, choice.flatten(), ones.flatten())


def expert_capacity(capacity_factor: float, num_patches: int, num_experts: int, top_k: int = 1) -> int:
    """``ceil(capacity_factor * N * k / E)``: the choices that one expert serves at most."""
    return math.ceil(capacity_factor * num_patches * top_k / num_experts)


def select_within_capacity(choice: Tensor, gate: Tensor, capacity: int) -> Tensor:
    """Which choices are served when an expert takes ``capacity`` of them at most: those of the highest gate values, of
    equal ones the patches that came first.

    Args:
        choice: ``[N, k]`` int64, the chosen experts.
        gate: ``[N, k]``, their gate values.
        capacity: choices per expert.

    Returns:
        ``[N, k]`` bool.
    """
    flat = choice.flatten()
    # Loads that are evened out are nearly always within it, and counting takes a tenth of the time of sorting.
    counted = choice.device.type == "cpu" and type(choice) is Tensor and not observed()
    if counted and int(torch.bincount(flat, minlength=1).max()) <= capacity:
        return torch.ones_like(choice, dtype=torch.bool)
    by_gate = torch.argsort(gate.detach().flatten(), descending=True, stable=True)
    order = by_gate[torch.argsort(flat[by_gate], stable=True)]
    sorted_choice = flat[order]
    first_of_expert = torch.searchsorted(sorted_choice, sorted_choice)
    rank = torch.arange(flat.numel(), device=flat.device) - first_of_expert
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, order, rank < capacity).view_as(choice)


def gate_weights(chosen_probs: Tensor, gate: Gate) -> Tensor:
    """The factor of each chosen expert's output.

    Args:
        chosen_probs: ``[N, k]``, the probabilities of the chosen experts.
        gate: ``"prob"`` is the probability itself, and so is ``"affinity"``, for which it is taken before the
            balancing bias; ``"straight_through"`` has the value ``p_i / sum_j p_j`` over the chosen (1 for k = 1)
            and the gradient of ``p_i``.
    """
    if gate != "straight_through":
        return chosen_probs
    value = chosen_probs.detach()
    return (chosen_probs - value) + value / value.sum(dim=1, keepdim=True)


def route(
    logits: Tensor,
    grid: Grid,
    *,
    top_k: int = 1,
    capacity_factor: float | None = None,
    gate: Gate = "prob",
    temperature: float = 1.0,
) -> Routing:
    """Top-k routing of patches by their logits, for the router below or one of your own.

    Args:
        logits: ``[N, E]``, at least float32.
        grid: how the patches lie; ``grid.patches`` is N.
        top_k: k, experts per patch.
        capacity_factor: see `expert_capacity`; None drops nothing.
        gate: see `gate_weights`; there is no bias here, so that ``"affinity"`` is ``"prob"``.
        temperature: T of ``probs = softmax(logits / T)``. It changes no choice, only how sure the gate values are, and
            with them who is dropped first where the gate decides.

    Raises:
        ValueError: where an argument breaks its rule, or the logits are not one row per patch in float32 or float64.
    """
    if logits.ndim != 2 or logits.shape[0] != grid.patches:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} must be [N, E] with N = {grid.patches}, the patches of {grid}"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits are {logits.dtype}; routing compares them, so they must be float32 or float64")
    check_selection(logits.shape[1], top_k, gate, temperature, capacity_factor=capacity_factor)
    return _select(logits, logits, grid, top_k, capacity_factor, gate, temperature)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits if temperature == 1 else logits / temperature
    # On the processor torch's softmax over fewer numbers than a register has takes four times as long as across them.
    # What is exported runs elsewhere, and keeps the one operator.
    if logits.shape[1] < 16 and logits.device.type == "cpu" and not library.exporting():
        return logits.T.contiguous().softmax(dim=0).T
    return logits.softmax(dim=1)


def _select(
    logits: Tensor,
    unbiased: Tensor,
    grid: Grid,
    top_k: int,
    capacity_factor: float | None,
    gate: Gate,
    temperature: float,
) -> Routing:
    probs = _softmax(logits, temperature)
    # Chosen by logit: the order is that of the probabilities, without the ties that a saturated softmax makes.
    # For one expert not by topk, which takes two to four times as long.
    choice = logits.argmax(dim=1, keepdim=True) if top_k == 1 else logits.detach().topk(top_k, dim=1).indices
    scores = _softmax(unbiased, temperature) if gate == "affinity" else probs
    chosen_probs, capacity = scores.gather(1, choice), None
    if capacity_factor is None:
        kept = torch.ones_like(choice, dtype=torch.bool)
    else:
        capacity = expert_capacity(capacity_factor, logits.shape[0], logits.shape[1], top_k)
        kept = select_within_capacity(choice, chosen_probs, capacity)
    return Routing(logits, probs, choice, gate_weights(chosen_probs, gate), kept, capacity, grid)


def check_selection(
    num_experts: int,
    top_k: int,
    gate: Gate,
    temperature: float,
    **capacity_factors: float | None,
) -> None:
    """Raise a ValueError that names the first argument of `route` that breaks its rule."""
    check_at_least(1, num_experts=num_experts)
    if not is_whole(top_k) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k!r} must be a whole number between 1 and num_experts={num_experts}")
    check_choice("gate", gate, get_args(Gate))
    # Not by math.isfinite, which torch.compile cannot follow for a number that changes from step to step.
    check_temperature(temperature)
    for name, factor in capacity_factors.items():
        if factor is not None and not (is_number(factor) and 0 < factor <= LARGEST_FACTOR):
            raise ValueError(
                f"{name}={factor!r} must be a positive number up to {LARGEST_FACTOR}, or None to drop nothing"
            )


def check_temperature(temperature: float) -> None:
    """Raise a ``ValueError`` for a temperature that is no positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a positive number")


class Router(nn.Module):
    """Looks at each patch and at where it lies, and picks its experts.

    A two-layer perceptron ``W2 gelu(W1 x + b1) + b2`` on the enriched patch, content and Fourier features of position.
    It runs in float32 at least, autocast off: routing is a comparison of logits, and what bfloat16 rounds away (8 bits
    of mantissa) would send patches to other experts from step to step. (``torch.set_float32_matmul_precision("high")``
    lowers it all the same: that setting is for every matrix product of the process.)

    Args:
        in_channels: C, channels of the map.
        patch_size: S.
        num_experts: E.
        hidden: width of the perceptron; None: a quarter of C, at least 16 and at most 64, which keeps the router near
            1 % of the expert's multiply-adds (and near 5 % of its time: a pixel is little work at a time).
        top_k: k, experts per patch.
        capacity_factor: in training, see `expert_capacity`; None drops nothing.
        eval_capacity_factor: the same at evaluation; the default None makes a prediction independent of its batch.
        gate: see `gate_weights`.
        gate_input: ``"pixels"``: the perceptron's hidden layer is applied to every enriched pixel and averaged over the
            patch's real pixels; ``"flat"``: to the whole enriched patch, flattened; ``"position"``: as ``"pixels"``,
            but a patch's place alone decides, for controls. See `pcenet.nn.perceptron.HiddenLayer`.
        num_bands: K, bands of the position features.
        balancing: ``"batch"`` adds a bias per expert to the logits. In training it is the one that spreads the batch
            evenly (see `balancing_bias`), at evaluation its running mean over the batches of training, as BatchNorm has
            its statistics, so that a prediction does not depend on its batch, or what `update_expert_bias` found for
            the trained weights. No gradient goes through it, nor through the mean of a batch's logits, which it would
            undo. ``"none"`` leaves balance to the loss alone.
        temperature: T of ``probs = softmax(logits / T)``, in training and at evaluation. Gate values and the balance
            loss see these probabilities; the z-loss sees the logits before the division, so that it bounds what the
            perceptron puts out whatever T is.

    Attributes:
        expert_bias: ``[E]``, a buffer: the bias at evaluation, in training its running mean; None without balancing. A
            training step leaves that of a router whose parameters are all frozen.
        centring: a buffer, one number c from 0 to 1, used at evaluation only: c times the mean of an image's logits is
            taken off them before the bias is added. 0 until `pcenet.nn.update_expert_bias` sets it, which says why, and
            in networks that were saved without it; None without balancing.
        synchronised: whether the bias is that of the batches of all processes that train together; see
            `pcenet.nn.synchronise`.
        perturb: in training, a function from logits ``[N, E]`` to the logits that are routed by, such as noise for
            exploration; None, the default, is the identity. Losses and statistics see what it returns. The router has
            no chance of its own: whoever sets this decides where its numbers come from.

    Raises:
        ValueError: where an argument breaks its rule.
    """

    expert_bias: Tensor | None
    centring: Tensor | None

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        num_experts: int,
        *,
        hidden: int | None = None,
        top_k: int = 1,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        gate: Gate = "prob",
        gate_input: GateInput = "pixels",
        num_bands: int = 4,
        balancing: Balancing = "batch",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("gate_input", gate_input, get_args(GateInput))
        check_choice("balancing", balancing, get_args(Balancing))
        check_at_least(1, in_channels=in_channels, patch_size=patch_size)
        check_at_least(0, num_bands=num_bands)
        check_selection(
            num_experts,
            top_k,
            gate,
            temperature,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
        )
        hidden = min(64, max(16, in_channels // 4)) if hidden is None else hidden
        check_at_least(1, hidden=hidden)
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.gate = gate
        self.gate_input = gate_input
        self.num_bands = num_bands
        self.temperature = temperature
        self.synchronised = False
        self.perturb: Callable[[Tensor], Tensor] | None = None
        self.hidden = HiddenLayer(in_channels, hidden, patch_size, num_bands, gate_input)
        self.logits = LogitsLayer(hidden, num_experts)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if balancing == "batch" else None)
        self.register_buffer("centring", torch.zeros(()) if balancing == "batch" else None)

    @property
    def temperature(self) -> float:
        """T of ``probs = softmax(logits / T)``; setting it checks it, so that a forward pass need not."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        check_temperature(temperature)
        self._temperature = temperature

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As any module's; networks that were saved before there was ``centring`` have none, and keep their outputs."""
        if self.centring is not None and prefix + "expert_bias" in state_dict:
            state_dict.setdefault(prefix + "centring", state_dict[prefix + "expert_bias"].new_zeros(()))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """New weights, and no bias."""
        self.hidden.reset_parameters()
        self.logits.reset_parameters()
        for buffer in self.buffers():
            buffer.zero_()

    def compute_logits(self, x: Tensor) -> Tensor:
        """The logits ``[N, E]`` of a map ``[B, C, H, W]``, differentiable, in float32 at least."""
        with without_autocast(x):
            hidden = self.hidden(x.to(torch.promote_types(x.dtype, torch.float32)))
            return self.logits(hidden)

    def forward(self, x: Tensor) -> Routing:
        """Route the patches of a map ``[B, C, H, W]``."""
        grid, hidden, last = grid_of(x, self.patch_size), self.hidden, self.logits
        balance: tuple[Tensor | None, ...] = ()
        if self._is_fixed(x):
            x = x.float()
            first = (hidden.weight.flatten(1), hidden.bias, *hidden.lines(x))
            if self.gate != "affinity":  # which needs the logits without a bias, too
                balance = (self.expert_bias, self.centring)
            logits = patch_logits(hidden.seen(x), first, self.patch_size, last.weight, last.bias, *balance)
        else:
            logits = self.compute_logits(x)
            if self.training and self.perturb is not None:
                logits = self.perturb(logits)
        unbiased = logits
        if self.expert_bias is not None and not balance:
            logits = self._balanced(logits, grid.batch)
        capacity_factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return _select(logits, unbiased, grid, self.top_k, capacity_factor, self.gate, self.temperature)

    def _is_fixed(self, x: Tensor) -> bool:
        """Whether one operator may compute the logits: at evaluation, in float32, with no hook on either layer, and
        nobody's own way to compute them."""
        if self.training or self.gate_input == "flat" or x.dtype == torch.float64:
            return False
        if type(self).compute_logits is not Router.compute_logits or "compute_logits" in self.__dict__:
            return False
        hidden, last = self.hidden, self.logits
        if not (is_plain(hidden, HiddenLayer) and is_plain(last, LogitsLayer)):
            return False
        return hidden.weight.dtype == last.weight.dtype == torch.float32

    def _balanced(self, logits: Tensor, images: int) -> Tensor:
        """Logits with the bias that evens out the loads."""
        assert self.expert_bias is not None
        assert self.centring is not None
        if not self.training:
            return centred(logits, images, self.expert_bias, self.centring)
        bias = balancing_bias(gather_rows(logits) if self.synchronised else logits.detach(), self.top_k)
        mean = logits.mean(dim=0)
        if self.synchronised:
            mean = sum_over_processes(mean) / process_count()
        if self._follows_batch():
            # At evaluation it is added to centred logits, whose mean is lower by what is taken off.
            followed = bias + self.centring.to(bias.dtype) * mean.detach()
            way_out = "call eval() on the network or its routers"
            check_follows(self.expert_bias, followed, "a router's expert_bias", way_out)
            with torch.no_grad():
                self.expert_bias.lerp_(followed.to(self.expert_bias.dtype), BIAS_MOMENTUM)
        # The task raises whatever was chosen. What it raises for all patches alike the bias would lower again, and both
        # would grow for ever: a batch's mean has no gradient.
        return logits - (mean - mean.detach()) + bias

    def _follows_batch(self) -> bool:
        """Whether the running bias moves in training: not that of a frozen router in a step, whose weights stay, too. A
        pass without gradients may renew it, as `torch.optim.swa_utils.update_bn` renews statistics."""
        # By name: within a pass of DataParallel and of FSDP's first version weights are no parameters.
        named = [getattr(layer, name, None) for layer in (self.hidden, self.logits) for name in ("weight", "bias")]
        return not torch.is_grad_enabled() or tracked(*named, *self.parameters())

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return (
            f"patch_size={self.patch_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"gate={self.gate!r}, gate_input={self.gate_input!r}"
        )
