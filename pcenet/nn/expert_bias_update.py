"""The balancing bias of a trained network, found anew for its final weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pcenet.nn.balancing import balancing_bias
from pcenet.nn.checks import is_number
from pcenet.nn.recording import record_routing, routers_of

CENTRING = 0.6  # chosen among 0 to 1 on two data sets, see docs/trials.md


@torch.no_grad()
def update_expert_bias(
    batches: Iterable[Tensor | Sequence[Tensor]], model: nn.Module, *, centring: float = CENTRING
) -> None:
    """Give every router of a trained network the bias that spreads the patches of training images evenly.

    >>> import torch
    >>> from pcenet.nn import PCELayer
    >>> layer = PCELayer(3, 8, patch_size=4)
    >>> update_expert_bias([torch.randn(16, 3, 16, 16)], layer)

    Call it as `torch.optim.swa_utils.update_bn`: after training, after averaging weights, before a network that was
    trained a little is measured. In training each batch is spread by a bias of its own. Its running mean, which a
    network has at evaluation until this is called, lags behind the weights (a short training can leave experts without
    a patch), and belongs to the weights of each step, not to their average.

    **Centring.** What raises the logits of all patches of an image alike (exposure, weather, another camera) moves no
    patch in training, where the batch's bias takes it back, and would move all of them under a bias that is fixed. So
    ``centring`` times the mean of each image's own logits is taken off before the bias is added: 0 leaves them as they
    are, 1 leaves nothing in the routing that its patches have in common. A prediction depends on its own image only.

    The network runs in evaluation mode, a batch at a time. After each the biases are found from all patches so far, so
    that a layer sees what the layers before it will pass on. Modes, weights and other buffers stay as they are; so
    do the biases where a batch fails.

    Args:
        batches: images ``[B, C, H, W]``, or sequences that begin with them, such as (images, labels), on the network's
            device, prepared as for evaluation. Some hundred patches per expert in each layer are enough.
        model: the network, changed in place; one without balancing routers is left as it is.
        centring: from 0 to 1.

    Raises:
        ValueError: for another ``centring``; where there is no batch; for a compiled network, see `record_routing`.
    """
    if not is_number(centring) or not 0 <= centring <= 1:
        raise ValueError(f"centring={centring!r} must be a number from 0 to 1")
    routers = {name: router for name, router in routers_of(model) if router.expert_bias is not None}
    seen: dict[str, list[Tensor]] = {name: [] for name in routers}
    modes = [(module, module.training) for module in model.modules()]
    before = [(buffer, buffer.clone()) for router in routers.values() for buffer in router.buffers(recurse=False)]
    model.eval()
    try:
        for router in routers.values():
            assert router.centring is not None
            router.centring.fill_(centring)
        for batch in batches if routers else ():
            with record_routing(model) as records:
                model(batch if isinstance(batch, Tensor) else batch[0])
            for name in routers.keys() & records.keys():
                bias, top_k = routers[name].expert_bias, routers[name].top_k
                assert bias is not None
                seen[name] += [routing.logits - bias for routing in records[name]]
                bias.copy_(balancing_bias(torch.cat(seen[name]), top_k))
        if routers and not any(seen.values()):
            raise ValueError("batches is empty: give a loader or a list, not an iterator that was used up before")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for module, training in modes:
            module.training = training
