"""Auxiliary losses for training loops that know nothing of them: they ride on the network's own backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from pcenet.nn.checks import is_number
from pcenet.nn.losses import aux_loss
from pcenet.nn.recording import check_not_compiled, routers_of
from pcenet.nn.routing import Router, Routing

Scale = float | Callable[[], float | Tensor]


class AttachedLosses:
    """What `attach_aux_losses` returns: the way to take the losses off again.

    Copies of the network (such as a moving average of its weights) share it: `remove` is for all of them.

    Attributes:
        layers: names of the layers whose router carries a loss; empty for a dense network.
        balance, z: the weights.
        scale: the factor of the gradients, or what gives it in each forward pass.
    """

    def __init__(self, model: nn.Module, balance: float, z: float, scale: Scale) -> None:
        self.balance = balance
        self.z = z
        self.scale = scale
        self.attached = True
        routers = dict(routers_of(model))
        self.layers = tuple(routers)
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(_Carrier(self)) for router in routers.values()
        ]

    def remove(self) -> None:
        """Take the losses off; once more does nothing."""
        self.attached = False
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _Carrier:
    """The hook on a router: its routing's weights, which every layer that uses it multiplies by, carry the loss.

    A routing that several layers use carries it once, and one that activation checkpointing computes again replaces the
    first one's in the backward pass.
    """

    def __init__(self, losses: AttachedLosses) -> None:
        self.losses = losses

    def __call__(self, router: Router, _args: Any, routing: Routing) -> Routing | None:
        losses = self.losses
        if not (losses.attached and router.training and routing.logits.requires_grad):
            return None
        loss = aux_loss({"": [routing]}, losses.balance, losses.z, router.synchronised)
        scale = losses.scale() if callable(losses.scale) else losses.scale
        return replace(routing, gates=_Carry.apply(routing.gates, loss * scale))


class _Carry(Function):
    """The identity in its first argument. In the backward pass the second, a scalar, gets the gradient 1, as if it had
    been added to whatever is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, loss: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, loss: Tensor) -> Tensor:
        return weight.view_as(weight)


def attach_aux_losses(
    model: nn.Module, balance: float = 0.01, z: float = 0.001, *, scale: Scale = 1.0
) -> AttachedLosses:
    """Let a network train with its auxiliary losses in a training loop that does not add them.

    >>> import torch
    >>> from pcenet.nn import PCELayer, attach_aux_losses
    >>> layer = PCELayer(3, 8, patch_size=4)
    >>> attached = attach_aux_losses(layer)
    >>> layer(torch.randn(2, 3, 8, 8)).sum().backward()  # gradients of the sum and of aux_loss
    >>> attached.remove()

    In training mode, where gradients are computed, the backward pass of each PCE layer and convolution adds the
    gradients of `aux_loss` for its routing. Outputs, the loss that the loop prints, and evaluation are unchanged, and a
    loop that does add `aux_loss` itself would count it twice. It works beside `record_routing`, under activation
    checkpointing of both kinds, and for networks compiled or wrapped (``DistributedDataParallel``) afterwards. Loads
    are counted over all processes where `synchronise` was called.

    **What the scale assumes.** The gradients of the auxiliary losses are added as they are, times ``scale``: as if the
    loop called ``backward()`` on the mean loss of the batch. What it multiplies its loss by before that, the layers
    cannot see, so it has to be said:

    - gradient accumulation over n batches, if the loop divides its loss by n (timm's train.py, Lightning, and Hugging
      Face's Trainer do): ``scale=1 / n``;
    - loss scaling in float16: ``scale=scaler.get_scale``, of the `torch.amp.GradScaler`; without it the auxiliary
      gradients would be smaller by that factor, 65536 at first, and so nothing. bfloat16 needs none.

    Where a layer runs several times in a pass, each run counts, while `aux_loss` takes the mean; and a layer on which
    the loss does not depend gets no gradients.

    Args:
        model: any network, changed in place by hooks on its routers. A dense one is left as it is.
        balance: weight of the load balance loss.
        z: weight of the z-loss.
        scale: a factor, or a function that gives it and is asked in each forward pass of each layer.

    Returns:
        An `AttachedLosses`, whose ``remove()`` takes them off.

    Raises:
        ValueError: if losses are attached to the network, or to a part of it, already; for a compiled network, whose
            graph calls no hooks that are added later; for weights or a scale that are no finite numbers of at least 0.
    """
    numbers = {"balance": balance, "z": z} | ({} if callable(scale) else {"scale": scale})
    for name, value in numbers.items():
        if not is_number(value) or not 0 <= value < math.inf:
            way_out = ", or a function that gives one" if name == "scale" else ""
            raise ValueError(f"{name}={value!r} must be a finite number and at least 0{way_out}")
    check_not_compiled(model, "attach the losses before compiling it")
    for name, router in routers_of(model):
        if any(isinstance(hook, _Carrier) and hook.losses.attached for hook in router._forward_hooks.values()):
            raise ValueError(
                f"model has auxiliary losses attached already, at {name or 'the layer itself'}, and would count them "
                "twice: call remove() of what attached them first"
            )
    return AttachedLosses(model, balance, z, scale)
