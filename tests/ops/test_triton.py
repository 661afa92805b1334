"""The Triton kernels where there is no GPU: computed by Triton's interpreter, which is on or off for a whole process
(``make test-triton``), and compiled to machine code that nothing here can run.

The interpreter computes on the processor, one program after another: it shows that indices, masks and sums are right,
not races, nor what a GPU's compiler makes of them, nor bfloat16, which it takes for whole numbers.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from operator_calls import EXPERT, calls
from torch import Tensor

from pcenet import ops
from pcenet.nn import PCELayer
from pcenet.ops import library, schemas

if INTERPRETED:
    import triton
    import triton.language as tl

    from pcenet.ops.gpu.kernels import cells_of_patch

    @triton.jit
    def places(out, patch, height, width, channels, rows, columns):  # type: ignore[no-untyped-def] # of Triton's types
        """Where the first numbers of a patch's sixteen pixels lie; -1 beyond the map."""
        pixel, there = cells_of_patch(patch, 0, height, width, rows, columns, 4, 16)
        tl.store(out + tl.arange(0, 16), tl.where(there, pixel * channels, -1))


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with make test-triton")
directly = pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")


@interpreted
def test_choice() -> None:
    assert ops.backend() == "triton (interpreted)"
    assert library.kernels_on("cpu") == "triton"
    assert library.kernels_on("cuda") is None


