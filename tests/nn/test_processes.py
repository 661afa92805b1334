"""Two processes equal one: outputs' gradients, statistics and routing of the same batch, whole or in halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcenet.nn import (
    Grid,
    PCELayer,
    attach_aux_losses,
    aux_terms,
    load_balance_loss,
    record_routing,
    route,
    routers_of,
    synchronise,
)
from pcenet.nn.processes import gather_rows, process_count, sum_over_processes

STEPS = 5
STATISTICS = ("running", "batch")


def build(statistics: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers; the second has maps that its patches do not divide, and no shortcut."""
    torch.manual_seed(0)
    network = nn.Sequential(
        PCELayer(3, 6, patch_size=2, num_experts=3, border="exchange", capacity_factor=None),
        PCELayer(6, 5, patch_size=4, num_experts=4, capacity_factor=None, shortcut=False),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(statistics == "batch")
    return network.to(dtype)


def images() -> tuple[Tensor, Tensor]:
    """Eight images, of which the first four look nothing like the others, so that each half has its own experts; and
    a mask, by which the halves have unequal numbers of pixels that count."""
    torch.manual_seed(1)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    x[:4] = x[:4] * 0.1 + 3
    counts = torch.rand(8, 1, 6, 6) < 0.5
    counts[:4, :, 3:] = False
    return x, counts


def loss_of(network: nn.Module, x: Tensor, counts: Tensor, count: Tensor | float, processes: int) -> Tensor:
    """The mean of squares over what counts in the whole batch, and the auxiliary losses, unless they
    are attached."""
    with record_routing(network) as records:
        out = network(x)
    attached = any(router._forward_hooks for _, router in routers_of(network))
    balance, z = (0.0, 0.0) if attached else aux_terms(records, synchronised=processes > 1)
    return (out.square() * counts).sum() * processes / count + 0.1 * balance + 0.01 * z


def train(network: nn.Module, x: Tensor, counts: Tensor, processes: int) -> dict[str, Any]:
    """Five steps of SGD; the first step's gradients, and the state at the end."""
    count = counts.sum().double()
    if processes > 1:
        count = sum_over_processes(count)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    first: dict[str, Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(network, x, counts, count, processes).backward()
        first = first or {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
    return {"gradients": first, "state": copy.deepcopy(network.state_dict())}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes, started once for all tests, found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(start, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {statistics: half_of_the_training(rank, statistics) for statistics in STATISTICS}
    found["float32"] = half_of_the_training(rank, "batch", dtype=torch.float32)
    found["attached"] = half_of_the_training(rank, "running", attach=True)
    torch.save(found | {"sums": sums_and_rows(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def half_of_the_training(
    rank: int, statistics: str, attach: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    x, counts = (part.chunk(2)[rank] for part in images())
    x, network = x.to(dtype), synchronise(build(statistics, dtype))
    if statistics == "batch":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if attach:
        attach_aux_losses(network, balance=0.1, z=0.01)
    wrapped = DistributedDataParallel(network)
    result = train(wrapped, x, counts, processes=2)
    return {kind: {name.removeprefix("module."): t for name, t in result[kind].items()} for kind in result}


def sums_and_rows(rank: int) -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0]) + 10 * rank
    x.requires_grad_()
    total = sum_over_processes(x)
    (total * torch.tensor([1.0, 5.0]) * (rank + 1)).sum().backward()
    return {"total": total.detach(), "gradient": x.grad, "rows": gather_rows(x[None]), "processes": process_count()}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_two_processes_train_as_one(statistics: str, halves: list[dict[str, Any]]) -> None:
    """With running statistics, or with those that torch's conversion makes those of both."""
    expected = train(build(statistics), *images(), processes=1)
    assert {name for name, g in expected["gradients"].items() if g.abs().max() > 1e-6} >= {
        "0.router.hidden.weight",
        "0.experts.conv1.difference",
        "1.experts.norm1.weight",
    }
    for half in halves:
        for name, gradient in expected["gradients"].items():
            assert (half[statistics]["gradients"][name] - gradient).abs().max() < 1e-10, name
        for name, value in expected["state"].items():
            assert (half[statistics]["state"][name] - value).abs().max() < 1e-8, name


def test_two_processes_train_as_one_in_float32(halves: list[dict[str, Any]]) -> None:
    """Where the compiled operators run, which share the sums of normalisations by calls of their own. Gradients differ
    by some hundred roundings, five steps by ten times that."""
    x, counts = images()
    expected = train(build("batch", torch.float32), x.float(), counts, processes=1)
    for half in halves:
        for name, gradient in expected["gradients"].items():
            assert (half["float32"]["gradients"][name] - gradient).abs().max() < 1e-5 * (1 + gradient.abs().max()), name
        for name, value in expected["state"].items():
            assert (half["float32"]["state"][name] - value).abs().max() < 1e-4 * (1 + value.abs().max()), name


def test_attached_losses_see_the_loads_of_all_processes(halves: list[dict[str, Any]]) -> None:
    expected = train(build("running"), *images(), processes=1)
    for half in halves:
        for name, gradient in expected["gradients"].items():
            assert (half["attached"]["gradients"][name] - gradient).abs().max() < 1e-10, name


def test_in_the_tests_above_some_expert_idles_in_one_half() -> None:
    """With the bias of the whole batch, which the halves share, an expert of a half has no patch at all."""
    network = build("batch")
    with record_routing(network) as records:
        network(images()[0])
    halves = [
        torch.bincount(half.flatten(), minlength=r.num_experts)
        for (r,) in records.values()
        for half in r.expert_ids.chunk(2)
    ]
    assert min(int(load.min()) for load in halves) == 0


def test_sums_and_rows_by_hand(halves: list[dict[str, Any]]) -> None:
    # 1 + 11 and 2 + 12. Process r weighs the sum by (r + 1) * (1, 5): in all by 3 * (1, 5), the gradient of each x.
    for half in halves:
        assert half["sums"]["total"].tolist() == [12, 14]
        assert half["sums"]["gradient"].tolist() == [3, 15]
        assert half["sums"]["rows"].tolist() == [[1, 2], [11, 12]]
        assert half["sums"]["processes"] == 2
    assert process_count() == 1


def test_batch_norms_are_not_touched() -> None:
    network = nn.Sequential(PCELayer(3, 4, patch_size=2), nn.BatchNorm2d(4))
    before = [type(module) for module in network.modules()]
    assert synchronise(network) is network
    assert [type(module) for module in network.modules()] == before
    assert not network[0].experts.norm1.synchronised


def test_a_part_with_the_load_of_the_whole() -> None:
    """Two patches on expert 0 in one half, two on expert 1 in the other. Loads of all: (2, 2), so each half has
    E * (p_0 / 2 + p_1 / 2) = 1, as the whole; by its own load the loss would be 2 * max p > 1."""
    first = route(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), Grid(1, 1, 2))
    assert load_balance_loss(first, torch.tensor([2, 2])).item() == pytest.approx(1, abs=1e-6)
    assert load_balance_loss(first).item() > 1.4
