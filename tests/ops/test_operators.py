"""Operators of every backend against naive loops over patches in float64: outputs and all gradients.

Tolerances: a sum of n products in a type of precision eps is off by some ``eps * sqrt(n)`` of its size, because
roundings fall up as often as down; twice that is allowed. What follows a sum (an activation, a factor, a difference)
takes ten roundings more at most, GELU's approximation among them, which is good to 1e-7. In 16 bits kernels sum in
float32 and round once; the gradient of a convolution's input is the sum of up to nine such parts in Triton, each off
by as much either way, three times as much in all. Where Winograd's algorithm multiplies bfloat16, the sums of cells
and those of taps are rounded, too: two roundings more, of products whose sum has 25/9 times the variance of the result,
so that the standard deviation is 2.6 times (the root of 1 + 2 * 25/9) that of one rounding; three times is allowed. The
reference rounds between its operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import reference
import torch
from backends import BACKENDS, INTERPRETED
from torch import Tensor

from pcenet import ops

ROUNDINGS = 10


class Case(NamedTuple):
    """A convolution.

    Attributes:
        side: S.
        kernel: K.
        neighbours: whether taps beyond a patch read.
        size: B, H, W.
        channels: C.
        outs: D.
        experts: E; where there are three or more, expert 1 has no patches.
        layout: of the weight.
        base: whether something is added to all kernels.
        nobody: whether every fourth patch is nobody's.
    """

    side: int
    kernel: int
    neighbours: bool
    size: tuple[int, int, int]
    channels: int
    outs: int
    experts: int
    layout: str
    base: bool
    nobody: bool


CASES = [
    Case(1, 3, True, (2, 5, 7), 5, 24, 4, "channels last", True, True),
    Case(1, 3, False, (1, 6, 5), 24, 5, 3, "contiguous", False, False),
    Case(1, 1, True, (1, 3, 5), 7, 5, 2, "uneven", True, True),
    Case(2, 3, True, (2, 7, 6), 5, 70, 4, "slice", True, False),
    Case(2, 3, False, (1, 4, 9), 8, 16, 3, "channels last", False, True),
    Case(3, 3, True, (1, 8, 7), 24, 24, 2, "contiguous", True, False),
    Case(3, 3, False, (2, 7, 7), 5, 8, 4, "slice", True, True),
    Case(3, 1, False, (1, 8, 8), 24, 5, 3, "slice", False, True),
    Case(4, 3, True, (2, 9, 11), 70, 24, 3, "channels last", False, True),
    Case(2, 3, True, (1, 6, 6), 70, 24, 3, "channels last", True, False),  # few pixels, channels that fill no vector
    Case(2, 3, True, (1, 4, 5), 70, 23, 2, "channels last", True, False),  # fewer, also for bfloat16
    Case(1, 3, True, (1, 5, 6), 24, 5, 2, "channels last", True, False),  # few, of patches of one pixel
    Case(1, 3, True, (1, 5, 6), 5, 22, 2, "channels last", False, False),
    Case(4, 1, True, (2, 8, 8), 24, 70, 4, "contiguous", True, False),
    Case(4, 3, True, (8, 12, 13), 5, 8, 2, "one", False, False),  # gradients of images in blocks
    Case(4, 3, True, (1, 8, 7), 128, 128, 2, "contiguous", False, False),  # a weight's gradient in pieces
    Case(8, 3, True, (1, 17, 13), 24, 70, 4, "slice", False, True),
    Case(9, 3, True, (1, 10, 12), 5, 5, 2, "contiguous", True, True),  # a patch is more than a program computes
    Case(8, 3, False, (2, 11, 16), 16, 24, 3, "channels last", True, False),
    Case(3, 3, True, (1, 8, 7), 24, 33, 2, "contiguous", False, False),
    Case(24, 3, True, (1, 25, 49), 5, 24, 3, "contiguous", True, True),  # a patch is more than a chunk
    Case(24, 3, False, (2, 30, 20), 8, 5, 2, "uneven", False, False),
    Case(5, 3, True, (3, 4, 3), 5, 5, 9, "channels last", True, False),  # fewer patches than experts, and smaller ones
]

if INTERPRETED:  # a program takes some 50 ms
    CASES = [case for case in CASES if math.prod(case.size) <= 200 and case.channels * case.outs <= 2000]


def name_of(case: Case) -> str:
    words = ["x".join(map(str, field)) if isinstance(field, tuple) else str(field) for field in case]
    return "-".join(words).replace(" ", "_")


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 holds, too, so that all types start from the same ones."""
    return (scale * torch.randn(shape)).bfloat16().to(dtype)