@interpreted
@pytest.mark.parametrize(("border", "options"), [("exchange", {"top_k": 2}), ("halo", {}), ("zero", {"gate": "prob"})])
def test_layer(border: str, options: dict[str, Any]) -> None:
    """All of a layer, in training, is what the reference makes of it; batch statistics and the gate among it."""
    torch.manual_seed(0)
    layer = PCELayer(6, 6, patch_size=3, num_experts=3, border=border, **options)
    x = torch.randn(2, 6, 7, 5)
    direction = torch.randn_like(x)

    def step() -> dict[str, Tensor]:
        layer.load_state_dict(start)
        own = x.clone().requires_grad_()
        out = layer(own)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(out, [own, *parameters], direction, materialize_grads=True)
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        return {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True)), **buffers}

    start = {name: value.clone() for name, value in layer.state_dict().items()}
    found = step()
    library.use("reference")
    try:
        expected = step()
    finally:
        library.use("triton")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Sums of some hundred products, one behind the other.
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@interpreted
@pytest.mark.parametrize("train", [True, False])
def test_layer_in_one_graph(train: bool) -> None:
    """Traced as torch.compile traces for any backend: nothing in it breaks the graph, and shapes are known."""
    torch.compiler.reset()
    layer = PCELayer(6, 6, patch_size=3, num_experts=3).train(train)
    x = torch.randn(2, 6, 7, 5)
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def run(module: torch.nn.Module) -> list[Tensor]:
        layer.load_state_dict(start)
        own = x.clone().requires_grad_()
        out = module(own)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), own)]

    expected = run(layer)
    for found, right in zip(run(torch.compile(layer, fullgraph=True, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-5, check_stride=False)


@interpreted
def test_evaluation_takes_halves() -> None:
    layer = PCELayer(8, 8, patch_size=2, num_experts=3).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected, routing = layer.forward_with_routing(x)
        own, owners = layer.half().forward_with_routing(x.half())
    assert own.dtype == torch.float16
    same = (owners.expert_ids == routing.expert_ids).all(1)
    assert same.float().mean() > 0.8
    assert (own - expected).abs().median() < 0.01


@interpreted
@pytest.mark.parametrize("name", schemas.OF_TRITON)
def test_opcheck(name: str) -> None:
    for arguments in calls()[name][:2]:
        torch.library.opcheck(getattr(torch.ops.pcenet, name).default, arguments)


@interpreted
def test_operators_do_not_change_from_run_to_run() -> None:
    for name in ("patch_conv2d_weight_grad", "expert_moments", "patch_affine_sums"):
        operator, arguments = getattr(torch.ops.pcenet, name), calls()[name][0]
        once, again = operator(*arguments), operator(*arguments)
        pairs = zip(once, again, strict=True) if isinstance(once, tuple) else [(once, again)]
        assert all(torch.equal(a, b) for a, b in pairs), name


@interpreted
def test_places_beyond_int32() -> None:
    """What no test can allocate: the last pixels of maps with more than 2**31 numbers."""
    batch, height, width, channels = 512, 130, 128, 512
    rows, columns = 33, 32
    out = torch.empty(16, dtype=torch.int64)
    places[(1,)](out, batch * rows * columns - 1, height, width, channels, rows, columns)
    first = ((batch - 1) * height + 128) * width + 124
    expected = [(first + y * width + x) * channels if y < 2 else -1 for y in range(4) for x in range(4)]
    assert max(expected) > 2**31
    assert out.tolist() == expected


@interpreted
def test_a_map_with_too_many_pixels_is_refused() -> None:
    from pcenet.ops import gpu

    assert gpu.map_of(torch.empty(64, 1024, 1024, 8, device="meta"), 8).patches == 64 * 128 * 128
    with pytest.raises(
        ValueError, match=r"a map of 1073741824 pixels in 1x1 patches is too large: make batches smaller"
    ):
        gpu.map_of(torch.empty(1024, 1024, 1024, 8, device="meta"), 1)


# Compiled for GPUs that are not here.

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int, side: int
) -> list[tuple[Any, Any, Any]]:
    """What a layer's operators launch, with their arguments: those of a training step, and 1x1 kernels."""
    from pcenet.ops import gpu

    found: list[tuple[Any, Any, Any]] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, _, *args, **constants: found.append((kernel, args, constants)))
    x, residual = torch.randn(2, 16, 16, channels, dtype=dtype), torch.randn(2, 16, 16, channels, dtype=dtype)
    weight, table = torch.randn(4, channels, channels, 3, 3), torch.randn(4, channels)
    expert = torch.arange(2 * (16 // side) ** 2) % 4
    gate = torch.randn(len(expert))
    gpu.patch_conv2d(x, weight, None, expert, side, True, table, table, True, gate, residual)
    gpu.patch_conv2d(x, weight, None, expert, side, False, None, None, False, None, None)
    gpu.patch_conv2d(x, weight[..., 1:2, 1:2], None, expert, side, True, None, None, False, None, None)
    gpu.patch_conv2d_input_grad(x, weight, None, expert, side, True)
    gpu.patch_conv2d_weight_grad(x, x, expert, side, True, 4, 3)
    gpu.patch_affine(x, expert, side, table, table, True, gate, residual)
    gpu.patch_affine_input_grad(x, x, expert, side, table, table, True, gate, table, table)
    gpu.patch_affine_sums(x, x, expert, side, 4, table, table, True, gate, table)
    gpu.expert_moments(x, expert, side, 4)
    return found


def machine_code(kernel: Any, arguments: Any, constants: Any, capability: int) -> Any:
    """Compiled as at a first call on a GPU with these arguments: numbers divisible by 16 are known to be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_

    signature, fixed, known = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[index] if index < len(arguments) else constants[name]
        if name in constants or value is None:
            signature[name], fixed[(index,)] = "constexpr", value
        else:
            signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                known[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, known)
    return compile_(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


@directly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tf32", "channels", "side", "capability"),
    [
        (torch.bfloat16, False, 64, 8, 90),
        (torch.float32, False, 64, 4, 90),
        (torch.float32, True, 256, 2, 86),
        (torch.float16, False, 48, 1, 90),
        (torch.bfloat16, False, 5, 8, 80),
    ],
    ids=str,
)
def test_kernels_compile_for_a_gpu(
    dtype: torch.dtype,
    tf32: bool,
    channels: int,
    side: int,
    capability: int,
    missing: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if sys.platform != "linux":
        missing("there is no Triton for this system")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        done = launches(monkeypatch, dtype, channels, side)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    used = {constants["PRECISION"] for _, _, constants in done if "PRECISION" in constants}
    assert used == {"tf32" if tf32 else "ieee"}
    kinds = {kernel.fn.__name__ for kernel, _, _ in done}
    assert kinds == {
        "convolve", "fold", "convolve_weight", "affine", "affine_input_grad", "affine_sums", "patch_moments",
        "sum_by_expert",
    }  # fmt: skip
    for kernel, arguments, constants in done:
        code = machine_code(kernel, arguments, constants, capability)
        assert code.asm["cubin"]
        # What a block may have: 99 KiB with compute capability 8.6, the least since 8.0.
        assert code.metadata.shared <= 99 * 1024, kernel
        # Tensor cores multiply what is in 16 bits.
        if kernel.fn.__name__.startswith("convolve") and dtype.itemsize == 2:
            assert re.search(r"\b(wgmma|mma)\.", code.asm["ptx"]), kernel
        # Channels that lie side by side are read and written together, 16 bytes at a time, from maps and kernels.
        if kernel.fn.__name__ in ("convolve", "fold", "affine") and dtype.itemsize == 2 and channels % 16 == 0:
            assert not re.search(r"\b(ld|st)\.global\S*\.b16\b", code.asm["ptx"]), kernel
            assert re.search(r"\bst\.global\S*\.v4\b", code.asm["ptx"]), kernel


# Before a GPU has been seen


@directly
def test_kernels_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = library.choice()
    with pytest.raises(ValueError, match=r"^PCENET_OPS=triton: torch sees no GPU; TRITON_INTERPRET=1 computes on the"):
        library.use("triton")
    assert library.choice() == before


@directly
@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [
        ((7, 5), "gcc", "the kernels are for NVIDIA GPUs of compute capability 8.0"),
        ((9, 0), "c++", "Triton needs a C "),
    ],
)
def test_gpus_without_what_it_takes_are_refused(
    capability: tuple[int, int], compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
    with pytest.raises(ValueError, match=f"^PCENET_OPS=triton: {re.escape(reason)}"):
        library.use("triton")


@interpreted
@pytest.mark.parametrize("wrong", ["too few", "too short a type", "not in one piece"])
def test_experts_that_do_not_fit_are_refused(wrong: str) -> None:
    """They would be read beyond their end."""
    expert = {
        "too few": EXPERT[:-1],
        "too short a type": EXPERT.int(),
        "not in one piece": torch.stack((EXPERT, EXPERT), dim=1)[:, 0],
    }[wrong]
    for name in schemas.OF_TRITON:
        arguments = [expert if x is EXPERT else x for x in calls()[name][0]]
        with pytest.raises(ValueError, match=r"^expert must be a contiguous int64 tensor \["):
            getattr(torch.ops.pcenet, name)(*arguments)


@directly
def test_kernels_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"^PCENET_OPS=triton: Triton cannot be imported .*; it comes with torch for"):
        library.use("triton")


@directly
def test_blocks_hold_each_patch_once() -> None:
    """Sorted by expert, in order, without a look at who is whose from the processor."""
    from pcenet.ops import gpu

    expert = torch.tensor([2, -1, 0, 2, 0, 0, -1, 2])
    blocks = gpu.blocks_of(expert, 3, 2)
    filled = [patch for patch in blocks.patches.tolist() if patch >= 0]
    assert filled == [2, 4, 5, 0, 3, 7, 1, 6]  # expert 0, nobody of expert 1, expert 2, then nobody's
    first = blocks.first.tolist()
    assert first == [0, 2, 2, 4]  # three patches fill two blocks of two
    assert blocks.experts.tolist()[:5] == [0, 0, 2, 2, 3]
    assert len(blocks.experts) == math.ceil(8 / 2) + 4  # follows from shapes alone
