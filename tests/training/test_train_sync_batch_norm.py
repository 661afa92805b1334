"""What a network becomes before several processes train it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pcenet.runs.config import TrainConfig
from pcenet.training.sync_batch_norm import synchronised


@pytest.mark.parametrize("training", [True, False])
def test_synchronised_batch_norms_compute_the_same_in_one_process(training: bool) -> None:
    """torch's, and timm's with its activation, in float64: output, gradients and running statistics."""
    torch.manual_seed(0)
    activated = BatchNormAct2d(4, act_layer=nn.SiLU)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), activated, nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    model.double().train(training)
    for norm in (model[1], model[3]):
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)

    def results() -> dict[str, torch.Tensor]:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        found = {name: value.clone() for name, value in model.state_dict().items()}
        found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        model.load_state_dict(start)
        return found | {"output": output.detach()}

    expected = results()
    assert synchronised(model, replace(TrainConfig(), sync_batch_norm=True), torch.device("cpu")) is model
    assert not {nn.BatchNorm2d, BatchNormAct2d} & {type(module) for module in model}
    found = results()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (64, 2)), (nn.BatchNorm1d, (8, 2, 8)), (nn.BatchNorm3d, (2, 2, 4, 2, 4))]
)
def test_maps_of_any_number_of_axes(kind: type[nn.Module], shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    model = nn.Sequential(kind(2, affine=affine).double())
    expected = model(x)
    running = model[0].running_var.clone()
    model[0].reset_running_stats()
    config = replace(TrainConfig(), sync_batch_norm=True)
    torch.testing.assert_close(synchronised(model, config, torch.device("cpu"))(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[0].running_var, running, rtol=1e-10, atol=1e-10)


def test_statistics_are_of_full_precision() -> None:
    """Of 1,024 ones and as many fives in bfloat16: mean 3, deviation 2. The output keeps the input's type."""
    x = torch.cat([torch.ones(1024, 1), 5 * torch.ones(1024, 1)]).bfloat16()
    model = synchronised(
        nn.Sequential(nn.BatchNorm1d(1)), replace(TrainConfig(), sync_batch_norm=True), torch.device("cpu")
    )
    output = model(x)
    assert output.dtype == torch.bfloat16
    assert output.unique().tolist() == [-1, 1]
