"""Sending patches elsewhere than the router would: the proof that its choice matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.nn import PCELayer, Routing, expert_load

Redirect = Callable[[str, Routing], Tensor]
"""Layer name and its Routing to the experts ``[N, k]`` that serve the patches instead."""


@contextmanager
def redirect(model: nn.Module, choose: Redirect) -> Iterator[None]:
    """Within it every PCE layer of the network serves its patches with other experts.

    The factors of the outputs stay those of the router's own choices: what changes is the expert alone, not how loudly
    it speaks. Nothing is dropped anew: a choice that was dropped stays dropped. A recorder entered inside sees the new
    routing.

    Args:
        model: the network.
        choose: for each layer and forward pass the experts, ``[N, k]`` int64.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, PCELayer):

                def change(_module: nn.Module, _args: Any, routing: Routing, name: str = name) -> Routing:
                    choice = choose(name, routing)
                    return replace(routing, choice=choice, load=expert_load(choice, routing.num_experts))

                stack.callback(module.router.register_forward_hook(change).remove)
        yield


def random_expert(seed: int = 0) -> Redirect:
    """Every choice becomes an expert drawn evenly from all E, the router's own among them.

    For k > 1 the k experts of a patch are drawn independently and may repeat.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(_name: str, routing: Routing) -> Tensor:
        shape = routing.choice.shape
        return torch.randint(routing.num_experts, shape, generator=generator).to(routing.choice.device)

    return choose