def experts_of(case: Case) -> list[int]:
    batch, height, width = case.size
    number = batch * -(-height // case.side) * -(-width // case.side)
    serving = [0, *range(2, case.experts)] if case.experts > 2 else list(range(case.experts))
    found = [serving[i] for i in torch.randint(len(serving), (number,)).tolist()]
    return [-1 if case.nobody and i % 4 == 1 else e for i, e in enumerate(found)]


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise in memory."""
    if layout == "channels last":
        return weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "slice":
        wider = weight.new_full(
            (weight.shape[0], weight.shape[1] + 1, weight.shape[2] + 3, *weight.shape[3:]), math.nan
        )
        wider[:, 1:, 2:-1] = weight
        return wider[:, 1:, 2:-1]
    if layout == "uneven":
        return weight.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == "one":
        return weight[:1].expand_as(weight)  # all experts alike
    return weight


class Mode(NamedTuple):
    """Types of maps and of parameters."""

    maps: torch.dtype
    parameters: torch.dtype


MODES = {
    "float64": Mode(torch.float64, torch.float64),
    "float32": Mode(torch.float32, torch.float32),
    "bfloat16": Mode(torch.bfloat16, torch.bfloat16),
    "bfloat16 maps": Mode(torch.bfloat16, torch.float32),
    "float16": Mode(torch.float16, torch.float16),
}


def modes_of(backend: str) -> list[str]:
    """Types in which a backend computes itself; Triton's interpreter takes bfloat16 for whole numbers."""
    if backend == "triton":
        return ["float32", "float16"]
    exact = ["float64"] if backend == "reference" else []
    return [*exact, "float32", "bfloat16", "bfloat16 maps"]


KINDS = [(backend, mode) for backend in BACKENDS for mode in modes_of(backend)]
everywhere = pytest.mark.parametrize(("backend", "mode"), KINDS, indirect=True)


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


def tolerance(
    found: Tensor,
    expected: Tensor,
    terms: float,
    backend: str,
    mode: Mode,
    of_parts: bool = False,
    winograd: bool = False,
) -> float:
    """What is allowed, as said above; ``terms`` is n. ``of_parts``: of a convolution's input."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    if backend == "reference" and mode.maps == torch.bfloat16:
        return 2 * torch.finfo(torch.bfloat16).eps * largest
    sums = torch.float64 if mode.maps == torch.float64 else torch.float32
    rounded = torch.finfo(found.dtype).eps / 2 * largest if found.dtype.itemsize == 2 else 0.0
    if backend == "triton" and of_parts:
        rounded *= 3
    if winograd and backend in ("avx512_bf16", "avx512_amx") and mode.maps == torch.bfloat16:
        rounded = 3 * torch.finfo(torch.bfloat16).eps / 2 * largest
    return 2 * torch.finfo(sums).eps * math.sqrt(terms) * largest + rounded


def compare(
    run: Callable[..., Sequence[Tensor]],
    naive: Callable[..., Sequence[Tensor]],
    inputs: dict[str, Tensor | None],
    terms: dict[str, float],
    backend: str,
    mode: Mode,
    of_parts: str = "",
    winograd: bool = False,
) -> None:
    """Outputs, by number, and gradients, by the name of an input, of an operator and of the naive loops."""
    own = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    exact = {name: x.detach().double().requires_grad_() for name, x in own.items()}
    nothing = {name: None for name, x in inputs.items() if x is None}
    found, expected = run(**own, **nothing), naive(**exact, **nothing)
    directions = [draw(*out.shape, dtype=out.dtype) for out in found]
    assert [out.shape for out in found] == [out.shape for out in expected]
    pairs = {str(i): each for i, each in enumerate(zip(found, expected, strict=True))}
    grads = torch.autograd.grad(found, list(own.values()), directions)
    exact_grads = torch.autograd.grad(
        expected, list(exact.values()), [each.double() for each in directions], materialize_grads=True
    )
    pairs |= dict(zip(own, zip(grads, exact_grads, strict=True), strict=True))
    for name, (ours, right) in pairs.items():
        if not ours.numel():  # a perceptron without features of positions
            continue
        allowed = tolerance(ours, right, terms[name], backend, mode, name == of_parts, winograd)
        difference = float((ours.detach().double() - right.detach()).abs().max())
        assert difference <= allowed, f"{name} {tuple(ours.shape)}: off by {difference:.2e}, allowed {allowed:.2e}"
        if name in own:
            assert ours.dtype == own[name].dtype, name


@everywhere
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_convolution(case: Case, backend: str, mode: Mode) -> None:
    batch, height, width = case.size
    taps, pixels = case.kernel**2, batch * height * width
    expert = experts_of(case)
    weight = draw(case.experts, case.outs, case.channels, case.kernel, case.kernel, dtype=mode.parameters)
    base = draw(*weight.shape[1:], dtype=mode.parameters) if case.base else None
    x = draw(batch, case.channels, height, width, dtype=mode.maps)
    if case.layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)

    def run(x: Tensor, weight: Tensor, base: Tensor | None) -> list[Tensor]:
        lying = laid_out(weight, case.layout)
        if base is not None and case.layout == "channels last":  # then both are used where they lie
            base = laid_out(base[None], case.layout)[0]
        return [ops.patch_conv2d(x, lying, torch.tensor(expert), case.side, case.neighbours, base=base)]

    def naive(x: Tensor, weight: Tensor, base: Tensor | None) -> list[Tensor]:
        weight = weight[:1].expand_as(weight) if case.layout == "one" else weight
        return [reference.patch_conv2d(x, weight, base, expert, case.side, case.neighbours)]

    terms = {"0": case.channels * taps, "x": case.outs * taps, "weight": pixels, "base": pixels}
    winograd = case.kernel == 3 and case.side > 1
    compare(run, naive, {"x": x, "weight": weight, "base": base}, terms, backend, mode, "x", winograd)
    [out] = run(x, weight, base)
    assert out.stride(1) == 1  # channels-last, although the reference may have cut off its edge


# What may be left out, and the activation; every pair of them occurs, and all and none.
PARTS = ("scale", "shift", "gelu", "gate", "residual")
CHOSEN = ["", "scale", "shift gate", "gelu residual", "scale gelu gate", "shift gelu", "gate", " ".join(PARTS)]
# S, size, C, E
MAPS = [
    (1, (2, 3, 5), 5, 3),
    (2, (1, 7, 6), 24, 2),
    (3, (2, 8, 7), 70, 4),
    (4, (2, 9, 11), 8, 3),
    (24, (1, 25, 49), 5, 2),
]
NORM_MAPS = [*MAPS, (8, (3, 7, 8), 24, 5)]


def half_of(shapes: Sequence[Any], chosen: Sequence[str]) -> list[tuple[Any, str]]:
    """Every second pair of a shape and of parts, and all that have all parts."""
    pairs = [(i + j, shape, parts) for i, shape in enumerate(shapes) for j, parts in enumerate(chosen)]
    return [(shape, parts) for number, shape, parts in pairs if number % 2 == 0 or parts == chosen[-1]]


def case_of(side: int, size: tuple[int, int, int], channels: int, experts: int) -> Case:
    return Case(side, 3, True, size, channels, channels, experts, "contiguous", False, True)


def parts(chosen: str, case: Case, expert: list[int], mode: Mode) -> dict[str, Tensor | None]:
    """Inputs of an affine map; the gate is float32 beside bfloat16, and so is the residual beside one."""
    words = chosen.split()
    gates = torch.float64 if mode.maps == torch.float64 else torch.float32
    made = {
        "scale": draw(case.experts, case.outs, dtype=mode.parameters),
        "shift": draw(case.experts, case.outs, dtype=mode.parameters),
        "gate": draw(len(expert), dtype=gates),
        "residual": draw(case.size[0], case.outs, *case.size[1:], dtype=mode.parameters),
    }
    return {name: value if name in words else None for name, value in made.items()}


@everywhere
@pytest.mark.parametrize(("shape", "chosen"), half_of(MAPS, CHOSEN), ids=str)
def test_affine_map(shape: Any, chosen: str, backend: str, mode: Mode) -> None:
    case = case_of(*shape)
    expert, gelu = experts_of(case), "gelu" in chosen
    x = draw(case.size[0], case.channels, *case.size[1:], dtype=mode.maps)
    given = parts(chosen, case, expert, mode)

    def run(x: Tensor, residual: Tensor | None, gate: Tensor | None, **affine: Any) -> list[Tensor]:
        parts = ops.Affine(affine["scale"], affine["shift"], gelu, gate, residual)
        out = ops.patch_affine(x, torch.tensor(expert), case.side, parts)
        kinds = [mode.maps] if residual is None else [mode.maps, residual.dtype]
        assert out.dtype == max(kinds, key=lambda kind: torch.finfo(kind).bits)
        return [out]

    def naive(x: Tensor, residual: Tensor | None, gate: Tensor | None, **affine: Any) -> list[Tensor]:
        return [reference.patch_affine(x, affine["scale"], affine["shift"], expert, case.side, gelu, gate, residual)]

    pixels = case.size[0] * case.size[1] * case.size[2]
    sums = {"scale": pixels, "shift": pixels, "gate": case.side**2 * case.channels}
    terms = {name: ROUNDINGS**2 + sums.get(name, 0) for name in ("0", "x", "residual", *sums)}
    compare(run, naive, {"x": x, **given}, terms, backend, mode)


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("mode", modes_of("triton" if INTERPRETED else "compiled"), indirect=True)
def test_convolution_and_affine_map_in_one(kernel: int, chosen: str, compiled: str, mode: Mode) -> None:
    """What runs where nothing needs a gradient; with one it is the two operators. A residual may be in float32 beside
    bfloat16, and so is what is made then."""
    cases = [case for case in CASES if case.kernel == kernel]
    for case in cases[::4] if INTERPRETED else cases:
        expert = experts_of(case)
        x = draw(case.size[0], case.channels, *case.size[1:], dtype=mode.maps)
        size, scale = (case.experts, case.outs, case.channels, kernel, kernel), (case.channels * kernel**2) ** -0.5
        weight = laid_out(draw(*size, dtype=mode.parameters, scale=scale), case.layout)
        given, gelu = parts(chosen, case, expert, mode), "gelu" in chosen
        then = ops.Affine(**given, gelu=gelu)
        settings = (torch.tensor(expert), case.side, case.neighbours)
        found = ops.patch_conv2d(x, weight, *settings, then=then)
        exact = {name: None if value is None else value.double() for name, value in given.items()}
        out = reference.patch_conv2d(x.double(), weight.double(), None, expert, case.side, case.neighbours)
        expected = reference.patch_affine(
            out, exact["scale"], exact["shift"], expert, case.side, gelu, exact["gate"], exact["residual"]
        )
        allowed = tolerance(found, expected, case.channels * kernel**2 + ROUNDINGS**2, compiled, mode)
        if mode.maps.itemsize == 2:  # what the convolution is off by grows with what follows; GELU's slope is 1.13
            growth = [float(value.abs().max()) for key in ("scale", "gate") if (value := exact[key]) is not None]
            winograd = kernel == 3 and case.side > 1
            off = tolerance(out.to(mode.maps), out, case.channels * kernel**2, compiled, mode, winograd=winograd)
            allowed += 1.13 * math.prod(growth) * off
        assert float((found.double() - expected).abs().max()) <= allowed, name_of(case)
        tracked = ops.patch_conv2d(x.requires_grad_(), weight, *settings, then=then)
        assert tracked.requires_grad
        assert tracked.dtype == found.dtype
        assert float((tracked.detach().double() - expected).abs().max()) <= allowed, name_of(case)


@everywhere
@pytest.mark.parametrize(
    ("shape", "chosen"), half_of(NORM_MAPS, ["", "gelu", "gate residual", "gelu gate residual"]), ids=str
)
def test_normalisation(shape: Any, chosen: str, backend: str, mode: Mode) -> None:
    """Experts of no pixels and of one, which use running statistics, are among them."""
    case = case_of(*shape)
    expert, gelu = experts_of(case), "gelu" in chosen
    if case.side == 1:
        expert = [2 if i == 0 else min(e, 0) for i, e in enumerate(expert)]  # expert 2 has one pixel
    kind = torch.float64 if mode.maps == torch.float64 else torch.float32
    x = draw(case.size[0], case.channels, *case.size[1:], dtype=mode.maps) + 1
    running = draw(case.experts, case.channels, dtype=kind), 0.5 + draw(case.experts, case.channels, dtype=kind).abs()
    affine = {name: draw(case.experts, case.channels, dtype=kind) for name in ("weight", "bias")}
    given = parts(chosen, case, expert, mode)

    def run(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, residual: Tensor | None) -> list[Tensor]:
        more = {"gelu": gelu, "gate": gate, "residual": residual}
        normed = ops.expert_norm(x, weight, bias, torch.tensor(expert), case.side, running, 1e-3, **more)
        moments = reference.expert_moments(x.detach().double(), expert, case.side, case.experts)
        for found, expected in zip(normed[1:], moments, strict=True):
            assert not found.requires_grad
            assert found.dtype == kind
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        return [normed.out]

    def naive(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, residual: Tensor | None) -> list[Tensor]:
        statistics = (running[0].double(), running[1].double())
        return [reference.expert_norm(x, weight, bias, expert, case.side, statistics, 1e-3, gelu, gate, residual)]

    pixels = case.size[0] * case.size[1] * case.size[2]
    # Statistics are sums over pixels, and everything depends on them.
    terms = dict.fromkeys(("0", "x", "weight", "bias", "gate", "residual"), float(ROUNDINGS**2 + pixels))
    compare(run, naive, {"x": x, **affine, "gate": given["gate"], "residual": given["residual"]}, terms, backend, mode)


@pytest.mark.parametrize("shape", NORM_MAPS, ids=str)
def test_normalisation_over_processes(shape: Any, backend: str) -> None:
    """Two processes with equal maps, whose sums are twice one's own: one of them has what one process with both maps
    has for its half. The other's loss depends on the map as much as its own on the other's map, which here is the
    same one; so its gradient is that of the own half by both. A parameter's gradient is the own half's, which whoever
    trains together adds up."""
    case = case_of(*shape)
    expert = experts_of(case)
    x = draw(case.size[0], case.channels, *case.size[1:], dtype=torch.float32)
    running = torch.zeros(case.experts, case.channels), torch.ones(case.experts, case.channels)
    affine = {name: draw(case.experts, case.channels, dtype=torch.float32) for name in ("weight", "bias")}
    gate = draw(len(expert), dtype=torch.float32)

    def run(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> list[Tensor]:
        more = {"gelu": True, "gate": gate, "total": lambda own: 2 * own}
        normed = ops.expert_norm(x, weight, bias, torch.tensor(expert), case.side, running, 1e-3, **more)
        moments = reference.expert_moments(x.detach().double(), expert, case.side, case.experts)
        assert torch.equal(normed.number.double(), 2 * moments[0])
        torch.testing.assert_close(normed.mean.double(), moments[1], rtol=1e-5, atol=1e-6)
        return [normed.out]

    def naive(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> list[Tensor]:
        statistics, gates = (running[0].double(), running[1].double()), torch.cat([gate, gate])
        both = torch.cat([x, x])
        out = reference.expert_norm(both, weight, bias, expert * 2, case.side, statistics, 1e-3, True, gates, None)
        return [out[: len(x)]]

    pixels = 2 * case.size[0] * case.size[1] * case.size[2]
    terms = dict.fromkeys(("0", "x", "weight", "bias", "gate"), float(ROUNDINGS**2 + pixels))
    compare(run, naive, {"x": x, **affine, "gate": gate}, terms, backend, MODES["float32"])


@pytest.mark.parametrize("shape", NORM_MAPS, ids=str)
def test_moments_far_from_zero(shape: Any, backend: str) -> None:
    """Squares of the values themselves would cancel: of a mean of 1000 and a variance of 1 nothing would be left."""
    case = case_of(*shape)
    expert = experts_of(case)
    x = 1000 + torch.randn(case.size[0], case.channels, *case.size[1:])
    found = ops.expert_moments(x, torch.tensor(expert), case.side, case.experts)
    expected = reference.expert_moments(x.double(), expert, case.side, case.experts)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=0)


def test_moments_where_the_first_pixel_is_far_from_all_others(backend: str) -> None:
    """Nor may one pixel decide what values are differences from: squares of 1000 deviations leave few digits."""
    x = torch.randn(2, 5, 32, 32)
    x[0, :, 0, 0] = -1000
    expert = torch.zeros(128, dtype=torch.int64)
    _, mean, variance = ops.expert_moments(x, expert, 4, 1)
    pixels = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean[0].double(), pixels.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(variance[0].double(), pixels.var(1, correction=0), rtol=1e-5, atol=0)


# S, size, C, D
PERCEPTRONS = [
    (1, (2, 3, 5), 5, 16, 0),
    (2, (1, 7, 6), 24, 5, 8),
    (3, (2, 8, 7), 70, 24, 3),
    (4, (2, 9, 11), 8, 70, 32),
    (8, (1, 8, 16), 5, 32, 8),
    (24, (1, 25, 29), 5, 24, 16),
    (4, (1, 5, 100), 5, 8, 8),  # a line is more than a stretch
]


@pytest.mark.parametrize(("backend", "mode"), [kind for kind in KINDS if "float16" not in kind[1]], indirect=True)
@pytest.mark.parametrize("shape", PERCEPTRONS, ids=str)
def test_perceptron(shape: Any, backend: str, mode: Mode) -> None:
    side, (batch, height, width), channels, hidden, features = shape
    x = draw(batch, channels, height, width, dtype=mode.maps)
    kind = mode.parameters
    inputs = {
        "x": x,
        "weight": draw(hidden, channels + features, dtype=kind, scale=1 / math.sqrt(channels)),
        "bias": draw(hidden, dtype=kind),
        "rows": draw(height, features, dtype=kind),
        "columns": draw(width, features, dtype=kind),
    }

    def run(**inputs: Tensor) -> list[Tensor]:
        return [ops.patch_perceptron(**inputs, patch_size=side)]

    def naive(**inputs: Tensor) -> list[Tensor]:
        return [reference.patch_perceptron(*inputs.values(), side)]

    pixels = batch * height * width
    terms = {"0": channels + 2 * features, "x": hidden, "weight": pixels, "bias": pixels}
    terms |= {"rows": batch * width + hidden, "columns": batch * height + hidden}
    terms = {name: ROUNDINGS**2 + n for name, n in terms.items()}
    compare(run, naive, inputs, terms, backend, mode)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", PERCEPTRONS, ids=str)
def test_logits(shape: Any, balanced: bool, backend: str) -> None:
    """A router at evaluation, all in one: the second layer on the first one's means, image by image."""
    side, (batch, height, width), channels, hidden, features = shape
    experts, share = 3, 0.25
    sizes = ((batch, channels, height, width), (hidden, channels + features), (hidden,), (height, features))
    x, weight, bias, *lines = (draw(*size, dtype=torch.float32) for size in (*sizes, (width, features)))
    second, added, per_expert = (torch.randn(size) for size in ((experts, hidden), experts, experts))
    balance = {"expert_bias": per_expert, "centring": torch.tensor(share)} if balanced else {}
    with torch.no_grad():
        found = ops.patch_logits(x, (weight, bias, *lines), side, second, added, **balance)
        means = reference.patch_perceptron(*(each.double() for each in (x, weight, bias, *lines)), side)
        expected = torch.stack([second.double() @ patch + added for patch in means])
        if balanced:
            for image in expected.chunk(batch):
                image += per_expert - share * sum(image.clone()) / len(image)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_logits_whose_bias_alone_has_a_gradient(backend: str) -> None:
    """Each of an expert's logits has its bias once, and takes off the mean of its image's two times the share."""
    first = (torch.randn(5, 4), torch.randn(5), torch.randn(2, 1), torch.randn(4, 1))
    second, added = torch.randn(3, 5), torch.randn(3)
    bias, share = torch.zeros(3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    plain = ops.patch_logits(torch.ones(1, 3, 2, 4), first, 2, second, added)
    found = ops.patch_logits(torch.ones(1, 3, 2, 4), first, 2, second, added, bias, share)
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor([2.0, 4.0, 6.0]))
    torch.testing.assert_close(share.grad, -(plain.sum(0) * torch.tensor([1.0, 2.0, 3.0])).sum())


@pytest.mark.parametrize(("backend", "mode"), KINDS, indirect=True)
@pytest.mark.parametrize(
    ("side", "size", "channels", "hidden", "neighbours", "based"),
    [
        (4, (2, 9, 8), 5, 24, (True, True), True),
        (1, (1, 3, 5), 24, 5, (True, False), True),  # a dozen pixels: each kernel is used where it lies
        (2, (1, 7, 4), 24, 40, (True, True), False),
        (3, (1, 4, 5), 16, 16, (False, False), True),
        (8, (2, 16, 16), 8, 16, (False, True), False),
    ],
    ids=str,
)
def test_expert_block(
    side: int,
    size: tuple[int, int, int],
    channels: int,
    hidden: int,
    neighbours: tuple[bool, bool],
    based: bool,
    backend: str,
    mode: Mode,
) -> None:
    batch, height, width = size
    kind, experts = mode.parameters, 3
    number = batch * -(-height // side) * -(-width // side)
    expert = torch.arange(number) % (experts + 1) - 1  # the first patch is nobody's

    def part(ins: int, outs: int, sees: bool) -> ops.ConvNorm:
        scale = 1 / math.sqrt(9 * ins)
        weight = draw(experts * outs, ins, 3, 3, dtype=kind, scale=scale).detach()
        weight = weight.contiguous(memory_format=torch.channels_last).unflatten(0, (experts, outs))
        base = draw(outs, ins, 3, 3, dtype=kind, scale=scale).detach() if based else None
        base = base if base is None else base.contiguous(memory_format=torch.channels_last)
        norm = [draw(experts, outs, dtype=kind).detach() for _ in range(3)]
        return ops.ConvNorm(weight, base, sees, (*norm, 0.5 + draw(experts, outs, dtype=kind).detach().abs()), 0.01)

    first, second = part(channels, hidden, neighbours[0]), part(hidden, channels, neighbours[1])
    x = draw(batch, channels, height, width, dtype=mode.maps).detach()
    gate, residual = draw(number, dtype=kind).detach(), draw(*x.shape, dtype=kind).detach()
    with torch.no_grad():
        found = ops.expert_block(x, expert, side, first, second, gate=gate, residual=residual)
    expected, owners = x.double(), expert.tolist()
    for each, more in ((first, (True, None, None)), (second, (False, gate.double(), residual.double()))):
        base = 0 if each.base is None else each.base.double()
        expected = reference.patch_conv2d(expected, each.weight.double() + base, None, owners, side, each.neighbours)
        weight, bias, mean, variance = (table.double() for table in each.norm)
        scale = weight / torch.sqrt(variance + each.eps)
        expected = reference.patch_affine(expected, scale, bias - mean * scale, owners, side, *more)
    terms = 9 * (channels + hidden)
    atol = 4 * math.sqrt(terms) * torch.finfo(mode.maps).eps * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
