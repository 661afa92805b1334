"""Observing routings from outside."""

from __future__ import annotations

import copy
import pickle
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcenet.nn import PCELayer, Routing, aux_loss, record_routing


class Block(nn.Module):
    """A network of its own kind, in which a layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": PCELayer(3, 3, patch_size=2), "b": PCELayer(3, 3, patch_size=4)})
        self.unused = PCELayer(3, 3, patch_size=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["a"](self.inner["b"](x))
        return self.inner["a"](x[:, :, :4])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_records_by_layer_name_in_order_of_the_passes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Block())
    x = torch.randn(2, 3, 8, 8)
    plain = model.eval()(x)
    with record_routing(model) as records:
        recorded = model(x)
    assert torch.equal(plain, recorded)
    assert set(records) == {"1.inner.a", "1.inner.b"}, "a layer that did not run has no entry"
    assert [tuple(r.grid) for r in records["1.inner.a"]] == [(2, 4, 4), (2, 2, 4)]
    assert [tuple(r.grid) for r in records["1.inner.b"]] == [(2, 2, 2)]
    assert all(isinstance(r, Routing) for rs in records.values() for r in rs)
    assert set(records) <= {name for name, _ in model.named_modules()}


def test_several_passes_add_up_and_the_layer_itself_has_no_name() -> None:
    layer = PCELayer(3, 3, patch_size=2)
    with record_routing(layer) as records:
        layer(torch.randn(1, 3, 4, 4))
        _, routing = layer.forward_with_routing(torch.randn(2, 3, 4, 4))
    assert list(records) == [""]
    assert [r.grid.batch for r in records[""]] == [1, 2]
    assert records[""][1] is routing


def test_a_dense_network_has_no_records() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    with record_routing(model) as records:
        model(torch.randn(2, 3, 4, 4))
    assert records == {}


def test_nested_recorders_each_see_their_own_time() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2))
    x = torch.randn(1, 3, 4, 4)
    with record_routing(model) as outer:
        model(x)
        with record_routing(model) as inner:
            model(x)
        model(x)
    assert len(outer["0"]) == 3
    assert len(inner["0"]) == 1
    assert inner["0"][0] is outer["0"][1]


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(Block())
    assert hooks(model) == 0
    with record_routing(model) as records:
        assert hooks(model) == 3, "one on each router"
        model(torch.randn(1, 3, 8, 8))
    assert hooks(model) == 0
    model(torch.randn(1, 3, 8, 8))
    assert len(records["0.inner.b"]) == 1, "a record ends with its recorder"


def test_nothing_is_left_behind_by_an_error() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2))
    broken = torch.randn(1, 5, 4, 4)
    with record_routing(model) as records:
        model(torch.randn(1, 3, 4, 4))
        with pytest.raises(ValueError, match="must be a map"):
            model(broken)
    assert hooks(model) == 0
    assert len(records["0"]) == 1, "what was seen before the error is kept"


def fail_under_a_recorder(model: nn.Module) -> None:
    with record_routing(model):
        raise KeyError("something of the user's")


def test_nothing_is_left_behind_by_an_error_of_the_users() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2))
    with pytest.raises(KeyError):
        fail_under_a_recorder(model)
    assert hooks(model) == 0


def test_a_shared_layer_is_recorded_once_per_pass() -> None:
    shared = PCELayer(3, 3, patch_size=2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with record_routing(model) as records:
        model(torch.randn(1, 3, 4, 4))
    assert {name: len(routings) for name, routings in records.items()} == {"0": 2}


def test_a_compiled_network_is_refused() -> None:
    model = nn.Sequential(PCELayer(2, 2, patch_size=2))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="model is compiled"), record_routing(compiled):
        pass
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="model is compiled"), record_routing(nn.Sequential(model)):
        pass


def test_records_carry_gradients() -> None:
    layer = PCELayer(3, 3, patch_size=2)
    with record_routing(layer) as records:
        layer(torch.randn(1, 3, 4, 4))
    records[""][0].logits.sum().backward()
    assert layer.router.hidden.weight.grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_is_recorded_once(use_reentrant: bool) -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    passes: list[Routing] = []
    model[0].router.register_forward_hook(lambda _module, _args, routing: passes.append(routing))
    with record_routing(model) as records:
        for _ in range(2):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert len(passes) == 4, "each step computes the layer twice"
    assert [r.expert_counts.sum().item() for r in records["0"]] == [8, 8]
    assert [r is p for r, p in zip(records["0"], passes[::2], strict=True)] == [True, True]


def test_auxiliary_losses_of_a_checkpointed_layer_have_their_gradients() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2))
    x = torch.randn(2, 3, 4, 4)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        with record_routing(model) as records:
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            (y.sum() + aux_loss(records, balance=1.0, z=1.0)).backward()
        found.append(model[0].router.hidden.weight.grad)
    torch.testing.assert_close(found[1], found[0])


def test_threads_that_share_a_network_record_their_own_passes() -> None:
    layer = PCELayer(3, 4, patch_size=2).eval()
    start = Barrier(3)
    found: dict[int, list[Routing]] = {}

    def work(index: int) -> None:
        with record_routing(layer) as records:
            start.wait()
            for _ in range(3):
                with torch.no_grad():
                    layer(torch.randn(index + 1, 3, 4, 4))
            start.wait()
        found[index] = records[""]

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert [routing.grid.batch for routing in found[index]] == [index + 1] * 3


def test_a_copy_made_while_recording_is_not_recorded() -> None:
    layer = PCELayer(3, 4, patch_size=2).eval()
    x = torch.randn(1, 3, 4, 4)
    with record_routing(layer) as records:
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        layer(x)
        for twin in copies:
            twin(x)
    layer(x)
    for twin in copies:
        twin(x)
        with record_routing(twin) as own:
            twin(x)
        assert len(own[""]) == 1
    assert len(records[""]) == 1
