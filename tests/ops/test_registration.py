"""The compiled operators as torch knows them: schemas, shapes without data, tracing, errors of wrong shapes.

None has a gradient of its own: `pcenet.ops` puts them into functions that have. So inputs here need none, with which
`torch.library.opcheck` finds that there is nothing to register; everything else it does applies.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from operator_calls import EXPERT, B, C, D, E, H, S, W, calls
from torch import Tensor

from pcenet import ops
from pcenet.ops import library

NAMES = list(calls())


def test_every_operator_is_in_the_table(compiled: str) -> None:
    registered = {name.removeprefix("pcenet::") for name in torch._C._dispatch_get_all_op_names() if "pcenet::" in name}
    assert registered == set(NAMES)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, each in calls().items() for i in range(len(each))])
def test_opcheck(name: str, number: int, compiled: str) -> None:
    torch.library.opcheck(getattr(torch.ops.pcenet, name).default, calls()[name][number])


@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_in_bfloat16(name: str, others: torch.dtype, compiled: str) -> None:
    """As they are under autocast: also a residual, or a gradient of what was made with it, in float32."""
    if not library.takes_bfloat16():
        pytest.skip(f"{compiled} takes float32 alone")
    for arguments in calls(6, torch.bfloat16, others)[name]:
        torch.library.opcheck(getattr(torch.ops.pcenet, name).default, arguments)


def test_types_that_do_not_fit_are_errors(compiled: str) -> None:
    """Maps in bfloat16 that kernels cannot take, which `pcenet.ops` converts first."""
    wide, narrow = (torch.randn(B, H, W, 6).to(kind) for kind in (torch.float32, torch.bfloat16))
    operators, places = torch.ops.pcenet, (EXPERT, S, True, E, 3)
    if not library.takes_bfloat16():
        with pytest.raises(RuntimeError, match="and for kernels that take it"):
            operators.expert_moments(narrow, EXPERT, S, E)
        return
    with pytest.raises(RuntimeError, match="residual is in bfloat16, and the map that it belongs to is not"):
        operators.patch_affine(wide, EXPERT, S, None, None, False, None, narrow)
    for grad, x in ((wide, narrow), (narrow, wide)):
        with pytest.raises(RuntimeError, match="grad and x must have one type"):
            operators.patch_conv2d_weight_grad(grad, x, *places)
    odd = narrow[..., :5].contiguous()
    with pytest.raises(RuntimeError, match="must have an even number of channels"):
        operators.patch_conv2d(odd, torch.randn(E, D, 5, 3, 3), None, EXPERT, S, True, None, None, False, None, None)


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
