"""Compiled operators give the same numbers, bit for bit, whatever the number of threads, and whoever else computes."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcenet import ops
from pcenet.nn import PCELayer

# B, H, W, C, D, E, S; and whether taps read beyond a patch
SHAPES = [
    (2, 13, 11, 24, 40, 3, 1, True),
    (7, 9, 8, 24, 40, 2, 1, True),  # more pixels of an expert than are computed at a time, in blocks of images
    (3, 15, 14, 5, 24, 4, 2, True),
    (2, 14, 17, 24, 70, 3, 4, False),
    (9, 20, 17, 16, 24, 2, 8, True),  # images in blocks
    (2, 33, 24, 40, 24, 5, 8, True),
    (1, 12, 12, 128, 128, 2, 4, True),  # a weight's gradient in pieces
    (3, 7, 6, 256, 8, 2, 2, True),  # an input's gradient by channels for two threads, by images for three
    (3, 7, 6, 256, 8, 2, 1, True),
    (1, 50, 49, 5, 13, 2, 24, True),
]


def everything(shape: tuple[int, ...], dtype: torch.dtype, backwards: bool = True) -> dict[str, Tensor]:
    """Outputs and all gradients of every operator."""
    batch, height, width, channels, outs, experts, side, neighbours = shape
    draw = torch.Generator().manual_seed(3)

    def leaf(*sizes: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=draw).to(kind).requires_grad_()

    number = batch * -(-height // side) * -(-width // side)
    expert = torch.randint(-1, experts, (number,), generator=draw)
    x = leaf(batch, channels, height, width, kind=dtype)
    # As a layer has them: sums of size 1, of which an activation makes something.
    size = 1 / math.sqrt(9 * channels)
    weight = (leaf(experts, outs, channels, 3, 3) * size).detach().requires_grad_()
    leaves = {
        "x": x,
        "weight": weight,
        "base": (leaf(outs, channels, 3, 3) * size).detach().requires_grad_(),
        "scale": leaf(experts, outs),
        "shift": leaf(experts, outs),
        "gate": leaf(number),
        "residual": leaf(batch, outs, height, width, kind=dtype),
        "hidden": leaf(outs, channels + 4),
        "bias": leaf(outs),
    }
    lines = [torch.randn(size, 4, generator=draw) for size in (height, width)]
    part = {name: leaves[name] for name in ("gate", "residual")}
    affine = (leaves["scale"], leaves["shift"])
    conv = ops.patch_conv2d(x, weight, expert, side, bool(neighbours), base=leaves["base"])
    statistics = ((torch.zeros(experts, outs), torch.ones(experts, outs)), 1e-5)
    found = {
        "conv": conv,
        "affine": ops.patch_affine(conv, expert, side, ops.Affine(*affine, gelu=True, **part)),
        "norm": ops.expert_norm(conv, *affine, expert, side, *statistics, gelu=True, **part).out,
    }
    if dtype == torch.float32:
        found["perceptron"] = ops.patch_perceptron(x, leaves["hidden"], leaves["bias"], *lines, side)
    for name, out in list(found.items()) if backwards else []:
        direction = torch.randn(out.shape, generator=draw).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), direction, retain_graph=True, allow_unused=True)
        found |= {f"{name}, {of}": grad for of, grad in zip(leaves, grads, strict=True) if grad is not None}
    found |= dict(zip(("number", "mean", "variance"), ops.expert_moments(conv, expert, side, experts), strict=True))
    with torch.no_grad():
        for gelu in (False, True):
            settings = (expert, side, bool(neighbours))
            found[f"at once {gelu}"] = ops.patch_conv2d(x, weight, *settings, then=ops.Affine(*affine, gelu, **part))
        if dtype == torch.float32:
            found["bias"] = torch.ops.pcenet.balancing_bias(torch.randn(500, 5, generator=draw), 2, 8, 0.7)
    return {name: value.detach() for name, value in found.items()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], dtype: torch.dtype, compiled: str) -> None:
    expected = everything(shape, dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert differing(everything(shape, dtype), expected) == [], f"{threads} threads"


def test_threads_do_not_change_a_bit_of_small_patches(compiled: str) -> None:
    """Patches of 16 pixels of which 2 lie on the map, shared out by the patch: no piece is taken for one of few pixels
    because there are more threads. Kernels are channels-last, which those of few pixels are read in."""
    x = torch.randn(96, 24, 1, 2)  # 48 pixels for each expert
    weight = torch.randn(4 * 16, 24, 3, 3).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 16))
    expert = torch.arange(96) % 4
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(ops.patch_conv2d(x, weight, expert, 4))
    assert [torch.equal(each, found[0]) for each in found] == [True] * 4


def test_two_threads_at_once(compiled: str) -> None:
    """As of DataParallel, or of a server: each has memory of its own, and torch's threads serve one after the other."""
    expected = [everything(shape, torch.float32) for shape in SHAPES]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(3) as pool:
        jobs = [(shape, right) for shape, right in zip(SHAPES, expected, strict=True)] * 3
        found = list(pool.map(lambda job: differing(everything(job[0], torch.float32), job[1]), jobs))
    assert found == [[]] * len(jobs)


def run_in_child(function: Callable[[], bool]) -> int | None:
    """Exit code of a forked copy of this process in which something is run; None where it never ends."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if function() else 1))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    child.join()
    return code


def test_a_forked_process(compiled: str) -> None:
    """After the parent has computed with several threads, which a child does not have. (Nor has it those of autograd,
    which refuses to go backwards there.)"""
    torch.set_num_threads(2)
    shape = (2, 33, 24, 40, 24, 5, 8, True)
    everything(shape, torch.float32)
    expected = everything(shape, torch.float32, backwards=False)

    def same() -> bool:
        torch.set_num_threads(1)  # as every loader's worker
        return not differing(everything(shape, torch.float32, backwards=False), expected)

    assert run_in_child(same) == 0


class Routed(Dataset[Tensor]):
    """Images that a layer has looked at: in a worker, where there are several."""

    def __init__(self) -> None:
        self.layer = PCELayer(3, 4, patch_size=4).eval()

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(index))
        return self.layer(x)[0]


def test_a_loaders_worker(compiled: str) -> None:
    images = Routed()
    torch.set_num_threads(2)
    expected = list(DataLoader(images, batch_size=2))
    found = list(DataLoader(images, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))
