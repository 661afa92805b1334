"""Small networks whose weights and statistics look trained."""

from typing import Any

import torch

from pcenet.models import SavableModel, create_network

TINY: dict[str, Any] = {"strides": (2, 4), "depths": (1, 1), "widths": (8, 16), "num_experts": 2}


def trained_like(model: SavableModel, seed: int = 0) -> SavableModel:
    """Experts that differ, routers that are sure, normalisations that do something."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "difference" in name:
                parameter.copy_(0.1 * normal(parameter))
            elif name.endswith("logits.weight"):
                parameter.copy_(4 * normal(parameter))
            elif parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.1 * normal(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("expert_bias"):
                buffer.copy_(0.1 * normal(buffer))
            elif name.endswith("centring"):
                buffer.fill_(0.6)
    return model.eval()


def make_tiny(name: str = "pce_nano", **changes: Any) -> SavableModel:
    """A network of two routed stages for images of 16 px, with three classes."""
    torch.manual_seed(0)
    arguments = {"patch_sizes": (4, 1), **TINY, **changes}
    model = create_network(name, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 16, 16)}, **arguments)
    model.class_names = ["a", "b", "c"]
    return trained_like(model)
