"""First and second derivatives, transforms of `torch.func`, and types: what the compiled operators leave to the
reference they leave to it by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcenet import ops

B, H, W, C, D, E, S = 1, 3, 4, 2, 3, 2, 2
EXPERT = torch.tensor([0, 1, -1, 0])
Inputs = tuple[Tensor, ...]


def draw(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64).to(dtype).requires_grad_()


class Function:
    """An operator as a function of tensors alone, and the shapes of these."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        self.function, self.shapes = function, shapes

    def inputs(self, dtype: torch.dtype, maps: torch.dtype | None = None) -> Inputs:
        """Tensors that need a gradient; ``maps`` is the type of the first."""
        first, *others = self.shapes
        return draw(*first, dtype=maps or dtype), *(draw(*shape, dtype=dtype) for shape in others)


def conv(neighbours: bool) -> Callable[..., Tensor]:
    return lambda x, weight, base: ops.patch_conv2d(x, weight, EXPERT, S, neighbours, base=base)


def affine(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return ops.patch_affine(x, EXPERT, S, ops.Affine(scale, shift, True, gate, residual))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return ops.patch_affine(x, EXPERT, S, ops.Affine(gate=gate))


def norm(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    running = (torch.zeros(E, C, dtype=weight.dtype), weight.detach() * 0 + 1)
    more = {"gelu": True, "gate": gate, "residual": residual}
    return ops.expert_norm(x, weight, bias, EXPERT, S, running, 0.1, **more).out


def perceptron(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, 3 * size).view(size, 3).to(x.dtype) for size in (H, W))
    return ops.patch_perceptron(x, weight, bias, rows, columns, S)


def in_one(x: Tensor, weight: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
    return ops.patch_conv2d(x, weight, EXPERT, S, then=ops.Affine(shift=shift, gate=gate))


MAP, OUT, TABLE, GATE = (B, C, H, W), (B, D, H, W), (E, C), (len(EXPERT),)
FUNCTIONS = {
    "conv": Function(conv(True), MAP, (E, D, C, 3, 3), (D, C, 3, 3)),
    "conv without neighbours": Function(conv(False), MAP, (E, D, C, 3, 3), (D, C, 3, 3)),
    "conv 1x1": Function(conv(True), MAP, (E, D, C, 1, 1), (D, C, 1, 1)),
    "conv and affine": Function(in_one, MAP, (E, D, C, 3, 3), (E, D), GATE),
    "affine": Function(affine, MAP, TABLE, TABLE, GATE, MAP),
    "gate": Function(gated, MAP, GATE),
    "norm": Function(norm, MAP, TABLE, TABLE, GATE, MAP),
    "perceptron": Function(perceptron, MAP, (D, C + 3), (D,)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
# Torch's own rules for forward derivatives are scripts.
of_torch = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")


@of_torch
@each_function
def test_derivatives_of_the_reference(name: str) -> None:
    """First and second ones, backwards and forwards, against differences of values."""
    function = FUNCTIONS[name]
    inputs = function.inputs(torch.float64)
    torch.autograd.gradcheck(function.function, inputs)
    torch.autograd.gradcheck(function.function, inputs, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function.function, inputs, fast_mode=True)


def test_moments_are_differentiable_in_the_reference() -> None:
    x = draw(*MAP, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: ops.expert_moments(x, EXPERT, S, E)[1:], x)
    torch.autograd.gradgradcheck(lambda x: ops.expert_moments(x, EXPERT, S, E)[1:], x)


def second_derivatives(function: Function, inputs: Inputs) -> list[Tensor]:
    """Gradients of the size of all gradients, and these."""
    out = function.function(*inputs)
    first = torch.autograd.grad(out.float().square().sum(), inputs, create_graph=True)
    penalty = sum(grad.float().square().sum() for grad in first)
    assert isinstance(penalty, Tensor)
    return [*first, *torch.autograd.grad(penalty, inputs)]


@each_function
def test_second_derivatives_of_compiled_operators(name: str, compiled: str) -> None:
    """They are the reference's; its float32 differs from float64 by some roundings, of numbers up to their largest."""
    function = FUNCTIONS[name]
    inputs = function.inputs(torch.float32)
    expected = second_derivatives(function, tuple(x.detach().double().requires_grad_() for x in inputs))
    for found, right in zip(second_derivatives(function, inputs), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-6 * float(right.detach().abs().max() + 1))


@pytest.mark.parametrize("maps", [torch.bfloat16, torch.float32], ids=str)
@each_function
def test_second_derivatives_where_types_differ(name: str, maps: torch.dtype, compiled: str) -> None:
    """As under autocast: parameters in float32, maps in bfloat16, which holds 8 bits."""
    function = FUNCTIONS[name]
    inputs = function.inputs(torch.float32, maps)
    if name == "perceptron":
        inputs = function.inputs(torch.float32)  # a router computes in the type of its parameters
    expected = second_derivatives(function, tuple(x.detach().double().requires_grad_() for x in inputs))
    for found, right, of in zip(second_derivatives(function, inputs), expected, inputs * 2, strict=True):
        assert found.dtype == of.dtype
        torch.testing.assert_close(found.double(), right, rtol=0, atol=0.05 * float(right.detach().abs().max() + 1))


class Called(TorchDispatchMode):
    """The names of the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pcenet":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@each_function
def test_what_runs(name: str, compiled: str) -> None:
    """The compiled operators in float32, forwards and backwards; the reference in types that they do not have."""
    function = FUNCTIONS[name]
    for dtype in (torch.float32, torch.float64, torch.float16):
        with Called() as forward:
            out = function.function(*(inputs := function.inputs(dtype)))
        with Called() as backward:
            torch.autograd.grad(out.sum(), inputs)
        assert bool(forward.names) == bool(backward.names) == (dtype == torch.float32), dtype
        assert out.dtype == dtype


@of_torch
@each_function
def test_transforms(name: str, backend: str) -> None:
    """`vmap`, `jvp`, `grad` and their like need no special care."""
    function = FUNCTIONS[name].function
    inputs = tuple(x.detach() for x in FUNCTIONS[name].inputs(torch.float32))
    tangents = tuple(map(torch.randn_like, inputs))

    def total(*inputs: Tensor) -> Tensor:
        return function(*inputs).square().sum()

    out, along = torch.func.jvp(total, inputs, tangents)
    grads = torch.func.grad(total, tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(out, total(*inputs))
    terms = torch.cat([(g * t).flatten() for g, t in zip(grads, tangents, strict=True)])
    torch.testing.assert_close(along, terms.sum(), rtol=0, atol=1e-5 * float(terms.abs().sum()))
    leaves = [x.clone().requires_grad_() for x in inputs]
    for ours, right in zip(grads, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    doubled = tuple(torch.stack([x, 2 * x]) for x in inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        many = torch.func.vmap(function)(*doubled)
    for index in (0, 1):
        one = function(*(x[index] for x in doubled))
        torch.testing.assert_close(many[index], one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@each_function
def test_what_needs_no_gradient_changes_none(name: str, compiled: str) -> None:
    """Each gradient alone is, bit for bit, what it is beside all others."""
    function = FUNCTIONS[name]
    inputs = function.inputs(torch.float32)
    everything = torch.autograd.grad(function.function(*inputs).square().sum(), inputs)
    for index, expected in enumerate(everything):
        alone = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
        function.function(*alone).square().sum().backward()
        assert [x.grad is not None for x in alone] == [i == index for i in range(len(inputs))]
        assert torch.equal(alone[index].grad, expected), index


@each_function
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_no_image(name: str, kind: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of no images has no patches, and what all patches share a gradient of zeros."""
    monkeypatch.setitem(globals(), "EXPERT", EXPERT[:0])
    inputs = [x.detach()[:0].requires_grad_() if x.shape in (MAP, GATE) else x for x in FUNCTIONS[name].inputs(kind)]
    out = FUNCTIONS[name].function(*inputs)
    assert out.shape[0] == 0
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_a_map_with_an_input_twice(compiled: str) -> None:
    """An input that is its own shortcut has both gradients: 2 x for the sum of squares' half of x + x."""
    x = torch.randn(B, C, H, W, requires_grad=True)
    out = ops.patch_affine(x, torch.zeros(4, dtype=torch.int64), S, ops.Affine(residual=x))
    for create_graph in (False, True):
        [grad] = torch.autograd.grad(out.sum(), x, retain_graph=True, create_graph=create_graph)
        assert torch.equal(grad, torch.full_like(x, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_in_its_patch(bad: float, kind: torch.dtype, backend: str) -> None:
    """Without neighbours nothing of a patch is multiplied by what lies beyond it, not even by zero."""
    if INTERPRETED and kind == torch.bfloat16:
        pytest.skip("Triton's interpreter takes bfloat16 for whole numbers")
    x = torch.randn(1, C, 4, 4).to(kind)
    x[..., :2, 2:] = bad  # patch 1
    expert = torch.tensor([0, 1, 0, 1])
    out = ops.patch_conv2d(x, torch.randn(E, D, C, 3, 3), expert, S, neighbours=False)
    assert not out[..., :2, 2:].isfinite().any()
    out[..., :2, 2:] = 0
    assert out.isfinite().all()
    active = ops.patch_affine(x, expert, S, ops.Affine(torch.ones(E, C), torch.zeros(E, C), gelu=True))
    assert not active[..., :2, 2:].isfinite().any()
    means = ops.patch_perceptron(
        x.float(), torch.ones(D, C + 1), torch.zeros(D), torch.zeros(4, 1), torch.zeros(4, 1), S
    )
    assert means.isfinite().all(1).tolist() == [True, False, True, True]


def test_rows_and_columns_of_any_layout(backend: str) -> None:
    x, weight, bias = torch.randn(1, C, 4, 4), torch.randn(D, C + 6), torch.randn(D)
    lines = torch.randn(6, 4)
    expected = ops.patch_perceptron(x, weight, bias, lines.T.contiguous(), torch.zeros(4, 6), S)
    found = ops.patch_perceptron(x, weight, bias, lines.T, torch.zeros(1, 6).expand(4, 6), S)
    torch.testing.assert_close(found, expected)


def test_a_residual_of_any_type(backend: str) -> None:
    """The sum has the wider type of both, as torch's sums."""
    expert = torch.zeros(4, dtype=torch.int64)
    for maps in (torch.float32, torch.bfloat16):
        x = torch.randn(1, C, 4, 4).to(maps)
        for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            residual = torch.randn(1, C, 4, 4).to(kind)
            out = ops.patch_affine(x, expert, S, ops.Affine(torch.ones(E, C), residual=residual))
            assert out.dtype == torch.promote_types(maps, kind)
            torch.testing.assert_close(out, residual + x, rtol=1e-2, atol=1e-2)
            with torch.no_grad():
                weight = torch.zeros(E, C, C, 1, 1).to(maps)
                out = ops.patch_conv2d(x, weight, expert, S, then=ops.Affine(residual=residual))
            assert torch.equal(out, residual.to(torch.promote_types(maps, kind)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_a_gradient_is_no_view(name: str, compiled: str) -> None:
    """A change in place of a view would part it from its gradient, and `fully_shard` warns of one."""
    out = FUNCTIONS[name].function(*FUNCTIONS[name].inputs(torch.float32))
    assert out.requires_grad
    assert not out._is_view()
