"""The compiled operators as torch knows them: schemas, shapes without data, tracing, errors of wrong shapes.

None has a gradient of its own: `pcenet.ops` puts them into functions that have. So inputs here need none, with which
`torch.library.opcheck` finds that there is nothing to register; everything else it does applies.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pcenet import ops

B, H, W, C, D, E, S = 2, 5, 7, 5, 6, 3, 2
EXPERT = torch.arange(B * 3 * 4) % 4 - 1


def pixels(channels: int) -> Tensor:
    return torch.randn(B, H, W, channels)


def per_expert(channels: int) -> Tensor:
    return torch.randn(E, channels)


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, with what may be left out and without."""
    gate, weight, base = torch.randn(len(EXPERT)), torch.randn(E, D, C, 3, 3), torch.randn(D, C, 3, 3)
    sliced = torch.randn(E, D, 3, 3, C + 1).permute(0, 1, 4, 2, 3)[:, :, 1:]
    layer = (torch.randn(D, C + 4), torch.randn(D), torch.randn(H, 4), torch.randn(W, 4))
    norm, wide = [per_expert(D).abs() for _ in range(4)], torch.randn(E, C, D, 3, 3)
    last = [per_expert(C).abs() for _ in range(4)]
    none = (None, None, False, None, None)
    return {
        "patch_conv2d": [
            (pixels(C), weight, base, EXPERT, S, True, per_expert(D), per_expert(D), True, gate, pixels(D)),
            (pixels(C), sliced, None, EXPERT, S, False, *none),
            (pixels(C), torch.randn(E, D, C, 1, 1), None, EXPERT, S, True, *none),
            (pixels(C), weight, None, EXPERT, S, True, None, per_expert(D), False, gate, pixels(D)),
        ],
        "patch_conv2d_input_grad": [
            (pixels(D), weight, base, EXPERT, S, True),
            (pixels(D), sliced, None, EXPERT, S, False),
        ],
        "patch_conv2d_weight_grad": [
            (pixels(D), pixels(C), EXPERT, S, True, E, 3),
            (pixels(D), pixels(C), EXPERT, S, False, E, 1),
        ],
        "patch_affine": [
            (pixels(C), EXPERT, S, per_expert(C), per_expert(C), True, gate, pixels(C)),
            (pixels(C), EXPERT, S, *none),
            (pixels(C), EXPERT, S, None, per_expert(C), True, None, pixels(C)),
        ],
        "expert_moments": [(pixels(C), EXPERT, S, E)],
        "patch_affine_sums": [
            (pixels(C), pixels(C), EXPERT, S, E, per_expert(C), per_expert(C), True, gate, per_expert(C)),
            (pixels(C), pixels(C), EXPERT, S, E, *none),
        ],
        "patch_affine_input_grad": [
            (pixels(C), pixels(C), EXPERT, S, per_expert(C), per_expert(C), True, gate, per_expert(C), per_expert(C)),
            (pixels(C), pixels(C), EXPERT, S, *none, None),
        ],
        "balancing_bias": [(torch.randn(30, 4), 1, 8, 0.7), (torch.randn(30, 4), 2, 3, 0.5)],
        "expert_block": [
            (pixels(C), EXPERT, S, weight, base, norm, 1e-5, True, wide, None, last, 1e-3, False, gate, pixels(C)),
            (pixels(C), EXPERT, S, weight, None, norm, 1e-5, False, wide, None, last, 1e-5, True, None, None),
        ],
        "patch_perceptron": [(pixels(C), *layer, S)],
        "patch_logits": [
            (pixels(C), *layer, S, torch.randn(E, D), torch.randn(E), torch.randn(E), torch.tensor(0.6)),
            (pixels(C), *layer, S, torch.randn(E, D), torch.randn(E), None, None),
        ],
        "patch_perceptron_backward": [
            (torch.randn(len(EXPERT), D), pixels(C), *layer, S, True),
            (torch.randn(len(EXPERT), D), pixels(C), *layer, S, False),
        ],
    }


NAMES = list(calls())


def test_every_operator_is_in_the_table(compiled: str) -> None:
    registered = {name.removeprefix("pcenet::") for name in torch._C._dispatch_get_all_op_names() if "pcenet::" in name}
    assert registered == set(NAMES)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, each in calls().items() for i in range(len(each))])
def test_opcheck(name: str, number: int, compiled: str) -> None:
    torch.library.opcheck(getattr(torch.ops.pcenet, name).default, calls()[name][number])


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_an_error(name: str, compiled: str) -> None:
    """A tensor of one row or column less than it must have, which would be read beyond its end, whichever it is."""
    for arguments in calls()[name]:
        tensors = {index: tensor for index, tensor in enumerate(arguments) if isinstance(tensor, Tensor)}
        first = min(tensors)  # by which the others are judged
        for index in tensors.keys() - {first}:
            for axis, size in enumerate(tensors[index].shape):
                wrong = list(arguments)
                wrong[index] = tensors[index].narrow(axis, 0, size - 1).contiguous()
                if may_be_less(name, index, axis, arguments):
                    getattr(torch.ops.pcenet, name)(*wrong)
                    continue
                with pytest.raises(RuntimeError, match=r"must|has"):
                    getattr(torch.ops.pcenet, name)(*wrong)


def may_be_less(name: str, index: int, axis: int, arguments: tuple[Any, ...]) -> bool:
    """Whether the size is free: a weight's output channels where nothing else has them, the input channels of what is
    only a gradient."""
    if name == "patch_conv2d":
        return index == 1 and axis == 1 and arguments[2] is None and not any(map(torch.is_tensor, arguments[6:]))
    if name == "patch_conv2d_input_grad":
        return index == 1 and axis == 2 and arguments[2] is None
    return name == "patch_conv2d_weight_grad" and index == 1 and axis == 3


@pytest.mark.parametrize("expert", [E, -2, 2**40])
def test_an_expert_that_there_is_not(expert: int, compiled: str) -> None:
    wrong = EXPERT.clone()
    wrong[3] = expert
    found = re.escape(f"expert must lie between -1 and {E - 1}, found {expert}")
    with pytest.raises(RuntimeError, match=found):
        ops.patch_conv2d(torch.randn(B, C, H, W), torch.randn(E, D, C, 3, 3), wrong, S)
    with pytest.raises(RuntimeError, match=found):
        ops.expert_moments(torch.randn(B, C, H, W), wrong, S, E)
