"""Pictures of images: those that a network is trained on, and what it makes of others. matplotlib draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from pcenet.analysis.pictures import routing_picture
from pcenet.analysis.samples import overlay
from pcenet.data import EpochSampler, SegmentationSource
from pcenet.models.preprocessing import as_pixels
from pcenet.nn import record_routing
from pcenet.reporting.plots import as_label, new_figure
from pcenet.runtime.device import autocast
from pcenet.tasks.pixels import classes_at
from pcenet.training.preparation import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # images of a sheet
LAYERS = 8  # of a network with more, those nearest to its output


def training_sheet(run: Run) -> Figure:
    """The first images of the first epoch as the network gets them, but for mixing, with their labels or masks."""
    loader = run.loaders["train"]
    assert isinstance(loader.sampler, EpochSampler)
    samples = [loader.dataset[0, index] for index in loader.sampler.order(0)[:SHOWN]]
    pixels = seen(torch.stack([image for image, _ in samples]), run.model)
    return in_a_row(*marked(pixels, [target for _, target in samples], run))


@torch.no_grad()
def prediction_sheet(run: Run, model: nn.Module) -> Figure:
    """Some validation images with what a network makes of them, and who served which patch in its PCE layers.

    A class stands above its image, the label in brackets where it is another; predicted masks lie over theirs.
    """
    dataset: Any = run.loaders["val"].dataset
    count = min(SHOWN, len(dataset))
    samples = [dataset[0, number * len(dataset) // count] for number in range(count)]
    samples = [sample for sample in samples if sample[0].shape == samples[0][0].shape]  # those of one batch
    images = torch.stack([image for image, _ in samples])
    device = next(model.parameters()).device
    with autocast(run.config.precision, device), record_routing(model) as records:
        logits = model(images.to(device)).float().cpu()
    height, width = images.shape[2:]
    predicted = logits.argmax(1) if logits.ndim == 2 else [classes_at(each, (height, width)) for each in logits]
    pixels, titles = marked(seen(images, model), list(predicted), run)
    if logits.ndim == 2:
        labels = [as_label(run.sources["val"].classes[label]) for _, label in samples]
        titles = [
            title if title == label else f"{title} ({label})" for title, label in zip(titles, labels, strict=True)
        ]
    layers = dict(list(records.items())[-LAYERS:])
    return routing_picture(pixels, layers, titles) if layers else in_a_row(pixels, titles)


def in_a_row(pixels: Tensor, titles: Sequence[str]) -> Figure:
    """Images ``[B, 3, H, W]`` in [0, 1] under their titles."""
    figure = new_figure(1.6 * len(pixels), 2)
    for axis, image, title in zip(figure.subplots(1, len(pixels), squeeze=False)[0], pixels, titles, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    return figure


def seen(images: Tensor, model: nn.Module) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1] as they were before they were normalised, if they are."""
    return images / 255 if images.dtype == torch.uint8 else as_pixels(images, model)


def marked(pixels: Tensor, targets: Sequence[Any], run: Run) -> tuple[Tensor, list[str]]:
    """Images with their masks laid over them, and titles; with class numbers for targets the titles are their names."""
    source = run.sources["train"]
    if not isinstance(source, SegmentationSource):
        return pixels, [as_label(source.classes[int(target)]) for target in targets]
    pictures = [
        overlay(to_pil_image(image), Image.fromarray(mask.to(torch.uint8).numpy()))
        for image, mask in zip(pixels, targets, strict=True)
    ]
    return torch.stack([pil_to_tensor(picture) for picture in pictures]) / 255, [""] * len(pictures)
